"""Section `extract`: one pass of the frozen encoder over the images."""

from pydantic.dataclasses import dataclass

from atr.config.fields import STRICT, Count, OptionalEncoderLayer, Workers


@dataclass(frozen=True, config=STRICT)
class Extract:
    """How features are extracted and stored."""

    layer: OptionalEncoderLayer = None
    """Index into `hidden_states`; merged, for encoders that merge patches into the tokens that the language
    model is fed (where an index means the mean over each token's patches); null takes the encoder preset's.
    The paper gives none; LLaVA reads -2."""
    batch_size: Count = 32
    """Images per step on each device; more do not fit a CPU's caches, and are a sixth slower."""
    shard_images: Count = 1024
    """Images per file of the store; bounds the memory for writing and reading."""
    workers: Workers = 1
    """Threads that decode images ahead of the encoder; 0 decodes between its batches."""
