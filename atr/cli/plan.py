"""Estimates the cost of the current parameters without loading weights or torch."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from atr.cli.disk import Disks
from atr.cli.image_tokens import FeatureShape, NativeResolution, features_of, resolution_of
from atr.cli.model_sizes import decoder_of, prefill_saved
from atr.config.distill import Distill
from atr.config.evaluate import Evaluate
from atr.config.extract import Extract
from atr.config.loader import pipeline, validate
from atr.config.prepare import Prepare
from atr.config.presets import EncoderPreset, VlmPreset
from atr.config.pretrain import Pretrain
from atr.config.robustness import Robustness
from atr.config.selector_training import SelectorTraining
from atr.config.trainer import Trainer
from atr.core import catalog

BENCHMARK_QUESTIONS = {
    "textvqa": 5_000,
    "docvqa": 5_349,
    "infovqa": 2_801,
    "chartqa": 2_500,
    "ocrbench": 1_000,
    "mmbench": 4_329,
    "ai2d": 3_088,
    "gqa": 12_578,
    "mmmu": 900,
    "mmstar": 1_500,
    "scienceqa": 2_017,
}
"""Questions of the hub's benchmarks in the splits used, as their files in atr/benchmarks state."""
IMAGES = {"gqa": 398}
"""Distinct images of benchmarks known to have fewer images than questions."""
ROTATIONS = {"mmbench": 4}
"""Maximum number of option orders in which one question is asked."""
SOURCES = {"micro": None, "coco": 117_266}
"""Number of pretraining images in a source; None: no limit."""
SHRUNK = {"llava-onevision-7b": 10}
"""Maximum tokens of a model that shrinks its grid, in tiles: nine (`anyres_max_9`) and the base tile."""
PREPARED_SIZES = {"micro": (168, 168), "coco": (640, 480)}
"""(width, height) in pixels of a prepared image; for COCO, the most frequent size."""
PHOTOGRAPH = PREPARED_SIZES["coco"]
"""(width, height) that stands for the images of a folder where tokens depend on it."""
PNG_BYTES = 1.7
"""Bytes per pixel of a prepared PNG: the mean over six photographs of scikit-image and scikit-learn."""
DEPLOYMENTS = 17
"""Deployments in stage robustness: the reference and the 16 variants of `atr.vlm.variants`."""
SERVED = 0.25
"""Kept fraction at which the cost of selection is compared with the prefill that it saves."""
WORTH = 0.05
"""Share of the saved prefill that selection may cost; more is a warning."""
RESTORED = 4
"""Reconstructions of a validation image: from the hard mask, and from the top K at three kept fractions."""


@dataclass(frozen=True)
class Autoencoder:
    """Sizes of selector and reconstructor at width D, of `pretrain.layers` layers each.

    A layer has weights of 4 D^2 (query, key, value, out) and 2 D F (feed-forward), F = ffn_ratio D, biases of
    5 D + F, and two norms of 2 D. A norm and a head of O outputs follow, D O + O: O is 1 in the selector, D
    in the reconstructor. The vector E_masked has D.
    """

    width: int
    layers: int
    hidden: int

    @classmethod
    def of(cls, recipe: SelectorTraining, width: int) -> "Autoencoder":
        """The autoencoder with these parameters, for features of this width."""
        return cls(width, recipe.layers, round(recipe.ffn_ratio * width))

    @property
    def selector(self) -> int:
        """Parameters of the selector."""
        return self._with_head(1)

    @property
    def reconstructor(self) -> int:
        """Parameters of the reconstructor."""
        return self._with_head(self.width)

    @property
    def parameters(self) -> int:
        """All trained parameters."""
        return self.selector + self.reconstructor + self.width

    def _with_head(self, outputs: int) -> int:
        width, hidden = self.width, self.hidden
        layer = 4 * width**2 + 2 * width * hidden + 9 * width + hidden
        return self.layers * layer + 2 * width + (width + 1) * outputs

    def forward_flops(self, tokens: int, outputs: int) -> int:
        """FLOPs of one image of N tokens with a head of O outputs; a multiply-add counts as two.

        N (layers (8 D^2 + 4 D F + 4 N D) + 2 D O): two per token for every weight of the linear layers, and
        2 N D per token for each of attention's two matrix products. Norms, softmax and biases are left out.
        """
        width = self.width
        layer = 8 * width**2 + 4 * width * self.hidden + 4 * tokens * width
        return tokens * (self.layers * layer + 2 * width * outputs)

    def training_flops(self, tokens: int, training: int, validation: int) -> int:
        """FLOPs of one epoch over these numbers of images.

        With S and R the forward FLOPs of selector and reconstructor, a training image costs 3 (S + R), as the
        backward pass costs twice the forward one; a validation image costs S + 4 R (see RESTORED).
        """
        selector, reconstructor = (self.forward_flops(tokens, outputs) for outputs in (1, self.width))
        return training * 3 * (selector + reconstructor) + validation * (selector + RESTORED * reconstructor)


