"""Shorten the processed input of a vision-language model: visual tokens out, the model object untouched.

The images are encoded outside the model, their dropped tokens leave `input_ids` and `attention_mask`, and the
kept features travel beside them as `mm_encoder_outputs`, which both `forward` and `generate` take (in
transformers >= 5.18).
"""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MODEL_MAPPING
from transformers.modeling_outputs import BaseModelOutputWithPooling

from atr.reduction import EncoderOutput, FeatureSelector, Merger, Reducer, SelectorReducer
from atr.reduction.checked import select_merged
from atr.vlm.checkpoint import check_selector, warn_of_positions
from atr.vlm.families import Tiling, encode, family_of, project
from atr.vlm.policy import POSITIONS, Policy, as_reducer, check_choice, choose_packed
from atr.vlm.tiling import TileLayout

TEXT_KEYS = frozenset({"input_ids", "attention_mask"})


@dataclass(frozen=True)
class Kept:
    """What stayed of one image: `tokens` of its `of` visual tokens, and `newlines`, which do not count.

    `indices_K` says which, newlines among them, in the order in which the language model is fed the image.
    """

    tokens: int
    of: int
    newlines: int
    indices_K: Tensor


@dataclass(frozen=True)
class Reduced(Mapping[str, Any]):
    """A shorter input for `model(**reduced)` and `model.generate(**reduced)`, as often as wanted.

    `kept` reports each image, in the order of the placeholders.
    """

    inputs: dict[str, Any]
    kept: tuple[Kept, ...] = ()

    def __getitem__(self, key: str) -> Any:
        # With beams, generate() repeats the features inside the very object it is given.
        fresh = key == "mm_encoder_outputs"
        return _encoder_outputs(self.inputs[key]["image"].pooler_output) if fresh else self.inputs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Prepared:
    """A processed input whose images are encoded and projected once, for all reducers and budgets.

    `image_of` says which of these images each run of placeholders shows, as one may be shown more than once.
    """

    model: Any
    inputs: Mapping[str, Any]
    packing: TileLayout
    encoded: EncoderOutput
    tokens: list[Tensor]
    image_of: Sequence[int]

    def reduce(self, reducer: Reducer | FeatureSelector, policy: Policy) -> Reduced:
        """The shorter input under one policy; result and errors as in `atr.vlm.reduce.reduce`."""
        asked = as_reducer(reducer)
        if "text_BD" in asked.needs and self.encoded.text_BD is None:
            return self.asked().reduce(asked, policy)
        kept = self.choose(asked, policy)
        tokens = self._merged(asked, kept) if isinstance(asked, Merger) else self.tokens
        stay = self.packing.with_newlines(kept, policy.newline)
        report = [
            Kept(len(kept_K), of, len(stay_K) - len(kept_K), stay_K)
            for kept_K, stay_K, of in zip(kept, stay, self.packing.sizes, strict=True)
        ]
        shorter = shorten(
            self.model,
            self.inputs,
            [tokens[image] for image in self.image_of],
            [stay[image] for image in self.image_of],
            policy.positions,
        )
        return Reduced(shorter, tuple(report[image] for image in self.image_of))

    def choose(self, reducer: Reducer | FeatureSelector, policy: Policy) -> list[Tensor]:
        """Indices kept of the packed tokens of each encoded image, without newlines; int64 (K,) each."""
        asked = as_reducer(reducer)
        if isinstance(asked, SelectorReducer):
            check_selector(self.model, asked.selector)
            warn_of_positions(asked.selector, policy.positions)
        return choose_packed(asked, self.encoded, self.packing, policy)

    def asked(self) -> Self:
        """The same with an image of its own for each run of placeholders, and the question it is shown for.

        Raises ValueError where a row with an image has no text.
        """
        tiling, image_of = self.packing.tiling, self.image_of
        first = [0, *itertools.accumulate(tiling.tiles)]
        tiles = [tile for image in image_of for tile in range(first[image], first[image + 1])]
        counts = tuple(tiling.tiles[image] for image in image_of)
        sizes = None if tiling.sizes is None else [tiling.sizes[image] for image in image_of]
        arranged = tuple(tiling.arrangements[image] for image in image_of) if tiling.arrangements else ()
        text_RD = self._text().repeat_interleave(
            torch.tensor(counts, device=self.encoded.features_BND.device), 0
        )
        return replace(
            self,
            packing=replace(self.packing, tiling=Tiling(counts, tiling.grid, sizes, arranged)),
            encoded=replace(self.encoded.of(tiles), text_BD=text_RD),
            tokens=[self.tokens[image] for image in image_of],
            image_of=range(len(image_of)),
        )

    def _text(self) -> Tensor:
        """Mean unit embedding of the text behind the images of a row, or of all of its text; one per run."""
        placeholder_BL = _placeholders(self.model, self.inputs)
        real_BL = self.inputs["attention_mask"].bool() & ~placeholder_BL
        behind_BL = real_BL & (placeholder_BL.flip(1).cumsum(1).flip(1) == 0)
        read_BL1 = behind_BL.where(behind_BL.any(1, keepdim=True), real_BL)[..., None]
        bounds = _image_of(placeholder_BL, [self.packing.lengths[image] for image in self.image_of])
        row_R = placeholder_BL.nonzero()[bounds[:-1], 0]
        if not read_BL1.any(1)[row_R].all():
            raise ValueError("inputs: a row has an image and no text, which the reducer reads")
        embedding_BLD = self.model.get_input_embeddings()(self.inputs["input_ids"]).float()
        unit_BLD = F.normalize(embedding_BLD, dim=-1) * read_BL1
        text_BD: Tensor = unit_BLD.sum(1) / read_BL1.sum(1).clamp_min(1)
        return text_BD[row_R]

    def _merged(self, reducer: Merger, kept: Sequence[Tensor]) -> list[Tensor]:
        """The tokens of each image, of one tile, the merged ones in the places of those that are kept."""
        tokens = [features_PD.clone() for features_PD in self.tokens]
        counts = [len(kept_K) for kept_K in kept]
        for count in sorted(set(counts) - {0}):
            images = [image for image, wanted in enumerate(counts) if wanted == count]
            keep_BK, merged_BKD = select_merged(reducer, self.encoded.of(images), count)
            for image, keep_K, merged_KD in zip(
                images, keep_BK, project(self.model, merged_BKD), strict=True
            ):
                tokens[image][keep_K] = merged_KD
        return tokens


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

    Rows may be padded on either side, hold several images or none; they come back left-padded to the
    longest. `keep="adaptive"` leaves the count to a trained selector, which keeps the tokens of positive
    logit, within `bounds`: fewest and most, as fractions or counts, of an image (of a tile, if `budget` is).

    `positions` are either

    - "original": every token keeps the position it had, and what is generated goes on from there. Without
      mask and cache transformers would take the gaps for borders between packed sequences, so the result asks
      for the cache; a call that says `use_cache=False` beside it raises TypeError; or
    - "contiguous": the model numbers the shorter sequence itself, as it would any prompt.

    A selector whose record says that it was taught and evaluated under the other ones is warned of.

    The rest concerns models that cut an image into tiles. What counts are the visual tokens that the model is
    fed: neither padding, which is cut off before, nor the newlines at the ends of rows.

    - `budget`: the tiles of an "image" share its budget, the best tokens first; or each "tile" gets its share
      of it, in proportion to its tokens.
    - `newline`: "keep" all of them, or let them "follow" the rows, so that one goes where its whole row goes.
    - `interpolation`: where OneVision shrinks large images, scores are resampled with the features and tokens
      chosen afterwards ("model"); or all tokens are there to choose from, not resampled ("off").

    Raises ValueError for a family of models without host, an input this cannot shorten, placeholders that do
    not match the images, `keep` out of range, a reducer that cannot do what is asked, a selector trained on
    other features than the model reads, and original positions under FlashAttention, which looks for packed
    sequences in spite of a cache, or of a language model that takes none.
    """
    policy = Policy(keep, positions, budget, newline, bounds)
    check_choice("interpolation", interpolation)
    check_positions(model, positions)
    asked = as_reducer(reducer)
    if isinstance(asked, SelectorReducer):
        check_selector(model, asked.selector)
    if "pixel_values" not in inputs:
        return Reduced(shorten(model, inputs, [], [], positions))
    return prepare(model, inputs, interpolation, asked.needs).reduce(asked, policy)


def prepare(
    model: Any,
    inputs: Mapping[str, Any],
    interpolation: str = "model",
    needs: Collection[str] = frozenset(),
) -> Prepared:
    """Encode the images of a processor's output, to reduce it more than once; errors as in `reduce`.

    `needs` are those of all reducers it is for: attention, keys and pixels are not there for others.
    """
    check_choice("interpolation", interpolation)
    _check(model, inputs)
    if "pixel_values" not in inputs:
        raise ValueError("inputs: pixel_values is missing, there is no image to encode")
    tiling = family_of(model).tiling(model, inputs)
    packing = TileLayout(model, tiling)
    _image_of(_placeholders(model, inputs), packing.lengths)
    if interpolation == "off":
        unresampled = TileLayout(model, tiling, resample=False)
        inputs = _widen(model, inputs, packing.lengths, unresampled.lengths)
        packing = unresampled
    encoded = encode(model, inputs, tiling, needs)
    return Prepared(model, inputs, packing, encoded, packing.tokens(encoded), range(len(tiling.tiles)))


def shorten(
    model: Any,
    inputs: Mapping[str, Any],
    image_features: Sequence[Tensor],
    keep: Sequence[Tensor],
    positions: str = POSITIONS,
) -> dict[str, Any]:
    """Keep the tokens `keep` (K,) of the `image_features` (N, D) of each image, in order of the placeholders.

    For images that were encoded and projected before. Budgets may differ between images. The result serves
    one call; errors as in `reduce`.
    """
    check_positions(model, positions)
    _check(model, inputs)
    input_ids_BL = inputs["input_ids"]
    real_BL = inputs["attention_mask"].bool()
    stay_BL = _stay(_placeholders(model, inputs), real_BL, image_features, keep)
    shorter: dict[str, Any] = {
        "input_ids": _pack_left(input_ids_BL, stay_BL, fill=_pad_id(model)),
        "attention_mask": _pack_left(inputs["attention_mask"], stay_BL, fill=0),
    }
    # Where nothing was dropped, the model's own numbering is the original one.
    if positions == "original" and not torch.equal(stay_BL, real_BL):
        position_ids_BL = (real_BL.long().cumsum(1) - 1).clamp(min=0)
        shorter |= {"position_ids": _pack_left(position_ids_BL, stay_BL, fill=0), "use_cache": True}
    if image_features:
        kept = [
            features_ND[keep_K.to(features_ND.device)]
            for features_ND, keep_K in zip(image_features, keep, strict=True)
        ]
        shorter["mm_encoder_outputs"] = _encoder_outputs(kept)
    return shorter


def _encoder_outputs(features: Sequence[Tensor]) -> dict[str, Any]:
    return {"image": BaseModelOutputWithPooling(pooler_output=list(features))}


def check_positions(model: Any, positions: str) -> None:
    """Raise ValueError for original positions of a model that would misread them or takes none."""
    check_choice("positions", positions)
    if positions != "original":
        return
    text = model.config.get_text_config()
    if "flash" in str(text._attn_implementation):
        raise ValueError(
            f"positions: original is not safe under {text._attn_implementation}, allowed: contiguous"
        )
    # By the class of its configuration: the object's own method may have been wrapped or compiled.
    if "position_ids" not in signature(MODEL_MAPPING[type(text)].forward).parameters:
        raise ValueError(f"positions: original is not known to {text.model_type}, allowed: contiguous")


def _check(model: Any, inputs: Mapping[str, Any]) -> None:
    known = TEXT_KEYS | family_of(model).image_keys
    if unknown := sorted(set(inputs) - known):
        raise ValueError(f"inputs: {unknown[0]} cannot be shortened, allowed: {', '.join(sorted(known))}")
    if missing := sorted(TEXT_KEYS - set(inputs)):
        raise ValueError(f"inputs: {missing[0]} is missing, needed: {', '.join(sorted(TEXT_KEYS))}")


def _placeholders(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    placeholder_BL: Tensor = inputs["input_ids"] == model.config.image_token_id
    return placeholder_BL


def _image_of(placeholder_BL: Tensor, sizes: Sequence[int]) -> Tensor:
    """Where the placeholders of each image begin, as an index into all of them, row by row; (images + 1,)."""
    row_P = placeholder_BL.nonzero()[:, 0]
    if len(row_P) != sum(sizes):
        raise ValueError(
            f"input_ids: {len(row_P)} image placeholders for {sum(sizes)} tokens of {len(sizes)} images; "
            "one that is typed in a text counts as well"
        )
    bounds = torch.tensor([0, *itertools.accumulate(sizes)], device=row_P.device)
    if (row_P[bounds[:-1]] != row_P[bounds[1:] - 1]).any():
        raise ValueError("input_ids: the placeholders of one image lie in two rows")
    return bounds


def _stay(
    placeholder_BL: Tensor, real_BL: Tensor, image_features: Sequence[Tensor], keep: Sequence[Tensor]
) -> Tensor:
    """Which tokens of the full sequences stay: the text, of each image the kept ones, none of the padding."""
    bounds = _image_of(placeholder_BL, [len(features_ND) for features_ND in image_features])
    stay_P = torch.zeros(int(bounds[-1]), dtype=torch.bool, device=placeholder_BL.device)
    for start, keep_K in zip(bounds[:-1], keep, strict=True):
        stay_P[start + keep_K.to(stay_P.device)] = True
    return real_BL.masked_scatter(placeholder_BL, stay_P)


def _widen(
    model: Any, inputs: Mapping[str, Any], sizes: Sequence[int], wanted: Sequence[int]
) -> dict[str, Any]:
    """The inputs with as many placeholders for each image as `wanted`, never fewer; rows left-padded."""
    placeholder_BL = _placeholders(model, inputs)
    starts = _image_of(placeholder_BL, sizes)[:-1]
    more_I = torch.tensor(wanted) - torch.tensor(sizes)
    real_BL = inputs["attention_mask"].bool()
    copies_BL = real_BL.long()  # padding goes, and comes back as wide as needed
    copies_BL[tuple(placeholder_BL.nonzero()[starts].T)] += more_I.to(copies_BL.device)
    rows = [
        ids_L.repeat_interleave(copies_L)
        for ids_L, copies_L in zip(inputs["input_ids"], copies_BL, strict=True)
    ]
    longest = max(map(len, rows))
    input_ids = [F.pad(row_L, (longest - len(row_L), 0), value=_pad_id(model)) for row_L in rows]
    mask = [F.pad(torch.ones_like(row_L), (longest - len(row_L), 0)) for row_L in rows]
    return {**inputs, "input_ids": torch.stack(input_ids), "attention_mask": torch.stack(mask)}


def _pack_left(values_BL: Tensor, stay_BL: Tensor, fill: int) -> Tensor:
    """The values that stay, each row moved to the right end and filled up on its left to the longest row."""
    lengths_B1 = stay_BL.sum(dim=1, keepdim=True)
    longest = int(lengths_B1.max())
    slot_L = torch.arange(longest, device=values_BL.device)
    packed_BL = values_BL.new_full((len(values_BL), longest), fill)
    packed_BL[slot_L >= longest - lengths_B1] = values_BL[stay_BL]
    return packed_BL


def _pad_id(model: Any) -> int:
    """The padding token's id; where a model has none, any will do, because the mask hides it."""
    configs = (model.generation_config, model.config, model.config.get_text_config())
    return next((config.pad_token_id for config in configs if config.pad_token_id is not None), 0)
