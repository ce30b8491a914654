"""The manifest that lmms-eval reads at each start; it imports the model itself only when it is used."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(
    model_id="atr",
    chat_class_path="atr.integrations.lmms_eval.model.Atr",
    aliases=("atr_llava",),  # its name until it served more than LLaVA
)
