"""Shortens a processed input of a vision-language model to the kept visual tokens; the model is unchanged.

The images are encoded outside the model. The placeholders of dropped tokens are removed from `input_ids` and
`attention_mask`, and the kept features are passed as `mm_encoder_outputs`, which `forward` and `generate` of
transformers >= 5.18 accept. Shapes: B rows, L tokens of a row, P packed and K kept tokens of an image, D
width.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from atr.reduction import EncoderOutput, FeatureSelector, Merger, Reducer
from atr.reduction.checked import select_merged
from atr.vlm.compatibility import check_positions, check_reducer
from atr.vlm.families import Tiling, encode, family_of, project
from atr.vlm.policy import POSITIONS, Policy, check_choice
from atr.vlm.selection import as_reducer, select_tokens
from atr.vlm.tiling import TileLayout

TEXT_KEYS = frozenset({"input_ids", "attention_mask"})


@dataclass(frozen=True)
class Kept:
    """What is kept of one image: `tokens` of its `of` visual tokens, and `newlines`, which do not count.

    `indices_K` are the indices of both among the packed tokens of the image.
    """

    tokens: int
    of: int
    newlines: int
    indices_K: Tensor


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
        is_images = key == "mm_encoder_outputs"
        return _encoder_outputs(self.inputs[key]["image"].pooler_output) if is_images else self.inputs[key]

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

    A warning is given if the selector's record names other positions.

    The following apply to models that cut images into tiles. Counts are of the visual tokens that the model
    reads, without padding and without the newlines at the ends of rows.

    - `budget`: the tiles of an "image" share its budget, the highest scores first; or each "tile" gets a
      share in proportion to its tokens.
    - `newline`: "keep" all newlines, or let them "follow" their rows: a row without kept tokens has none.
    - `interpolation`: if OneVision downsamples an image, scores are resampled like the features and tokens
      are selected afterwards ("model"), or tokens are selected without any resampling ("off").

    Raises ValueError for an unsupported model family, inputs other than text and images, placeholders that
    do not match the images, `keep` out of range, a reducer that does not serve the images, a selector
    trained on other features than the model reads, and original positions under FlashAttention, which reads
    the gaps as borders in spite of a cache, or for a language model without position ids.
    """
    policy = Policy(keep, positions, budget, newline, bounds)
    check_choice("interpolation", interpolation)
    check_positions(model, positions)
    reducer = as_reducer(reducer)
    check_reducer(model, reducer, positions)
    if "pixel_values" not in inputs:
        return Reduced(shorten(model, inputs, [], [], positions))
    prepared = prepare(model, inputs, interpolation, reducer.needs)
    kept = select_tokens(reducer, prepared.encoded, prepared.layout, policy)
    return prepared.keep_tokens(kept, reducer, policy)


