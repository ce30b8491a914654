"""Stage models: writes the presets of the encoder and the model that params.yaml names.

The stages that use them depend on these two files, so that a change to another preset reruns nothing.
"""

from dataclasses import asdict

from atr import config
from atr.core.files import write_json
from atr.stages import MODELS, entry


def main(params: config.Params) -> None:
    """Write encoder.json and vlm.json."""
    for role, preset in (("encoder", params.encoder), ("vlm", params.vlm)):
        write_json(MODELS / f"{role}.json", asdict(preset))


if __name__ == "__main__":
    entry("models", main)
