"""What of a vision tower features are: the output of one of its layers, or its merged tokens."""

MERGED = "merged"
"""The tokens as a language model is fed them: what a tower's merger, pooler or projector makes of patches."""

TowerLayer = int | str
"""An index into `hidden_states`, or MERGED."""


def check_layer(layer: TowerLayer | None) -> None:
    """Raise ValueError for a text other than MERGED."""
    if isinstance(layer, str) and layer != MERGED:
        raise ValueError(f"layer: {layer!r} is not allowed, allowed: int, {MERGED!r}")
