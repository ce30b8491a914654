"""Shortens a processed input of a vision-language model to the kept visual tokens; the model is unchanged.

The images are encoded outside the model. The placeholders of dropped tokens are removed from `input_ids` and
`attention_mask`, and the kept features are passed as `mm_encoder_outputs`, which `forward` and `generate` of
transformers >= 5.18 accept. Shapes: B rows, L tokens of a row, P packed and K kept tokens of an image, D
width.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.tower_layer import MERGED
from atr.reduction import FeatureSelector, Merger, Reducer
from atr.reduction.checked import select_merged
from atr.vlm.compatibility import check_keep, check_model, check_positions, check_reducer, selector_of
from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.families import Layer, family_of
from atr.vlm.families.exactness import warn_if_inexact
from atr.vlm.families.rule import Rule
from atr.vlm.families.videos import encode_videos
from atr.vlm.image_tokens import ImageTokens, fresh
from atr.vlm.input_keys import check_keys
from atr.vlm.policy import POSITIONS, Policy, check_choice
from atr.vlm.selection import as_reducer, select_tokens
from atr.vlm.sequence import (
    TOKEN_TYPES,
    has_axes,
    image_bounds,
    left_tags,
    mark_kept,
    pack_left,
    pad_id,
    placeholders,
    position_ids,
    widen,
)
from atr.vlm.tiling import TileLayout


@dataclass(frozen=True)
class Kept:
    """What is kept of one image: `tokens` of its `of` visual tokens, and `newlines`, which do not count.

    `indices_K` are the indices of both among the packed tokens of the image, `tiles` the grids (rows,
    columns) of its tiles in tokens.
    """

    tokens: int
    of: int
    newlines: int
    indices_K: Tensor
    tiles: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Reduced(Mapping[str, Any]):
    """A shortened input for `model(**reduced)` and `model.generate(**reduced)`, which may be used repeatedly.

    `kept` describes each image, in the order of the placeholders. Equal items of `image_of` are one image
    with the same kept tokens.
    """

    inputs: dict[str, Any]
    kept: tuple[Kept, ...] = ()
    image_of: tuple[int, ...] = ()

    def __getitem__(self, key: str) -> Any:
        # A new object each time: beam search repeats the features in place.
        return fresh(self.inputs[key]) if key == "mm_encoder_outputs" else self.inputs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)


def reduce(
    model: Any,
    inputs: Mapping[str, Any],
    reducer: Reducer | FeatureSelector,
    keep: float | str,
    positions: str = POSITIONS,
    budget: str = "image",
    newline: str = "keep",
    interpolation: str = "model",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Reduced:
    """Shorten a processor's output to `keep` (a fraction, or an int count) of the tokens of each image.

    Rows may be padded on either side and hold several images or none; the result is left-padded to the
    longest row. With `keep="adaptive"` a trained selector chooses the count of each image: it keeps the
    tokens with positive logit, within `bounds` (lowest and highest fraction or count per image, or per tile
    if `budget` is "tile").

    `positions` are the position ids of the kept tokens:

    - "original": every token keeps its position in the full sequence, and generation continues from there.
      Without mask and cache transformers would read the gaps as borders between packed sequences, so that
      the result sets `use_cache`; passing `use_cache=False` as well raises TypeError.
    - "contiguous": the model numbers the shorter sequence itself, like any prompt.

    Videos beside the images stay whole, in families that are proven with them; a warning says so. Another
    says, once per process and model type, where removing tokens is not the same as masking them: with linear
    attention, short convolutions, or a sliding window shorter than the prompt. A third is given if the
    selector's record names other positions.

    The following apply to models that cut images into tiles. Counts are of the visual tokens that the model
    reads, without padding and without the newlines at the ends of rows.

    - `budget`: the tiles of an "image" share its budget, the highest scores first; or each "tile" gets a
      share in proportion to its tokens.
    - `newline`: "keep" all newlines, or let them "follow" their rows: a row without kept tokens has none. The
      same holds for tokens of the text between the tiles or rows of an image.
    - `interpolation`: if OneVision downsamples an image, scores are resampled like the features and tokens
      are selected afterwards ("model"), or tokens are selected without any resampling ("off").

    Raises ValueError for an unsupported model family, inputs other than text and images, token types that are
    missing (some models then answer wrongly without a word) or have another shape, placeholders that
    do not match the images, `keep` out of range, a reducer that does not serve the images, a selector
    trained on other features than the model reads, and original positions under FlashAttention, which reads
    the gaps as borders in spite of a cache, or for a language model without position ids.
    """
    policy = Policy(keep, positions, budget, newline, bounds)
    check_choice("interpolation", interpolation)
    check_model(model)
    check_positions(model, positions)
    reducer = as_reducer(reducer)
    check_reducer(model, reducer, positions)
    check_keep(reducer, policy.keep)
    if "pixel_values" not in inputs:
        return Reduced(shorten(model, inputs, ImageTokens([]), [], positions))
    prepared = prepare(model, inputs, interpolation, reducer.needs, layer_of(model, reducer))
    kept = select_tokens(reducer, prepared.encoded, prepared.layout, policy)
    return prepared.keep_tokens(kept, reducer, policy)


@dataclass(frozen=True)
class Prepared:
    """A processed input whose images are encoded and projected once, for all reducers and budgets.

    `tokens` are the packed tokens (P, D) of each image. `image_of` is the image of each run of placeholders,
    because an image may be shown more than once. `videos` are the encoder's
    outputs for videos beside the images, which stay whole.
    """

    model: Any
    inputs: Mapping[str, Any]
    layout: TileLayout
    encoded: EncodedTiles
    tokens: ImageTokens
    image_of: Sequence[int]
    videos: Mapping[str, Any] = field(default_factory=dict)
    layer: Layer = None
    """What was read of the images, as in `prepare`."""

    def reduce(self, reducer: Reducer | FeatureSelector, policy: Policy) -> Reduced:
        """The input shortened under a policy; result and errors as in `atr.vlm.reduce.reduce`."""
        reducer = as_reducer(reducer)
        has_text = self.encoded.has("text_BD") or "text_BD" not in reducer.needs
        prepared = self if has_text else self.with_text()
        return prepared.keep_tokens(prepared.choose(reducer, policy), reducer, policy)

    def choose(self, reducer: Reducer | FeatureSelector, policy: Policy) -> list[Tensor]:
        """Indices kept of the packed tokens of each encoded image, without newlines; int64 (K,) each."""
        reducer = as_reducer(reducer)
        check_reducer(self.model, reducer, policy.positions)
        check_keep(reducer, policy.keep)
        self._check_layer(reducer)
        return select_tokens(reducer, self.encoded, self.layout, policy)

    def _check_layer(self, reducer: Reducer) -> None:
        """Raise ValueError if the images were encoded at another layer than the reducer's selector reads."""
        read, encoded = layer_of(self.model, reducer), self.layer or MERGED
        if read is not None and read != encoded:
            raise ValueError(
                f"layer: the images were encoded at {encoded}, the selector reads {read}, allowed: the same"
            )

    def keep_tokens(self, kept: Sequence[Tensor], reducer: Reducer, policy: Policy) -> Reduced:
        """The input with the `kept` tokens (K,) of each encoded image, which `choose` gave for `reducer`."""
        tokens = self._merge(reducer, kept) if isinstance(reducer, Merger) else self.tokens
        with_newlines = self.layout.with_newlines(list(kept), policy.newline)
        report = [
            Kept(len(kept_K), of, len(all_K) - len(kept_K), all_K, tiles)
            for kept_K, all_K, of, tiles in zip(
                kept, with_newlines, self.layout.sizes, self.layout.grids, strict=True
            )
        ]
        shorter = shorten(
            self.model,
            self.inputs,
            tokens.of(self.image_of),
            [with_newlines[image] for image in self.image_of],
            policy.positions,
            policy.newline,
            self.videos,
        )
        return Reduced(shorter, tuple(report[image] for image in self.image_of), tuple(self.image_of))

    def with_text(self) -> Self:
        """The same with `text_BD`, and with a separate image for each run of placeholders.

        Raises ValueError if a row has an image and no text.
        """
        tiling = self.layout.tiling.of(self.image_of)
        text_RD = self._embed_text()
        text_BD = text_RD.repeat_interleave(torch.tensor(tiling.tiles, device=text_RD.device), 0)
        encoded = self.encoded.of(self.layout.tiling.tiles_of(self.image_of))
        return replace(
            self,
            layout=replace(self.layout, tiling=tiling),
            encoded=encoded.with_text(text_BD),
            tokens=self.tokens.of(self.image_of),
            image_of=range(len(self.image_of)),
        )

    def _embed_text(self) -> Tensor:
        """Mean unit embedding of the text after a row's last image, or else of all its text; (R, D).

        One for each of the R runs of placeholders.
        """
        placeholder_BL = placeholders(self.model, self.inputs)
        real_BL = self.inputs["attention_mask"].bool() & ~placeholder_BL
        after_BL = real_BL & (placeholder_BL.flip(1).cumsum(1).flip(1) == 0)
        text_BL1 = after_BL.where(after_BL.any(1, keepdim=True), real_BL)[..., None]
        bounds = image_bounds(placeholder_BL, [self.layout.lengths[image] for image in self.image_of])
        row_R = placeholder_BL.nonzero()[bounds[:-1], 0]
        if not text_BL1.any(1)[row_R].all():
            raise ValueError("inputs: a row has an image and no text, which the reducer needs")
        embedding_BLD = self.model.get_input_embeddings()(self.inputs["input_ids"]).float()
        unit_BLD = F.normalize(embedding_BLD, dim=-1) * text_BL1
        text_BD: Tensor = unit_BLD.sum(1) / text_BL1.sum(1).clamp_min(1)
        return text_BD[row_R]

    def _merge(self, merger: Merger, kept: Sequence[Tensor]) -> ImageTokens:
        """The tokens of each image of one tile, with the merged tokens in the places of the kept ones."""
        if self.tokens.levels:
            raise ValueError(
                f"reducer {type(merger).__name__} merges tokens: it is not allowed for "
                f"{self.model.config.model_type}, whose first layers add further features of each token"
            )
        images = [tokens_PD.clone() for tokens_PD in self.tokens.images]
        for members, group in self.encoded:
            counts = [len(kept[image]) for image in members]
            for count in sorted(set(counts) - {0}):
                rows = [row for row, own in enumerate(counts) if own == count]
                keep_BK, merged_BKD = select_merged(merger, group.of(rows), count)
                merged_BKD = family_of(self.model).project(self.model, merged_BKD)
                for row, keep_K, merged_KD in zip(rows, keep_BK, merged_BKD, strict=True):
                    images[members[row]][keep_K] = merged_KD
        return replace(self.tokens, images=images)


