"""The manifest that lmms-eval reads at each start; it imports the model itself only when it is used."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="atr_llava", chat_class_path="atr.integrations.lmms_eval.model.AtrLlava")
