"""What lmms-eval reads of us whenever it starts; the model itself is imported when it is asked for."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="atr_llava", chat_class_path="atr.integrations.lmms_eval.model.AtrLlava")