def prepare(
    model: Any,
    inputs: Mapping[str, Any],
    interpolation: str = "model",
    needs: Collection[str] = frozenset(),
    layer: Layer = None,
) -> Prepared:
    """Encode the images of a processor's output, to reduce it more than once; errors as in `reduce`.

    `needs` are the optional fields of EncoderOutput that the reducers need, `layer` is what they read of the
    images: a layer of the tower, "merged" tokens, or None for what the model itself reads.
    """
    check_choice("interpolation", interpolation)
    check_keys(model, inputs)
    if "pixel_values" not in inputs:
        raise ValueError("inputs: pixel_values is missing, there is no image to encode")
    family = family_of(model)
    tiling = family.tiling(model, inputs)
    layout = TileLayout(model, tiling)
    image_bounds(placeholders(model, inputs), layout.lengths)  # before the tower runs
    if interpolation == "off":
        unresampled = TileLayout(model, tiling, resample=False)
        inputs = widen(model, inputs, layout.lengths, unresampled.lengths)
        layout = unresampled
    encoded = family.encode(model, inputs, tiling, set(needs) - {"text_BD"}, layer)
    image_of, videos = range(len(tiling.tiles)), encode_videos(model, inputs)
    prepared = Prepared(model, inputs, layout, encoded, layout.tokens(encoded), image_of, videos, layer)
    return prepared.with_text() if "text_BD" in needs else prepared