@dataclass(frozen=True)
class Prepared:
    """A processed input whose images are encoded and projected once, for all reducers and budgets.

    `tokens` are the packed tokens (P, D) of each image. `image_of` is the image of each run of placeholders,
    because an image may be shown more than once.
    """

    model: Any
    inputs: Mapping[str, Any]
    layout: TileLayout
    encoded: EncoderOutput
    tokens: list[Tensor]
    image_of: Sequence[int]

    def reduce(self, reducer: Reducer | FeatureSelector, policy: Policy) -> Reduced:
        """The input shortened under a policy; result and errors as in `atr.vlm.reduce.reduce`."""
        reducer = as_reducer(reducer)
        has_text = self.encoded.text_BD is not None or "text_BD" not in reducer.needs
        prepared = self if has_text else self.with_text()
        return prepared.keep_tokens(prepared.choose(reducer, policy), reducer, policy)

    def choose(self, reducer: Reducer | FeatureSelector, policy: Policy) -> list[Tensor]:
        """Indices kept of the packed tokens of each encoded image, without newlines; int64 (K,) each."""
        reducer = as_reducer(reducer)
        check_reducer(self.model, reducer, policy.positions)
        return select_tokens(reducer, self.encoded, self.layout, policy)

    def keep_tokens(self, kept: Sequence[Tensor], reducer: Reducer, policy: Policy) -> Reduced:
        """The input with the `kept` tokens (K,) of each encoded image, which `choose` gave for `reducer`."""
        tokens = self._merge(reducer, kept) if isinstance(reducer, Merger) else self.tokens
        with_newlines = self.layout.with_newlines(list(kept), policy.newline)
        report = [
            Kept(len(kept_K), of, len(all_K) - len(kept_K), all_K)
            for kept_K, all_K, of in zip(kept, with_newlines, self.layout.sizes, strict=True)
        ]
        shorter = shorten(
            self.model,
            self.inputs,
            [tokens[image] for image in self.image_of],
            [with_newlines[image] for image in self.image_of],
            policy.positions,
        )
        return Reduced(shorter, tuple(report[image] for image in self.image_of), tuple(self.image_of))

    def with_text(self) -> Self:
        """The same with `text_BD`, and with a separate image for each run of placeholders.

        Raises ValueError if a row has an image and no text.
        """
        tiling, image_of = self.layout.tiling, self.image_of
        first = [0, *itertools.accumulate(tiling.tiles)]
        tiles = [tile for image in image_of for tile in range(first[image], first[image + 1])]
        counts = tuple(tiling.tiles[image] for image in image_of)
        sizes = None if tiling.sizes is None else [tiling.sizes[image] for image in image_of]
        arrangements = tuple(tiling.arrangements[image] for image in image_of) if tiling.arrangements else ()
        repeats_R = torch.tensor(counts, device=self.encoded.features_BND.device)
        text_BD = self._embed_text().repeat_interleave(repeats_R, 0)
        return replace(
            self,
            layout=replace(self.layout, tiling=Tiling(counts, tiling.grid, sizes, arrangements)),
            encoded=replace(self.encoded.of(tiles), text_BD=text_BD),
            tokens=[self.tokens[image] for image in image_of],
            image_of=range(len(image_of)),
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

    def _merge(self, merger: Merger, kept: Sequence[Tensor]) -> list[Tensor]:
        """The tokens of each image of one tile, with the merged tokens in the places of the kept ones."""
        tokens = [features_PD.clone() for features_PD in self.tokens]
        counts = [len(kept_K) for kept_K in kept]
        for count in sorted(set(counts) - {0}):
            images = [image for image, own in enumerate(counts) if own == count]
            keep_BK, merged_BKD = select_merged(merger, self.encoded.of(images), count)
            for image, keep_K, merged_KD in zip(
                images, keep_BK, project(self.model, merged_BKD), strict=True
            ):
                tokens[image][keep_K] = merged_KD
        return tokens


def prepare(
    model: Any,
    inputs: Mapping[str, Any],
    interpolation: str = "model",
    needs: Collection[str] = frozenset(),
) -> Prepared:
    """Encode the images of a processor's output, to reduce it more than once; errors as in `reduce`.

    `needs` are the optional fields of EncoderOutput that the reducers need.
    """
    check_choice("interpolation", interpolation)
    _check_keys(model, inputs)
    if "pixel_values" not in inputs:
        raise ValueError("inputs: pixel_values is missing, there is no image to encode")
    tiling = family_of(model).tiling(model, inputs)
    layout = TileLayout(model, tiling)
    image_bounds(placeholders(model, inputs), layout.lengths)  # before the tower runs
    if interpolation == "off":
        unresampled = TileLayout(model, tiling, resample=False)
        inputs = _widen(model, inputs, layout.lengths, unresampled.lengths)
        layout = unresampled
    encoded = encode(model, inputs, tiling, needs)
    prepared = Prepared(model, inputs, layout, encoded, layout.tokens(encoded), range(len(tiling.tiles)))
    return prepared.with_text() if "text_BD" in needs else prepared


def shorten(
    model: Any,
    inputs: Mapping[str, Any],
    image_features: Sequence[Tensor],
    keep: Sequence[Tensor],
    positions: str = POSITIONS,
) -> dict[str, Any]:
    """Keep the tokens `keep` (K,) of the `image_features` (P, D) of each image, in order of the placeholders.

    For images that are encoded and projected already. Budgets may differ between images. The result serves
    one call of the model; errors as in `reduce`.
    """
    check_positions(model, positions)
    _check_keys(model, inputs)
    input_ids_BL = inputs["input_ids"]
    real_BL = inputs["attention_mask"].bool()
    stay_BL = _mark_kept(placeholders(model, inputs), real_BL, image_features, keep)
    shorter: dict[str, Any] = {
        "input_ids": pack_left(input_ids_BL, stay_BL, fill=pad_id(model)),
        "attention_mask": pack_left(inputs["attention_mask"], stay_BL, fill=0),
    }
    # If nothing is dropped, the model's own positions are the original ones.
    if positions == "original" and not torch.equal(stay_BL, real_BL):
        position_ids_BL = (real_BL.long().cumsum(1) - 1).clamp(min=0)
        shorter |= {"position_ids": pack_left(position_ids_BL, stay_BL, fill=0), "use_cache": True}
    if image_features:
        kept = [
            features_PD[keep_K.to(features_PD.device)]
            for features_PD, keep_K in zip(image_features, keep, strict=True)
        ]
        shorter["mm_encoder_outputs"] = _encoder_outputs(kept)
    return shorter


def _encoder_outputs(features: Sequence[Tensor]) -> dict[str, Any]:
    return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}