@dataclass(frozen=True)
class Plan:
    """The costs of a pipeline, from its parameters."""

    encoder: EncoderPreset
    vlm: VlmPreset
    trainer: Trainer
    prepare: Prepare
    extract: Extract
    pretrain: Pretrain
    distill: Distill
    evaluate: Evaluate
    robustness: Robustness

    @property
    def image(self) -> tuple[int, int]:
        """(width, height) in pixels of a typical pretraining image."""
        return PREPARED_SIZES.get(self.prepare.source, PHOTOGRAPH)

    @property
    def resolution(self) -> NativeResolution | None:
        """How the encoder resizes images if tokens depend on their size; else None."""
        return resolution_of(self.encoder)

    @property
    def features(self) -> FeatureShape | None:
        """Features of a typical pretraining image; None if the encoder is unknown."""
        return features_of(self.encoder, self.extract.layer, self.image)

    @property
    def largest(self) -> FeatureShape | None:
        """Features of the largest image; None if the encoder is unknown."""
        features, resolution = self.features, self.resolution
        return replace(features, tokens=resolution.largest) if features and resolution else features

    @property
    def tiles(self) -> int:
        """Maximum tokens of an image that the language model reads, in tiles of the encoder's tokens."""
        shrinks = self.evaluate.interpolation == "model"
        return SHRUNK.get(self.vlm.name, self.vlm.tiles) if shrinks else self.vlm.tiles

    @property
    def questions(self) -> dict[str, int]:
        """Maximum number of questions of each benchmark."""
        limit = self.prepare.questions
        return {
            name: min(BENCHMARK_QUESTIONS.get(name, limit), limit * ROTATIONS.get(name, 1))
            for name in self.prepare.names
        }

    @property
    def evaluation_images(self) -> int:
        """Maximum number of distinct images of the questions; of an MMMU question only the first counts."""
        return sum(min(count, IMAGES.get(name, count)) for name, count in self.questions.items())

    @property
    def trials(self) -> dict[str, int]:
        """How many times each reducer answers every question."""
        return {name: self._trials(name) for name in self.evaluate.names}

    def _trials(self, reducer: str) -> int:
        if reducer not in self.evaluate.budgeted:
            return 1
        draws = self.evaluate.random_seeds if catalog.reducer_traits(reducer).draws else 1
        return len(self.evaluate.keep) * draws

    @property
    def answers(self) -> int:
        """Answers that the vision-language model generates in stage evaluate."""
        return sum(self.questions.values()) * sum(self.trials.values())

    @property
    def compared_answers(self) -> int:
        """Maximum number of answers generated in stage robustness, with all tokens and with fewer."""
        limit = self.robustness.questions
        questions = sum(min(count, limit * ROTATIONS.get(name, 1)) for name, count in self.questions.items())
        reducers = [name for name in self.evaluate.budgeted if not catalog.reducer_traits(name).draws]
        return questions * (1 + len(reducers) * len(self.robustness.keep)) * DEPLOYMENTS

    @property
    def split(self) -> tuple[int, int]:
        """Numbers of training and validation images of stage pretrain."""
        held_out = max(1, round(self.pretrain.validation * self.prepare.images))
        return self.prepare.images - held_out, held_out

    @property
    def processes(self) -> int:
        """Devices on all machines; 1 if `trainer.devices` does not give a number."""
        devices = self.trainer.devices
        count = len(devices) if isinstance(devices, list) else devices
        return count * self.trainer.num_nodes if isinstance(count, int) and count > 0 else 1

    @property
    def steps(self) -> int:
        """Optimizer steps of stage pretrain; each device drops the last, incomplete batch of its share."""
        return self.pretrain.epochs * (self.split[0] // self.processes // self.pretrain.batch_size)

    @property
    def prepared_bytes(self) -> int:
        """Estimated bytes of the pretraining images as PNG; 0 for a folder, whose image sizes are unknown."""
        width, height = PREPARED_SIZES.get(self.prepare.source, (0, 0))
        return round(self.prepare.images * width * height * PNG_BYTES)

    @property
    def stored_bytes(self) -> int:
        """Bytes written below data/: features of all images, and the estimated prepared images."""
        sizes = [shape.bytes if shape else 0 for shape in (self.features, self.largest)]
        return self.prepare.images * sizes[0] + self.evaluation_images * sizes[1] + self.prepared_bytes

    def selection_share(self, recipe: SelectorTraining, tokens: int) -> float | None:
        """FLOPs of a selector per image of N tokens, or per tile of so many, over those of the prefill saved.

        At the kept fraction SERVED; None if the language model or the encoder is unknown.
        """
        features, decoder = self.features, decoder_of(self.vlm.path)
        if not (features and decoder):
            return None
        read = self.tiles * tokens
        spent = self.tiles * Autoencoder.of(recipe, features.width).forward_flops(tokens, 1)
        return spent / prefill_saved(decoder, read, round(SERVED * read))


def load_plan(path: str | Path = "params.yaml") -> Plan:
    """The plan of a parameter file; raises ConfigError as the stages do."""
    values = validate(path, pipeline())
    parameters = {field.name: values[field.name] for field in fields(Plan) if field.name in values}
    return Plan(**parameters)


def lines(plan: Plan, disks: Disks) -> Iterator[str]:
    """The plan as text, one cost per line."""
    questions, images = plan.questions, plan.evaluation_images
    yield f"encoder      {plan.encoder.name}: {_shape(plan)}"
    if plan.resolution:
        yield f"pixels       {_bounds(plan.resolution)}"
    yield f"vlm          {plan.vlm.name}: {_tiles(plan)}"
    yield from _selection(plan)
    yield (
        f"images       {plan.prepare.images:,} to pretrain on ({plan.prepare.source}), "
        f"at most {images:,} with questions"
    )
    if plan.features and plan.largest:
        pretrain = _size(plan.prepare.images * plan.features.bytes)
        evaluate = _size(images * plan.largest.bytes)
        yield f"features     {pretrain} for pretraining, at most {evaluate} for evaluation, bfloat16"
        yield from _training(plan, plan.features)
    taught = min(plan.distill.images, plan.prepare.images)
    yield (
        f"distilling   {taught:,} images x {plan.distill.epochs} epochs: {plan.vlm.name} answers the prompts "
        "of each, then reads the conversation twice, once backwards"
    )
    trials = ", ".join(f"{name} {count}" for name, count in plan.trials.items())
    yield f"questions    {sum(questions.values()):,}: " + ", ".join(
        f"{name} {count:,}" for name, count in questions.items()
    )
    yield (
        f"answers      {plan.answers:,}: each question under {sum(plan.trials.values())} trials ({trials}); "
        f"{len(plan.evaluate.keep)} kept fractions, {plan.evaluate.random_seeds} seeds"
    )
    compared = f"{plan.compared_answers:,} answers in float32"
    yield f"robustness   at most {compared}, under {DEPLOYMENTS} deployments"
    copies = "linked into DVC's cache" if disks.linked else "and a copy in DVC's cache"
    yield f"disk         {_size(plan.stored_bytes)} in {disks.data} {copies}; free: {_free(disks)}"


def _training(plan: Plan, features: FeatureShape) -> Iterator[str]:
    size = Autoencoder.of(plan.pretrain, features.width)
    training, validation = plan.split
    flops = plan.pretrain.epochs * size.training_flops(features.tokens, training, validation)
    batch = plan.processes * plan.pretrain.batch_size
    yield (
        f"autoencoder  {size.parameters:,} parameters: selector {size.selector:,}, "
        f"reconstructor {size.reconstructor:,}"
    )
    yield (
        f"training     {training:,} images x {plan.pretrain.epochs} epochs, {plan.steps:,} steps: "
        f"{batch:,} images a step on {plan.processes} device(s), {flops:.2e} FLOPs"
    )


def warnings(plan: Plan, disks: Disks) -> Iterator[str]:
    """What a stage would refuse, what the disk cannot hold, and what the plan does not count."""
    source = plan.prepare.source
    available = SOURCES.get(source)
    if available and plan.prepare.images > available:
        yield f"prepare.images: {source} holds {available:,} images, fewer than {plan.prepare.images:,}"
    if plan.split[0] < plan.processes * plan.pretrain.batch_size:
        yield f"pretrain.batch_size: {plan.split[0]:,} images are fewer than one batch per device"
    if not plan.features:
        yield f"encoder: tokens and width of {plan.encoder.path} are unknown, so features are not counted"
    else:
        yield from _unfit_selectors(plan, plan.features.width)
        yield from _costly_selectors(plan)
    if plan.vlm.encoder is None:
        yield f"vlm: only stage distill, which loads it, can tell if it reads features of {plan.encoder.name}"
    if source not in PREPARED_SIZES:
        yield f"prepare.source: the prepared images of {source} are not counted, as they may have any size"
    if set(plan.prepare.names) & set(BENCHMARK_QUESTIONS):
        yield "prepare.benchmarks: downloads and prepared images of the hub's benchmarks are not counted"
    yield from _short(plan.stored_bytes, disks)


def _unfit_selectors(plan: Plan, width: int) -> Iterator[str]:
    """Warnings of selectors whose heads or positions do not fit the feature width."""
    for name, recipe in _recipes(plan).items():
        if width % recipe.heads:
            yield f"{name}.heads: {recipe.heads} does not divide the encoder's width {width}"
        if recipe.position == "sine" and width % 4:
            yield f"{name}.position: 4 does not divide the encoder's width {width}, as sine needs"


def _costly_selectors(plan: Plan) -> Iterator[str]:
    """Warnings of selectors that cost more than WORTH of the prefill that they save."""
    for name, recipe in _recipes(plan).items():
        share = plan.selection_share(recipe, plan.largest.tokens) if plan.largest else None
        if share is not None and share > WORTH:
            spent = f"{_percent(share)} of the prefill it saves at {_percent(SERVED)} kept"
            yield f"{name}.ffn_ratio, {name}.layers: selection costs {spent}, more than {_percent(WORTH)}"


def _short(needed: int, disks: Disks) -> Iterator[str]:
    if disks.linked and disks.one_disk:
        places = [(f"{disks.data} and DVC's cache", needed, disks.data_free)]
    elif disks.one_disk:
        places = [(f"{disks.data} and DVC's cache, which cannot be linked,", 2 * needed, disks.data_free)]
    else:
        copied = 0 if disks.linked else needed
        places = [(str(disks.data), copied, disks.data_free), (str(disks.cache), needed, disks.cache_free)]
    for place, size, free in places:
        if size > free:
            yield f"disk: {place} need {_size(size)}, {_size(free)} are free"


def _free(disks: Disks) -> str:
    if disks.one_disk:
        return _size(disks.data_free)
    return f"{_size(disks.data_free)}, and {_size(disks.cache_free)} on the disk of {disks.cache}"


def _shape(plan: Plan) -> str:
    if not plan.features:
        return "unknown tokens and width"
    image = "an image" if not plan.resolution else f"for {_pixels(plan.image)}"
    return f"{plan.features.tokens:,} tokens of {plan.features.width:,} channels {image}"


def _pixels(image: tuple[int, int]) -> str:
    return f"an image of {image[0]} x {image[1]} pixels"


def _bounds(resolution: NativeResolution) -> str:
    """What the image processor's bounds of an image's area mean in tokens."""
    side = resolution.side
    return (
        f"{resolution.least:,} to {resolution.most:,} an image (min_pixels, max_pixels), {side} x {side} a "
        f"token: {resolution.fewest:,} to {resolution.largest:,} tokens"
    )


def _tiles(plan: Plan) -> str:
    """Tokens per image that the language model reads with all tokens kept, newlines not counted."""
    if plan.vlm.encoder is None or not plan.largest:
        return "unknown tokens an image"
    return f"at most {plan.tiles * plan.largest.tokens:,} tokens an image, {plan.vlm.tiles} tile(s)"


def _recipes(plan: Plan) -> dict[str, SelectorTraining]:
    return {"pretrain": plan.pretrain, "distill": plan.distill}


def _selection(plan: Plan) -> Iterator[str]:
    """What a selector costs beside the prefill that it saves, at a typical image and at the largest."""
    sizes = {shape.tokens: None for shape in (plan.features, plan.largest) if shape}
    costs: dict[str, list[str]] = {}
    for name, recipe in _recipes(plan).items():
        shares = {tokens: plan.selection_share(recipe, tokens) for tokens in sizes}
        shown = [
            f"{_percent(share)} at {plan.tiles * tokens:,} tokens"
            for tokens, share in shares.items()
            if share is not None
        ]
        if shown:
            costs.setdefault(", ".join(shown), []).append(name)
    for cost, names in costs.items():
        whose = "" if len(costs) == 1 else f", of stage {names[0]}"
        yield f"selection    costs {cost} of the prefill it saves at {_percent(SERVED)} kept, by FLOPs{whose}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _size(count: int) -> str:
    """Bytes with one to three digits before the point, in powers of 1000."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}"
