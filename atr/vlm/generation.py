"""Greedy answers to questions about images; the pruned visual tokens are removed from the sequence."""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from torch import Tensor

from atr.core.records import Question, Reply, Trial
from atr.core.serving import serves, serving_reducers
from atr.features.pixel_bounds import bound_area
from atr.reduction import Reducer
from atr.reduction.layer_schedule import LayerReducer, keep_for, lowest
from atr.reduction.registry import build_reducer, placeholder
from atr.vlm.batching import batch_by_tokens
from atr.vlm.checkpoint import load_vlm, version_of, weight_dtype
from atr.vlm.compatibility import (
    check_features,
    check_positions,
    check_reducer,
    cuts_images,
    is_ruled,
    other_images,
)
from atr.vlm.decoding import decode_greedily
from atr.vlm.families import Layer, family_of, supported_types
from atr.vlm.families.table import TABLE
from atr.vlm.image_tokens import ImageTokens
from atr.vlm.in_llm import LayerPruning, prune_layers
from atr.vlm.inputs import FeatureInputs, ImageInputs, ImagesByName, NamedFeatures, Prompts, VisualInputs
from atr.vlm.policy import ADAPTIVE, Policy
from atr.vlm.prefix import split_prompts, why_not_shared
from atr.vlm.processors import read_images
from atr.vlm.reduce import Prepared, layer_of, shorten

if TYPE_CHECKING:
    from atr.config.evaluate import Evaluate
    from atr.config.presets import VlmPreset

_LARGE = Image.new("RGB", (1600, 1200))


@dataclass(frozen=True)
class QuestionBatch:
    """Questions with `images` images each, encoded once for all reducers and budgets."""

    images: int
    blind: Mapping[str, Any]
    """The prompts without image."""
    whole: Prepared | None
    """The prompts with all visual tokens; None if the questions have no image."""


