"""Bounds of an image's area, for image processors of native resolution, such as Qwen's."""

from typing import Any

_EDGES = ("shortest_edge", "longest_edge")
"""Keys of a processor's `size`; they hold areas, not edges, where patches are merged."""


def bound_area(processor: Any, least: int | None, most: int | None, where: str) -> None:
    """Set the areas in pixels between which an image processor resizes images; None leaves its own bound.

    Raises ValueError naming `where`, a folder or hub id, if the processor has no such bounds or if the lower
    one exceeds the upper one.
    """
    given = {edge: area for edge, area in zip(_EDGES, (least, most), strict=True) if area is not None}
    if not given:
        return
    own = dict(processor.size or {})
    if not (own.keys() >= set(_EDGES) and hasattr(processor, "merge_size")):
        name = type(processor).__name__
        raise ValueError(f"{where}: min_pixels and max_pixels: {name} sets the size of images, allowed: null")
    bounds = own | given
    if bounds["shortest_edge"] > bounds["longest_edge"]:
        raise ValueError(
            f"{where}: min_pixels: {bounds['shortest_edge']} is out of range, allowed: at most max_pixels, "
            f"{bounds['longest_edge']}"
        )
    processor.size = type(processor.size)(**bounds)
