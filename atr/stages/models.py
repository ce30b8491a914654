"""Stage models: the encoder and the model that params.yaml names, as their presets describe them.

The stages that use them depend on these two files, and not on presets that params.yaml does not name.
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
