"""Estimates the cost of the current parameters without loading weights or torch."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from atr.cli.disk import Disks
from atr.config.distill import Distill
from atr.config.evaluate import Evaluate
from atr.config.loader import pipeline, validate
from atr.config.prepare import Prepare
from atr.config.presets import EncoderPreset, VlmPreset
from atr.config.pretrain import Pretrain
from atr.config.robustness import Robustness
from atr.config.selector_training import SelectorTraining
from atr.config.trainer import Trainer
from atr.core import catalog
from atr.core.files import read_json

FEATURE_BYTES = 2
"""Bytes per channel in the feature store: bfloat16."""
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
PIXELS = {"micro": 168 * 168, "coco": 640 * 480}
"""Pixels of a prepared image; for COCO, of the most frequent size."""
PNG_BYTES = 1.7
"""Bytes per pixel of a prepared PNG: the mean over six photographs of scikit-image and scikit-learn."""
DEPLOYMENTS = 17
"""Deployments in stage robustness: the reference and the 16 variants of `atr.vlm.variants`."""
RESTORED = 4
"""Reconstructions of a validation image: from the hard mask, and from the top K at three kept fractions."""


@dataclass(frozen=True)
class FeatureShape:
    """Shape of one image's features: N tokens of D channels."""

    tokens: int
    width: int

    @property
    def bytes(self) -> int:
        """Size in the feature store."""
        return self.tokens * self.width * FEATURE_BYTES


KNOWN = {
    "openai/clip-vit-large-patch14-336": FeatureShape(24 * 24, 1024),
    "openai/clip-vit-large-patch14": FeatureShape(16 * 16, 1024),
    "google/siglip-so400m-patch14-384": FeatureShape(27 * 27, 1152),
    "facebook/dinov2-small": FeatureShape(16 * 16, 384),
    "facebook/dinov2-base": FeatureShape(16 * 16, 768),
}
"""Feature shapes of encoders on the hub, at the image size of their own processors."""


def features_of(path: str) -> FeatureShape | None:
    """Feature shape of an encoder, by its hub id or from its folder's files; None if unknown."""
    name = path.partition("@")[0]  # a revision does not change the shape
    if name in KNOWN or not Path(path).is_dir():
        return KNOWN.get(name)
    try:
        tree = read_json(Path(path, "config.json"))
        vision = tree.get("vision_config", tree)
        height, width = _processed_size(Path(path)) or _pair(vision["image_size"])
        down, right = _pair(vision["patch_size"])
        return FeatureShape((height // down) * (width // right), vision["hidden_size"])
    except (KeyError, TypeError, ValueError):  # no such file or key: another kind of model
        return None


def _processed_size(folder: Path) -> tuple[int, int] | None:
    """(height, width) of the images that the folder's image processor returns; None if it does not say."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            tree = read_json(folder / name)
            processor = tree.get("image_processor", tree)
            crop = processor.get("do_center_crop") and processor.get("crop_size")
            size = crop or processor.get("size")
            return _pair(size) if isinstance(size, int) or "height" in (size or {}) else None
    return None


def _pair(sides: Any) -> tuple[int, int]:
    if isinstance(sides, dict):
        return sides["height"], sides["width"]
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


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
    def of(cls, pretrain: Pretrain, width: int) -> "Autoencoder":
        """The autoencoder with these parameters, for features of this width."""
        return cls(width, pretrain.layers, round(pretrain.ffn_ratio * width))

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
    """The costs of a pipeline, from its parameters; `features` is None if the encoder is unknown."""

    encoder: EncoderPreset
    vlm: VlmPreset
    trainer: Trainer
    prepare: Prepare
    pretrain: Pretrain
    distill: Distill
    evaluate: Evaluate
    robustness: Robustness
    features: FeatureShape | None

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
        return round(self.prepare.images * PIXELS.get(self.prepare.source, 0) * PNG_BYTES)

    @property
    def stored_bytes(self) -> int:
        """Bytes written below data/: features of all images, and the estimated prepared images."""
        size = self.features.bytes if self.features else 0
        return (self.prepare.images + self.evaluation_images) * size + self.prepared_bytes


def load_plan(path: str | Path = "params.yaml") -> Plan:
    """The plan of a parameter file; raises ConfigError as the stages do."""
    values = validate(path, pipeline())
    parameters = {field.name: values[field.name] for field in fields(Plan) if field.name in values}
    return Plan(**parameters, features=features_of(values["encoder"].path))


def lines(plan: Plan, disks: Disks) -> Iterator[str]:
    """The plan as text, one cost per line."""
    questions, images = plan.questions, plan.evaluation_images
    yield f"encoder      {plan.encoder.name}: {_shape(plan.features)}"
    yield f"vlm          {plan.vlm.name}: {_tiles(plan)}"
    yield (
        f"images       {plan.prepare.images:,} to pretrain on ({plan.prepare.source}), "
        f"at most {images:,} with questions"
    )
    if plan.features:
        pretrain, evaluate = (_size(count * plan.features.bytes) for count in (plan.prepare.images, images))
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
    if plan.vlm.encoder is None:
        yield f"vlm: only stage distill, which loads it, can tell if it reads features of {plan.encoder.name}"
    if source not in PIXELS:
        yield f"prepare.source: the prepared images of {source} are not counted, as they may have any size"
    if set(plan.prepare.names) & set(BENCHMARK_QUESTIONS):
        yield "prepare.benchmarks: downloads and prepared images of the paper's benchmarks are not counted"
    yield from _short(plan.stored_bytes, disks)


def _unfit_selectors(plan: Plan, width: int) -> Iterator[str]:
    """Warnings of selectors whose heads or positions do not fit the feature width."""
    recipes: dict[str, SelectorTraining] = {"pretrain": plan.pretrain, "distill": plan.distill}
    for name, recipe in recipes.items():
        if width % recipe.heads:
            yield f"{name}.heads: {recipe.heads} does not divide the encoder's width {width}"
        if recipe.position == "sine" and width % 4:
            yield f"{name}.position: 4 does not divide the encoder's width {width}, as sine needs"


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


def _shape(features: FeatureShape | None) -> str:
    if not features:
        return "unknown tokens and width"
    return f"{features.tokens:,} tokens of {features.width:,} channels an image"


def _tiles(plan: Plan) -> str:
    """Tokens per image that the language model reads with all tokens kept, newlines not counted."""
    name, tiles = plan.vlm.name, plan.vlm.tiles
    if plan.vlm.encoder is None or not plan.features:
        return "unknown tokens an image"
    read = SHRUNK.get(name, tiles) if plan.evaluate.interpolation == "model" else tiles
    return f"at most {read * plan.features.tokens:,} tokens an image, {tiles} tile(s)"


def _size(count: int) -> str:
    """Bytes with one to three digits before the point, in powers of 1000."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}"
