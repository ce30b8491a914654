"""Greedy answers to questions about images, the visual tokens really removed."""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from atr.core import catalog
from atr.core.records import Question, Reply, Trial
from atr.reduction import Reducer, SelectorReducer
from atr.reduction.layer_schedule import LayerReducer, keep_for, lowest
from atr.reduction.registry import build_reducer, placeholder
from atr.vlm.checkpoint import (
    check_features,
    check_selector,
    cuts_images,
    load_vlm,
    other_images,
    version_of,
    warn_of_positions,
    weight_dtype,
)
from atr.vlm.in_llm import Inside, drop_inside
from atr.vlm.inputs import Features, Images, Prompts, Source, StoredFeatures, WholeInputs
from atr.vlm.policy import ADAPTIVE, Policy
from atr.vlm.reduce import Prepared, check_positions, shorten

if TYPE_CHECKING:
    from atr.config.evaluate import Evaluate
    from atr.config.presets import VlmPreset


@dataclass(frozen=True)
class Batch:
    """Questions with `images` images each, made ready once for all reducers and budgets.

    `blind` holds the prompts without image, `whole` every visual token, None where there is no image.
    """

    images: int
    blind: Mapping[str, Any]
    whole: Prepared | None


@dataclass(frozen=True)
class Generator:
    """A frozen model that answers questions by greedy decoding, seeing images as a source gives them."""

    model: Any
    processor: Any
    source: Source
    settings: "Evaluate"
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """What answers depend on beside settings and precision, for results to record: the attention kernel, the
    model's version, and what the stored features were computed in (None where the images are read)."""

    @classmethod
    def load(
        cls,
        vlm: "VlmPreset",
        precision: int | str,
        device: torch.device,
        images: Callable[[], Images],
        features: Callable[[], Features],
        settings: "Evaluate",
        locate: Callable[[str], str] = str,
    ) -> Self:
        """The model on a device, its weights in a Lightning precision, and the source of its visual tokens.

        That is `features` where the model is to be given them and reads whole images, preprocessed as theirs
        were, else `images`; only what is needed is opened. `locate` is that of `load_vlm`. Raises ValueError
        for what `load_vlm` refuses, positions that the model cannot have, and features that it does not read.
        """
        model, processor = load_vlm(vlm.path, weight_dtype(precision), locate=locate)
        check_positions(model, settings.positions)
        model = model.to(device)
        if cuts_images(model) or not vlm.stored:
            source: Source = WholeInputs(model, processor, images(), settings.interpolation)
            computed = None
        else:
            store = features()
            check_features(model, store.manifest)
            if differing := other_images(processor, store.manifest):
                print(f"{vlm.path}: the stored features are not taken: {differing}", file=sys.stderr)
                source, computed = WholeInputs(model, processor, images(), settings.interpolation), None
            else:
                source = StoredFeatures(model, processor, store, cache(images))
                computed = store.manifest["resolved"]
        resolved = {
            "attention": str(model.config.get_text_config()._attn_implementation),
            "vlm": version_of(vlm.path, model, locate),
            "features": computed,
        }
        return cls(model, processor, source, settings, resolved)

    def reducer(self, name: str, seed: int, selector: str | Path) -> Reducer | LayerReducer:
        """A reducer by its name, its weights on the device of the model.

        Raises ValueError, before anything is asked, for a selector of other features than the model reads,
        and for a reducer of ONE_TILE where the model cuts images into tiles.
        """
        if catalog.reducer_traits(name).one_tile and cuts_images(self.model):
            allowed = ", ".join(
                other for other in catalog.reducers() if not catalog.reducer_traits(other).one_tile
            )
            raise ValueError(
                f"reducer {name} cannot serve {self.model.config.model_type}, which cuts images into tiles, "
                f"allowed: {allowed}"
            )
        with self.model.device:
            reducer = build_reducer(name, seed, selector)
        if isinstance(reducer, SelectorReducer):
            check_selector(self.model, reducer.selector)
            warn_of_positions(reducer.selector, self.settings.positions)
        return reducer

    def reachable(self, name: str, keeps: Sequence[float]) -> list[float]:
        """Of these kept fractions those that a reducer can keep, which is all before the language model.

        Inside it a fraction is a mean over the layers, of which the first read every token. Raises ValueError
        where none can be kept, and for a language model of too few layers.
        """
        reducer = build_reducer(name, 0, placeholder())
        if not isinstance(reducer, LayerReducer):
            return list(keeps)
        found = [keep for keep in keeps if keep_for(reducer, keep, self._layers, self._tile) is not None]
        if not found:
            raise self._too_low(reducer, max(keeps))
        return found

    def batches(self, questions: Sequence[Question], size: int) -> list[list[int]]:
        """Indices of the questions, at most `size` together, all of a batch with equally many images.

        Where the source does not pad, their prompts are equally long too: an answer then cannot depend on the
        questions beside it. Where it does, padding changes an answer by no more than rounding can.
        """
        prompts = Prompts(self.processor)
        keys = [(len(asked.images), prompts.length(asked.question)) for asked in questions]
        order = sorted(range(len(questions)), key=keys.__getitem__)
        alike = [key[:1] if self.source.pads else key for key in keys]
        groups = [list(group) for _, group in groupby(order, key=alike.__getitem__)]
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    @torch.inference_mode()
    def prepare(
        self,
        images: Sequence[Sequence[str]],
        questions: Sequence[str],
        needs: Collection[str] = frozenset(),
    ) -> Batch:
        """Encode and project the images, write the prompts: what all budgets of the reducers share."""
        prompts = Prompts(self.processor)
        blind = prompts.tokenize((prompts.text(text, 0) for text in questions), self.model.device)
        (count,) = {len(names) for names in images}
        whole = self.source.prepare(images, questions, needs) if count else None
        return Batch(count, shorten(self.model, blind, [], [], self.settings.positions), whole)

    @torch.inference_mode()
    def answer(self, batch: Batch, reducer: Reducer | LayerReducer, keep: float | None) -> list[Reply]:
        """The answer to each question, with its visual tokens: kept, fed with newlines, and in all.

        Where `keep` is None the reducer says how many an image needs, one at least. A budget of no token is a
        prompt without image: its placeholder is left out, and no reducer is asked. Inside the language model
        `keep` and both counts are means over the layers; raises ValueError for one that is not reachable.
        """
        if batch.whole is None:
            return [Reply(answer, 0, 0, 0) for answer in self._generate(batch.blind)]
        sizes = [batch.whole.packing.sizes[image] for image in batch.whole.image_of]
        of = _by_question(sizes, batch.images)
        if keep == 0:
            return [
                Reply(answer, 0, 0, size)
                for answer, size in zip(self._generate(batch.blind), of, strict=True)
            ]
        if isinstance(reducer, LayerReducer):
            with self._dropping(batch.whole, reducer, keep) as inside:
                answers = self._generate(inside.whole)
            counts = [_by_question(each, batch.images) for each in (inside.tokens, inside.fed)]
            return list(starmap(Reply, zip(answers, *counts, of, strict=True)))
        shorter = batch.whole.reduce(reducer, self._policy(keep))
        tokens = _by_question([kept.tokens for kept in shorter.kept], batch.images)
        fed = _by_question([kept.tokens + kept.newlines for kept in shorter.kept], batch.images)
        placeholders_B = (shorter["input_ids"] == self.model.config.image_token_id).sum(1).tolist()
        assert fed == placeholders_B, "fed is what was kept, and newlines"
        return list(starmap(Reply, zip(self._generate(shorter), tokens, fed, of, strict=True)))

    @torch.inference_mode()
    def masks(
        self, asked: Mapping[str, str], reducer: Reducer | LayerReducer, keep: float | None
    ) -> dict[str, Any]:
        """What a picture needs to show the tokens kept of each image: grid, keep, and indices by image.

        `asked` has a question to each image, for reducers that read it. Of an image that is cut into tiles
        these are the tokens of the tile that shows it whole; inside the language model, those that its last
        layer reads.
        """
        kept, grid = {}, None
        # One by one: each was answered about, and so many at once might not fit.
        for image, question in asked.items():
            whole = self.source.prepare([[image]], [question], reducer.needs)
            if "text_BD" in reducer.needs:
                whole = whole.asked()
            (kept_K,) = whole.packing.in_whole_image(self._kept(whole, reducer, keep))
            kept[image], grid = kept_K.tolist(), list(whole.packing.tiling.grid)
        return {"grid": grid, "keep": keep, "masks": kept}

    @property
    def _layers(self) -> int:
        """Layers of the language model."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def _tile(self) -> int:
        """Tokens of a tile, as many as a small image has in all."""
        vision = self.model.config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def _kept(self, whole: Prepared, reducer: Reducer | LayerReducer, keep: float | None) -> list[Tensor]:
        """Indices kept of the packed tokens of each image, each shown once."""
        if not isinstance(reducer, LayerReducer):
            return whole.choose(reducer, self._policy(keep))
        with self._dropping(whole, reducer, keep) as inside:
            self.model(**inside.whole, logits_to_keep=1)
        return [kept.indices_K for kept in inside.kept[max(inside.kept)]]

    def _dropping(
        self, whole: Prepared, reducer: LayerReducer, mean: float | None
    ) -> AbstractContextManager[Inside]:
        """The context in which a layer of the language model reads a fraction of the tokens on average."""
        assert mean is not None, "no reducer inside the language model chooses its count"
        keep = keep_for(reducer, mean, self._layers, self._tile)
        if keep is None:
            raise self._too_low(reducer, mean)
        settings = self.settings
        return drop_inside(whole, reducer, keep, settings.positions, settings.budget, settings.newline)

    def _too_low(self, reducer: LayerReducer, mean: float) -> ValueError:
        bound = lowest(reducer, self._layers, self._tile)
        return ValueError(
            f"keep: {mean} is out of reach of {type(reducer).__name__} in {self._layers} layers, "
            f"allowed: {bound:.3f} and more"
        )

    def _policy(self, keep: float | None) -> Policy:
        settings = self.settings
        layout = settings.positions, settings.budget, settings.newline
        return Policy(ADAPTIVE, *layout, bounds=(1, 1.0)) if keep is None else Policy(keep, *layout)

    def _generate(self, inputs: Mapping[str, Any]) -> list[str]:
        ids_BL = self.model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=self.settings.max_new_tokens
        )
        answers_BL = ids_BL[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(answers_BL, skip_special_tokens=True)
        return [text.strip() for text in texts]


@dataclass(frozen=True)
class Reduced:
    """An answerer with what reduces its images: one reducer, made for each seed."""

    answerer: Generator
    reducers: Mapping[int | None, Reducer | LayerReducer]

    @classmethod
    def by(cls, answerer: Generator, name: str, seeds: Iterable[int | None], weights: str | Path) -> Self:
        """By the reducer of this name; `weights` and errors as in `Generator.reducer`."""
        return cls(answerer, {seed: answerer.reducer(name, seed or 0, weights) for seed in seeds})

    def prepare(self, images: Sequence[Sequence[str]], questions: Sequence[str]) -> Batch:
        """As `Generator.prepare`, with what the reducers need."""
        needs = frozenset().union(*(reducer.needs for reducer in self.reducers.values()))
        return self.answerer.prepare(images, questions, needs=needs)

    def answer(self, batch: Batch, trial: Trial) -> list[Reply]:
        """As `Generator.answer`."""
        return self.answerer.answer(batch, self.reducers[trial.seed], trial.keep)

    def masks(self, asked: Mapping[str, str], trial: Trial) -> dict[str, Any]:
        """As `Generator.masks`."""
        return self.answerer.masks(asked, self.reducers[trial.seed], trial.keep)


def _by_question(counts: Sequence[float], images: int) -> list[int]:
    """The sum over the images of each question, rounded where counts are means."""
    return [round(sum(counts[start : start + images])) for start in range(0, len(counts), images)]