@dataclass(frozen=True)
class Generator:
    """A frozen vision-language model that answers questions by greedy decoding."""

    model: Any
    processor: Any
    source: VisualInputs
    """Prepares the inputs, from stored features or from images."""
    settings: "Evaluate"
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """Recorded with the results, because answers depend on it: the attention kernel, the model's version, and
    how the stored features were computed (None if images are encoded)."""

    @classmethod
    def load(
        cls,
        vlm: "VlmPreset",
        precision: int | str,
        device: torch.device,
        images: Callable[[], ImagesByName],
        features: Callable[[], NamedFeatures],
        settings: "Evaluate",
        resolve_weights: Callable[[str], str] = str,
    ) -> Self:
        """Load the model to a device, with weights in a Lightning precision, and open its inputs.

        Stored `features` are used if the preset allows them, the model reads whole images, and both
        preprocess images alike; otherwise `images`. Only one is opened. `resolve_weights` is that of
        `load_vlm`. Raises ValueError as `load_vlm` does, for positions that the model does not support, and
        for features of another layer or shape than the model reads.
        """
        model, processor = load_vlm(vlm.path, weight_dtype(precision), resolve_weights=resolve_weights)
        bound_area(processor.image_processor, vlm.min_pixels, vlm.max_pixels, vlm.path)
        check_positions(model, settings.positions)
        model = model.to(device)
        source: VisualInputs | None = None
        computed = None
        if vlm.stored and not is_ruled(model) and not cuts_images(model):
            store = features()
            source = _feature_inputs(vlm.path, model, processor, store, images)
            computed = store.manifest["resolved"] if source else None
        source = source or ImageInputs(model, processor, images(), settings.interpolation)
        resolved = {
            "attention": str(model.config.get_text_config()._attn_implementation),
            "vlm": version_of(vlm.path, model, resolve_weights),
            "features": computed,
        }
        if vlm.min_pixels or vlm.max_pixels:
            resolved["pixels"] = {"min_pixels": vlm.min_pixels, "max_pixels": vlm.max_pixels}
        generator = cls(model, processor, source, settings, resolved)
        if settings.share_prefix and generator._obstacle:
            print(f"{vlm.path}: each prompt reads its images anew: {generator._obstacle}", file=sys.stderr)
        return generator

    def reducer(self, name: str, seed: int, selector: str | Path) -> Reducer | LayerReducer:
        """Build a reducer for this model, its weights on the model's device.

        `name` is a built-in one, or the path of the user's file without `.py`. Raises ValueError as
        `build_reducer` does, for a selector trained on features that the model does not read, and for a
        reducer that does not serve the model's family, as `atr.core.serving.serves` says.
        """
        kind, is_cut = self.model.config.model_type, self._cuts_images
        if reason := serves(name, kind, is_cut):
            allowed = ", ".join(serving_reducers(kind, is_cut))
            raise ValueError(f"reducer {name} {reason}, allowed: {allowed}")
        with self.model.device:
            reducer = build_reducer(name, seed, selector)
        self._check_layers(name, reducer)
        check_reducer(self.model, reducer, self.settings.positions)
        return reducer

    def reachable(self, name: str, keeps: Sequence[float]) -> list[float]:
        """The kept fractions that a reducer can reach: all, unless it prunes inside the language model.

        There a fraction is a mean over the layers, and the first layers read every token. Raises ValueError
        if none can be reached, for a language model with too few layers, and for a family that such reducers
        do not serve.
        """
        reducer = build_reducer(name, 0, placeholder())
        if not isinstance(reducer, LayerReducer):
            return list(keeps)
        self._check_layers(name, reducer)
        reached = [keep for keep in keeps if keep_for(reducer, keep, self._layers, self._tile) is not None]
        if not reached:
            raise self._unreachable(reducer, max(keeps))
        return reached

    def _check_layers(self, name: str, reducer: Reducer | LayerReducer) -> None:
        if isinstance(reducer, LayerReducer) and is_ruled(self.model):
            allowed = ", ".join(kind for kind in supported_types() if kind not in TABLE)
            raise ValueError(
                f"reducer {name} prunes between the layers of the language model, which is not supported for "
                f"{self.model.config.model_type}, allowed: {allowed}"
            )

    @cached_property
    def _cuts_images(self) -> bool:
        """Whether images may be cut into tiles; where the model does not say, a large image is tried."""
        if not is_ruled(self.model):
            return cuts_images(self.model)
        text = Prompts(self.processor).text("", 1)
        inputs, _ = read_images(self.processor, [[_LARGE]], [text], return_tensors="pt")
        return family_of(self.model).tiling(self.model, inputs).tiles != (1,)

    def batches(self, questions: Sequence[Question], tokens: int) -> list[list[int]]:
        """Indices of the questions in batches of at most `tokens` tokens, as in `batch_by_tokens`.

        If the source does not pad, an answer does not depend on its batch; otherwise padding changes answers
        by rounding alone.
        """
        lengths = Prompts(self.processor).lengths([question.question for question in questions])
        images = [question.images for question in questions]
        visual = self.source.count_tokens(name for names in images for name in names)
        return batch_by_tokens(images, lengths, visual, tokens, self._shares, self.source.pads)

    @torch.inference_mode()
    def prepare(
        self,
        images: Sequence[Sequence[str]],
        questions: Sequence[str],
        needs: Collection[str] = frozenset(),
        layer: Layer = None,
    ) -> QuestionBatch:
        """Encode and project the images and tokenize the prompts, once for all reducers and budgets.

        `needs` and `layer` are what the reducers read of the images, as in `VisualInputs.prepare`.
        """
        prompts = Prompts(self.processor)
        blind = prompts.tokenize((prompts.text(text, 0) for text in questions), self.model)
        (count,) = {len(names) for names in images}
        whole = self.source.prepare(images, questions, needs, layer) if count else None
        return QuestionBatch(
            count, shorten(self.model, blind, ImageTokens([]), [], self.settings.positions), whole
        )

    @torch.inference_mode()
    def answer(
        self, batch: QuestionBatch, reducer: Reducer | LayerReducer, keep: float | None
    ) -> list[Reply]:
        """Answer each question with the fraction `keep` of its visual tokens.

        If `keep` is None the reducer chooses the count of each image, at least 1. If it is 0 the prompt has
        no placeholder, and no reducer is called. For pruning inside the language model `keep` and the counts
        are means over the layers; raises ValueError for a `keep` that cannot be reached.
        """
        if batch.whole is None:
            return [Reply(text, 0, 0, 0) for text in self._decode(batch.blind)]
        sizes = [batch.whole.layout.sizes[image] for image in batch.whole.image_of]
        full = _sum_by_question(sizes, batch.images)
        if keep == 0:
            answers = self._decode(batch.blind)
            return [Reply(text, 0, 0, size) for text, size in zip(answers, full, strict=True)]
        if isinstance(reducer, LayerReducer):
            answers, kept, fed = self._answer_pruned(batch.whole, reducer, keep)
        else:
            answers, kept, fed = self._answer_reduced(batch.whole, reducer, keep)
        counts = (_sum_by_question(tokens, batch.images) for tokens in (kept, fed))
        return list(starmap(Reply, zip(answers, *counts, full, strict=True)))

    @torch.inference_mode()
    def masks(
        self, questions: Mapping[str, str], reducer: Reducer | LayerReducer, keep: float | None
    ) -> dict[str, Any]:
        """The kept tokens of each image for a picture: grid, keep, and the kept indices by image.

        `questions` maps an image to the question it is shown with, which some reducers read. If the image is
        cut into tiles, the indices are those of the tile of the whole image; for pruning inside the language
        model, those that its last layer reads. Images of different grids have theirs by name in `grids`.
        """
        kept: dict[str, list[int]] = {}
        grids: dict[str, list[int]] = {}
        layer = layer_of(self.model, reducer)
        # One image at a time, as all of them might not fit in memory.
        for image, question in questions.items():
            whole = self.source.prepare([[image]], [question], reducer.needs, layer)
            if "text_BD" in reducer.needs:
                whole = whole.with_text()
            ((kept_K, grid),) = whole.layout.in_whole_image(self._select(whole, reducer, keep))
            kept[image], grids[image] = kept_K.tolist(), list(grid)
        shapes = list(map(list, {tuple(grid) for grid in grids.values()}))
        if len(shapes) > 1:
            return {"grids": grids, "keep": keep, "masks": kept}
        return {"grid": shapes[0] if shapes else None, "keep": keep, "masks": kept}

    @property
    def _layers(self) -> int:
        """Layers of the language model."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def _tile(self) -> int:
        """Tokens per tile of a family with a tower of one image size, as those that LayerReducers serve."""
        vision = self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def _answer_pruned(
        self, whole: Prepared, reducer: LayerReducer, keep: float | None
    ) -> tuple[list[str], Sequence[float], Sequence[float]]:
        """Answers, and the kept and fed tokens of each shown image, pruned between the layers."""
        with self._pruning(whole, reducer, keep) as pruning:
            answers = self._generate(pruning.inputs)
        return answers, pruning.tokens, pruning.fed

    def _answer_reduced(
        self, whole: Prepared, reducer: Reducer, keep: float | None
    ) -> tuple[list[str], Sequence[float], Sequence[float]]:
        """Answers, and the kept and fed tokens of each shown image, reduced before the language model."""
        reduced = whole.reduce(reducer, self._policy(keep))
        kept = [image.tokens for image in reduced.kept]
        fed = [image.tokens + image.newlines for image in reduced.kept]
        placeholders_B = (reduced["input_ids"] == self.model.config.image_token_id).sum(1).tolist()
        fed_B = _sum_by_question(fed, len(fed) // len(placeholders_B))
        assert fed_B == placeholders_B, "the model is fed the kept tokens and newlines"
        return self._decode(reduced, reduced.image_of), kept, fed

    def _select(self, whole: Prepared, reducer: Reducer | LayerReducer, keep: float | None) -> list[Tensor]:
        """Indices kept of the packed tokens of each image, each shown once."""
        if not isinstance(reducer, LayerReducer):
            return whole.choose(reducer, self._policy(keep))
        with self._pruning(whole, reducer, keep) as pruning:
            self.model(**pruning.inputs, logits_to_keep=1)
        return [kept.indices_K for kept in pruning.kept[max(pruning.kept)]]

    def _pruning(
        self, whole: Prepared, reducer: LayerReducer, mean: float | None
    ) -> AbstractContextManager[LayerPruning]:
        """The context in which layers read the fraction `mean` of the tokens on average."""
        assert mean is not None, "no reducer inside the language model chooses its count"
        keep = keep_for(reducer, mean, self._layers, self._tile)
        if keep is None:
            raise self._unreachable(reducer, mean)
        settings = self.settings
        return prune_layers(whole, reducer, keep, settings.positions, settings.budget, settings.newline)

    def _unreachable(self, reducer: LayerReducer, mean: float) -> ValueError:
        bound = lowest(reducer, self._layers, self._tile)
        return ValueError(
            f"keep: {mean} is out of reach of {type(reducer).__name__} in {self._layers} layers, "
            f"allowed: {bound:.3f} and more"
        )

    def _policy(self, keep: float | None) -> Policy:
        settings = self.settings
        layout = settings.positions, settings.budget, settings.newline
        return Policy(ADAPTIVE, *layout, bounds=(1, 1.0)) if keep is None else Policy(keep, *layout)

    def _decode(self, inputs: Mapping[str, Any], image_of: Sequence[int] = ()) -> list[str]:
        """Answers to prompts whose runs of placeholders show `image_of`; a shared prefix is read once."""
        if self._obstacle:
            return self._generate(inputs)
        share = self._shares and len(set(image_of)) < len(image_of)
        split = split_prompts(self.model, inputs, image_of) if share else None
        return self._generate(inputs, custom_generate=partial(decode_greedily, split=split))

    def _generate(self, inputs: Mapping[str, Any], **options: Any) -> list[str]:
        sequences = self.model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=self.settings.max_new_tokens, **options
        )
        answers = [sequence[inputs["input_ids"].shape[1] :] for sequence in sequences]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @cached_property
    def _obstacle(self) -> str:
        """Why the model's cache cannot be shared, so that prompts are answered by its own `generate`."""
        return why_not_shared(self.model)

    @property
    def _shares(self) -> bool:
        return self.settings.share_prefix and not self._obstacle