def _check_keys(model: Any, inputs: Mapping[str, Any]) -> None:
    known = TEXT_KEYS | family_of(model).image_keys
    if unknown := sorted(set(inputs) - known):
        raise ValueError(f"inputs: {unknown[0]} cannot be shortened, allowed: {', '.join(sorted(known))}")
    if missing := sorted(TEXT_KEYS - set(inputs)):
        raise ValueError(f"inputs: {missing[0]} is missing, needed: {', '.join(sorted(TEXT_KEYS))}")


def placeholders(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Mask (B, L) of the tokens that stand for visual tokens."""
    placeholder_BL: Tensor = inputs["input_ids"] == model.config.image_token_id
    return placeholder_BL


def image_bounds(placeholder_BL: Tensor, sizes: Sequence[int]) -> Tensor:
    """First placeholder of each image and the end, as indices into all placeholders; int64 (images + 1,)."""
    row_P = placeholder_BL.nonzero()[:, 0]
    if len(row_P) != sum(sizes):
        raise ValueError(
            f"input_ids: {len(row_P)} image placeholders for {sum(sizes)} tokens of {len(sizes)} images; "
            "a placeholder typed in a text counts as well"
        )
    bounds = torch.tensor([0, *itertools.accumulate(sizes)], device=row_P.device)
    if (row_P[bounds[:-1]] != row_P[bounds[1:] - 1]).any():
        raise ValueError("input_ids: the placeholders of one image lie in two rows")
    return bounds


def _mark_kept(
    placeholder_BL: Tensor, real_BL: Tensor, image_features: Sequence[Tensor], keep: Sequence[Tensor]
) -> Tensor:
    """Mask (B, L) of the tokens to keep: all text, the kept tokens of each image, no padding."""
    bounds = image_bounds(placeholder_BL, [len(features_PD) for features_PD in image_features])
    stay_P = torch.zeros(int(bounds[-1]), dtype=torch.bool, device=placeholder_BL.device)
    for start, keep_K in zip(bounds[:-1], keep, strict=True):
        stay_P[start + keep_K.to(stay_P.device)] = True
    return real_BL.masked_scatter(placeholder_BL, stay_P)


def _widen(
    model: Any, inputs: Mapping[str, Any], sizes: Sequence[int], new_sizes: Sequence[int]
) -> dict[str, Any]:
    """The inputs with `new_sizes` placeholders for the images, at least `sizes`; rows left-padded."""
    placeholder_BL = placeholders(model, inputs)
    starts = image_bounds(placeholder_BL, sizes)[:-1]
    more_I = torch.tensor(new_sizes) - torch.tensor(sizes)
    real_BL = inputs["attention_mask"].bool()
    copies_BL = real_BL.long()  # removes the padding; rows are padded anew below
    copies_BL[tuple(placeholder_BL.nonzero()[starts].T)] += more_I.to(copies_BL.device)
    rows = [
        ids_L.repeat_interleave(copies_L)
        for ids_L, copies_L in zip(inputs["input_ids"], copies_BL, strict=True)
    ]
    longest = max(map(len, rows))
    input_ids = [F.pad(row_L, (longest - len(row_L), 0), value=pad_id(model)) for row_L in rows]
    mask = [F.pad(torch.ones_like(row_L), (longest - len(row_L), 0)) for row_L in rows]
    return {**inputs, "input_ids": torch.stack(input_ids), "attention_mask": torch.stack(mask)}


def pack_left(values_BL: Tensor, stay_BL: Tensor, fill: int) -> Tensor:
    """The values of `stay_BL`, each row right-aligned and left-padded with `fill` to the longest row.

    Values may have axes before the rows, (..., B, L), as positions of several axes do.
    """
    lengths_B1 = stay_BL.sum(dim=1, keepdim=True)
    longest = int(lengths_B1.max())
    slot_L = torch.arange(longest, device=values_BL.device)
    packed_BL = values_BL.new_full((*values_BL.shape[:-1], longest), fill)
    packed_BL[..., slot_L >= longest - lengths_B1] = values_BL[..., stay_BL]
    return packed_BL


def pad_id(model: Any) -> int:
    """The padding token's id; 0 if the model has none, because the mask hides padding."""
    configs = (model.generation_config, model.config, model.config.get_text_config())
    known = (getattr(config, "pad_token_id", None) for config in configs)
    return next((number for number in known if number is not None), 0)