def shorten(
    model: Any,
    inputs: Mapping[str, Any],
    images: ImageTokens,
    keep: Sequence[Tensor],
    positions: str = POSITIONS,
    newline: str = "keep",
    videos: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Keep the tokens `keep` (K,) of each of the `images`, in order of the placeholders.

    For images that are encoded and projected already; videos are encoded here if they are not given. Budgets
    may differ between images. The result serves one call of the model; errors as in `reduce`.
    """
    check_positions(model, positions)
    check_keys(model, inputs)
    input_ids_BL = inputs["input_ids"]
    real_BL = inputs["attention_mask"].bool()
    placeholder_BL = placeholders(model, inputs)
    stay_BL = mark_kept(placeholder_BL, real_BL, images.images, keep)
    if newline == "follow":
        stay_BL &= ~left_tags(model, placeholder_BL, stay_BL, list(map(len, images.images)))
    shorter: dict[str, Any] = {
        "input_ids": pack_left(input_ids_BL, stay_BL, fill=pad_id(model)),
        "attention_mask": pack_left(inputs["attention_mask"], stay_BL, fill=0),
    }
    shorter |= {key: pack_left(inputs[key], stay_BL, fill=0) for key in TOKEN_TYPES if key in inputs}
    # If nothing is dropped, a single axis numbers itself as before; several axes would need the pixels' grid.
    if positions == "original" and (has_axes(model) or not torch.equal(stay_BL, real_BL)):
        position_ids_ABL = position_ids(model, inputs)
        shorter |= {"position_ids": pack_left(position_ids_ABL, stay_BL, fill=0), "use_cache": True}
    if not torch.equal(stay_BL, real_BL):
        warn_if_inexact(model, int(real_BL.sum(1).max()))
    videos = encode_videos(model, inputs) if videos is None else videos
    if len(images) or videos:
        shorter["mm_encoder_outputs"] = {**(images.keep(keep) if len(images) else {}), **videos}
    return shorter


def layer_of(model: Any, *reducers: Any) -> Layer:
    """The features that reducers read: those of their selectors' training, where the family has a choice.

    Raises ValueError for selectors that read different ones.
    """
    if not isinstance(family_of(model), Rule):
        return None
    selectors = [selector for reducer in reducers if (selector := selector_of(reducer)) is not None]
    layers: set[Layer] = {selector.layer or MERGED for selector in selectors}
    if len(layers) > 1:
        named = ", ".join(sorted(map(str, layers)))
        raise ValueError(f"layer: selectors of layers {named} read the same images, allowed: of one layer")
    return next(iter(layers), None)