@dataclass(frozen=True)
class ReducedGenerator:
    """A generator with one reducer, which is built for each seed."""

    generator: Generator
    reducers: Mapping[int | None, Reducer | LayerReducer]

    @classmethod
    def build(cls, generator: Generator, name: str, seeds: Iterable[int | None], weights: str | Path) -> Self:
        """Build the reducer for each seed; `name`, `weights` and errors as in `Generator.reducer`."""
        return cls(generator, {seed: generator.reducer(name, seed or 0, weights) for seed in seeds})

    def prepare(self, images: Sequence[Sequence[str]], questions: Sequence[str]) -> QuestionBatch:
        """As `Generator.prepare`, with the fields of EncoderOutput that the reducer needs."""
        reducers = self.reducers.values()
        needs = frozenset().union(*(reducer.needs for reducer in reducers))
        return self.generator.prepare(images, questions, needs, layer_of(self.generator.model, *reducers))

    def answer(self, batch: QuestionBatch, trial: Trial) -> list[Reply]:
        """As `Generator.answer`, under one trial."""
        return self.generator.answer(batch, self.reducers[trial.seed], trial.keep)

    def masks(self, questions: Mapping[str, str], trial: Trial) -> dict[str, Any]:
        """As `Generator.masks`, under one trial."""
        return self.generator.masks(questions, self.reducers[trial.seed], trial.keep)


def _feature_inputs(
    path: str, model: Any, processor: Any, store: NamedFeatures, images: Callable[[], ImagesByName]
) -> FeatureInputs | None:
    """Inputs from stored features, or None, with a warning, if the model preprocesses images differently."""
    check_features(model, store.manifest)
    if differing := other_images(processor, store.manifest):
        print(f"{path}: the stored features are not used: {differing}", file=sys.stderr)
        return None
    return FeatureInputs(model, processor, store, cache(images))


def _sum_by_question(counts: Sequence[float], images: int) -> list[int]:
    """Sums over the `images` images of each question, rounded, as counts may be means over layers."""
    return [round(sum(counts[start : start + images])) for start in range(0, len(counts), images)]
