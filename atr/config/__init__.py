"""The parameters of the pipeline: one frozen flat dataclass for each section of `params.yaml`.

All is checked before any heavy import. That is why the names of encoders, models, reducers and benchmarks are
written here and not read from their registries; tests hold the two to be the same.
"""

import inspect
import io
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Never, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class ConfigError(ValueError):
    """What a user wrote in the parameter file cannot be used; one line: key, value, what is allowed."""


@dataclass(frozen=True)
class EncoderPreset:
    """A frozen vision tower by name."""

    name: str
    path: str
    """Folder, or hub id (org/name, or org/name@revision), of the weights and of their image processor."""
    layer: int = -2
    """Index into `hidden_states`, as LLaVA's `vision_feature_layer`; -2 is what LLaVA itself reads."""
    size: int | None = None
    """Side in pixels of the square that the whole image is resized to; None: as the image processor says."""
    width: int | None = None
    """Channels of its features, where they are known before it is loaded."""


@dataclass(frozen=True)
class VlmPreset:
    """A frozen vision-language model by name."""

    name: str
    path: str
    """Folder, or hub id (org/name, or org/name@revision), of the weights and of their processor."""
    encoder: str | None
    """Name of the encoder whose features the model reads; None where only its own files say so."""
    stored: bool = True
    """Whether it is given stored features; if not, and always where it cuts images into tiles or preprocesses
    them otherwise, the images."""
    tiles: int = 1
    """Most tiles that it is known to cut an image into, the base tile counted, as its processor says."""


Preset = TypeVar("Preset", EncoderPreset, VlmPreset)
ENCODERS = {
    preset.name: preset
    for preset in (
        EncoderPreset(name="micro", path="data/micro/llava", layer=-1, width=192),
        # DINOv2's own processor cuts the margins off, and with them the text of a page.
        # Its middle layers are the best to read from, by the probe in data/micro/probe.json.
        EncoderPreset(
            name="dinov2-small",
            path="facebook/dinov2-small@ed25f3a31f01632728cabb09d1542f84ab7b0056",
            layer=5,
            size=224,
            width=384,
        ),
        EncoderPreset(
            name="dinov2-base",
            path="facebook/dinov2-base@f9e44c814b77203eaa57a6bdbbd535f21ede1415",
            size=224,
            width=768,
        ),
        EncoderPreset(
            name="clip-vit-large-patch14-336",
            path="openai/clip-vit-large-patch14-336@ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
            width=1024,
        ),
        # The last of the 26 layers that LLaVA-OneVision has of its 27, and reads as -1.
        EncoderPreset(
            name="siglip-so400m-patch14-384",
            path="google/siglip-so400m-patch14-384@9fdffc58afc957d1a03a25b10dba0329ab15c2a3",
            layer=26,
            width=1152,
        ),
    )
}
VLMS = {
    preset.name: preset
    for preset in (
        VlmPreset(name="micro", path="data/micro/llava", encoder="micro"),
        VlmPreset(name="micro-dinov2", path="data/micro/llava-dinov2", encoder="dinov2-small"),
        VlmPreset(
            "llava-next-7b",
            "llava-hf/llava-v1.6-vicuna-7b-hf@c916e6cdcd760b4cecd1dd4907f84ac649f93b23",
            "clip-vit-large-patch14-336",
            stored=False,
            tiles=5,
        ),
        VlmPreset(
            "llava-1.5-7b",
            "llava-hf/llava-1.5-7b-hf@b234b804b114d9e37bb655e11cbbb5f5e971b7a9",
            "clip-vit-large-patch14-336",
            stored=False,
        ),
        VlmPreset(
            "llava-onevision-7b",
            "llava-hf/llava-onevision-qwen2-7b-ov-hf@0d50680527681998e456c7b78950205bedd8a068",
            "siglip-so400m-patch14-384",
            stored=False,
            tiles=37,
        ),
    )
}
"""Of several that read one encoder, `auto` takes the first: the paper's."""
REDUCERS = (
    "full",
    "none",
    "random",
    "uniform",
    "average_pooling",
    "image_downsampling",
    "l2_norm",
    "pixel_variance",
    "class_attention",
    "hired",
    "prumerge",
    "prumerge_plus",
    "visionzip",
    "vispruner",
    "holov",
    "divprune",
    "cdpruner",
    "cdpruner_text",
    "dart",
    "scope",
    "mmr",
    "tome",
    "prumerge_adaptive",
    "fastv",
    "pyramiddrop",
)
"""The reducers that need no training, each by its class in `atr.reduction`, the last two `atr.vlm.in_llm`."""
SELECTORS = ("selector", "selector_adaptive", "selector_mmr", "selector_scope")
"""Those made of the trained one: its best tokens, its own mask, its scores with diversity or coverage."""
DISTILLED = ("distilled", "distilled_ranking")
"""Those made of the one that the language model taught: its scores after some coverage, its best tokens."""
ONE_TILE = (
    "uniform",
    "average_pooling",
    "image_downsampling",
    "prumerge",
    "prumerge_plus",
    "visionzip",
    "holov",
    "tome",
    "prumerge_adaptive",
    "selector_mmr",
    "selector_scope",
)
"""Of all of these the ones for models that read images whole: they merge tokens, or look at where a token
lies and give no scores by which tiles compare."""
BENCHMARKS = {
    "docs": "text",
    "signs": "text",
    "charts": "text",
    "shapes": "general",
    "digits": "general",
    "scenes": "general",
}
"""The benchmarks of the micro world, and their groups: the paper draws text-based and general tasks apart."""
PAPER_BENCHMARKS = {
    **dict.fromkeys(("textvqa", "docvqa", "infovqa", "chartqa", "mmbench"), "text"),
    **dict.fromkeys(("ai2d", "gqa", "mmmu", "mmstar", "scienceqa"), "general"),
}
PROMPTS = ("Describe the image in detail.", "What does the text in the image say?")
"""What a language model is asked of images that come without questions, when a selector learns from it."""
LAYOUT = {
    "positions": ("original", "contiguous"),
    "budget": ("image", "tile"),
    "newline": ("keep", "follow"),
    "interpolation": ("model", "off"),
}
"""The ways to lay out what is kept; meaning in `Evaluate`."""
GROUPS = BENCHMARKS | PAPER_BENCHMARKS
"""The group of every benchmark."""

STAGES = {
    "benchmark": (),
    "prepare": ("seed", "prepare"),
    "extract": ("encoder", "trainer", "extract"),
    "pretrain": ("seed", "encoder", "trainer", "pretrain", "evaluate.positions"),
    "distill": ("seed", "encoder", "vlm", "trainer", "distill", "evaluate.positions"),
    "evaluate": ("seed", "encoder", "vlm", "trainer", "evaluate.keep", "evaluate.random_seeds", "evaluate.positions", "evaluate.budget", "evaluate.newline", "evaluate.interpolation", "evaluate.batch_size", "evaluate.max_new_tokens", "evaluate.bootstrap"),
    "reconstructor": ("seed", "encoder", "trainer", "pretrain", "intrinsic.pretrain_images", "intrinsic.epochs", "intrinsic.training_seeds"),
    "intrinsic": ("encoder", "trainer.accelerator", "evaluate.keep", "evaluate.random_seeds", "intrinsic.images", "intrinsic.batch_size", "intrinsic.overlap_keep"),
    "prefill": ("seed", "encoder", "vlm", "trainer", "latency"),
    "latency": ("seed", "encoder", "vlm", "trainer", "latency"),
    "robustness": ("seed", "encoder", "vlm", "trainer.accelerator", "evaluate.budget", "evaluate.newline", "evaluate.interpolation", "evaluate.batch_size", "evaluate.max_new_tokens", "evaluate.bootstrap", "robustness"),
    "report": ("evaluate", "report"),
    "micro": ("seed", "trainer", "micro"),
    "micro_probe": ("seed", "micro_probe"),
    "micro_features": ("seed", "trainer", "micro_features"),
    "micro_dinov2": ("seed", "trainer", "micro_features", "micro_dinov2"),
}
"""The parameters each stage declares to DVC, and the only ones it is given; a dotted one is a field alone."""

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
# What every stage can run in. bf16-true and 16-true are left out, as a training needs weights that its small
# steps do not vanish in; frozen models take the lower precision themselves under bf16-mixed and 16-mixed.
PRECISIONS = ("auto", "bf16-mixed", "16-mixed", "32-true", "64-true", 16, 32, 64)
# FSDP and DeepSpeed are left out, as they shard the weights: a part of a selector cannot be saved. So are the
# spawn, fork and notebook variants: they train in children and leave the parent at step 0. Those that find
# unused parameters or do not say in other words what ddp does: none of ours are unused, and Fabric, which
# evaluate runs in, does not know them all.
STRATEGIES = ("auto", "ddp")

MANY = 2**31 - 1
"""Most of anything that is counted: above it libraries overflow, each in its own way."""
PROCESSES = 2**16
"""Most of anything that takes a process or a device of its own."""
LAYERS = 1024
"""Most layers of a network, and heads of one of them: a misprint shall not fill the memory."""

# org/name, and a branch, tag or commit behind it.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w-][\w./-]*)?")


def _check(key: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise ConfigError(f"{key}: {_short(value)} is out of range, allowed: {allowed}")


def _check_choice(key: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}: {_short(value)} is unknown, allowed: {_listed(choices)}")


def _check_counts(section: str, settings: object, *keys: str, least: int = 1, most: int = MANY) -> None:
    """Refuse counts outside least..most; `keys` are fields of the settings."""
    for key in keys:
        value = getattr(settings, key)
        _check(f"{section}.{key}", value, least <= value <= most, f"{key} >= {least}, at most {most}")


def _check_fractions(key: str, name: str, values: list[float]) -> None:
    """Refuse kept fractions that cannot be, or that a figure and a table cannot tell apart."""
    told = _distinct([f"{value:g}" for value in values]) and len(values) <= 100
    valid = told and all(0 < value <= 1 for value in values)
    _check(key, values, valid, f"1 to 100 distinct fractions, 0 < {name} <= 1, of six digits")


def _check_names(key: str, values: list[str], choices: Collection[str]) -> None:
    """Refuse an unknown name, a name given twice, and an empty list."""
    for value in values:
        _check_choice(key, value, choices)
    _check(key, values, _distinct(values), f"one or more of {_listed(choices)}, each once")


def _distinct(values: Collection[object]) -> bool:
    return len(set(values)) == len(values) > 0


def _listed(names: Collection[object]) -> str:
    return ", ".join(map(str, names))


@dataclass(frozen=True)
class Common:
    """The keys outside any section."""

    seed: int = 0
    """Of the data, the trainings, the bootstrap and the noise that is timed; 0 <= seed < 2**32. The random
    reducer has seeds of its own, 0 and up: see `evaluate.random_seeds`."""
    encoder: str = "micro"
    """Name of a preset, a folder, or a hub id; the first and the last may have a revision: name@revision."""
    vlm: str = "auto"
    """Name of a preset, a folder, a hub id, or auto: the preset that reads the encoder."""

    def __post_init__(self) -> None:
        _check("seed", self.seed, 0 <= self.seed < 2**32, "0 <= seed < 2**32")


@dataclass(frozen=True)
class Trainer:
    """How the stages that compute use the machine: handed to Lightning as it is, except an auto precision."""

    accelerator: str = "auto"
    """Lightning's name of the hardware; auto takes the best there is."""
    devices: Any = "auto"
    """Number of processes, or the indices of devices; auto is all GPUs, or one process on a CPU. Each takes
    batches of its own: params.yaml has 1, so that its steps are as many on every machine."""
    strategy: str = "auto"
    """Lightning's name of the way to use several devices: auto or ddp."""
    precision: int | str = "auto"
    """Lightning's name of the arithmetic, or auto: bf16-mixed where the machine has instructions for it (a
    CPU without them is ten times as slow in it as in float32), else 16-mixed on CUDA and 32-true else."""
    num_nodes: int = 1
    """Machines."""

    def __post_init__(self) -> None:
        _check_choice("trainer.accelerator", self.accelerator, ACCELERATORS)
        _check_choice("trainer.strategy", self.strategy, STRATEGIES)
        _check_choice("trainer.precision", self.precision, PRECISIONS)
        _check_counts("trainer", self, "num_nodes", most=PROCESSES)
        allowed = f"auto, -1 for all, a count >= 1, or a list of distinct indices >= 0, below {PROCESSES}"
        _check("trainer.devices", self.devices, _are_devices(self.devices), allowed)

    def kwargs(self) -> dict[str, Any]:
        """The fields by their names; `atr.core.hardware.lightning_kwargs` makes of them what Lightning takes."""
        return asdict(self)


def _are_devices(devices: object) -> bool:
    if isinstance(devices, list):
        indices = all(type(index) is int and 0 <= index < PROCESSES for index in devices)
        return indices and _distinct(devices)
    return devices == "auto" or (type(devices) is int and (devices == -1 or 1 <= devices < PROCESSES))


@dataclass(frozen=True)
class Prepare:
    """Images to pretrain on and questions to evaluate with."""

    source: str = "micro"
    """Where the pretraining images come from: the micro world, coco, or a folder of images."""
    images: int = 5120
    """Pretraining images; the paper takes 100,000."""
    questions: int = 300
    """Held-out questions of each benchmark, a seeded sample; one that has fewer gives all of them."""
    split: str = "evaluate"
    """Of the micro world's questions: evaluate, which is held out, or validation, to choose by."""
    benchmarks: list[str] = field(default_factory=lambda: list(BENCHMARKS))
    """Names of the benchmarks; those of the micro world are of the same kinds as its pretraining images."""
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    """Asked of pretraining images by the stage distill; those of the micro world bring questions of their
    own."""
    repository: str = "hub"
    """Where coco and the paper's benchmarks lie: hub, or a folder with each dataset under its hub id."""

    def __post_init__(self) -> None:
        is_source = self.source in ("micro", "coco") or os.path.isdir(self.source)
        _check("prepare.source", self.source, is_source, "micro, coco, or a folder that exists")
        is_repository = self.repository == "hub" or os.path.isdir(self.repository)
        _check("prepare.repository", self.repository, is_repository, "hub, or a folder that exists")
        _check_choice("prepare.split", self.split, ("evaluate", "validation"))
        asked = len(self.prompts) > 0 and all(prompt.strip() for prompt in self.prompts)
        _check("prepare.prompts", self.prompts, asked, "one or more texts")
        _check_counts("prepare", self, "images", "questions")
        _check_names("prepare.benchmarks", self.benchmarks, GROUPS)


@dataclass(frozen=True)
class Extract:
    """One pass of the frozen encoder over the images."""

    layer: int | None = None
    """Index into `hidden_states`; null takes the encoder's own. The paper does not say; LLaVA reads -2."""
    batch_size: int = 64
    """Images a step on each device."""
    shard_images: int = 1024
    """Images in a file of the store, the bound of the memory that writing and reading take."""
    workers: int = 0
    """Processes that decode images; 0 decodes in the main process."""

    def __post_init__(self) -> None:
        _check_counts("extract", self, "batch_size", "shard_images")
        _check_counts("extract", self, "workers", least=0, most=PROCESSES)
        deep = self.layer is None or abs(self.layer) <= LAYERS
        _check("extract.layer", self.layer, deep, f"null, or -{LAYERS} <= layer <= {LAYERS}")


@dataclass(frozen=True)
class SelectorTraining:
    """The selector, and what all of its trainings share."""

    SECTION: ClassVar[str]

    layers: int = 3
    """Transformer layers, of a reconstructor beside it too: stated by the paper."""
    heads: int = 3
    """Attention heads of a layer, a divisor of the feature width; 64 channels a head, as in the encoders."""
    ffn_ratio: float = 4.0
    """Hidden width of the feed-forward part over the feature width; 4 as in the encoders."""
    position: str = "sine"
    """none, or sine: fixed 2-D sine added to the input, as some towers give features that hold no place."""
    temperature: float = 1.0
    """Of the Gumbel noise; constant: 1 did not collapse, and a schedule would be one more choice."""
    learning_rate: float = 5e-4
    """Peak of AdamW's; the authors' later work takes 3e-4 for wider features and batches of 32."""
    weight_decay: float = 0.01
    """AdamW's; its own default."""
    warmup: float = 0.05
    """Fraction of the steps with a linear rise of the learning rate, before its cosine fall."""
    epochs: int = 2
    """Passes over the images; the authors' later work makes 40."""
    batch_size: int = 16
    """Images a step on each device; small, as every token of an image is a sample: steps count for more."""
    validation: float = 0.05
    """Fraction of the images held out of the training."""

    def __post_init__(self) -> None:
        section, rate, ratio = self.SECTION, self.learning_rate, self.ffn_ratio
        _check_counts(section, self, "layers", "heads", most=LAYERS)
        _check_counts(section, self, "epochs", "batch_size")
        _check(f"{section}.validation", self.validation, 0 < self.validation < 1, "0 < validation < 1")
        for key in ("weight_decay", "warmup"):
            _check(f"{section}.{key}", getattr(self, key), 0 <= getattr(self, key) < 1, f"0 <= {key} < 1")
        _check(f"{section}.learning_rate", rate, 0 < rate <= 1, "0 < learning_rate <= 1")
        # Below it a narrow selector would have no hidden channel at all.
        _check(f"{section}.ffn_ratio", ratio, 0.1 <= ratio <= 16, "0.1 <= ffn_ratio <= 16")
        _check_choice(f"{section}.position", self.position, ("none", "sine"))


@dataclass(frozen=True)
class Pretrain(SelectorTraining):
    """The paper's autoencoder; each choice that the paper leaves open is a field that gives its reason."""

    SECTION: ClassVar[str] = "pretrain"

    keep: float = 0.45
    """The proportion p of Eq. 7; one for all budgets, as the top K of one ranking serve every K. Well below
    it and above the order of the tokens is not learned: near the middle of the budgets it serves most."""
    normalise: str = "variance"
    """none: the raw L2 norm of Eq. 7; variance: over the features' own, so both terms are of one size."""
    initial_bias: float = 2.0
    """Bias of the selector's linear layer; at 2 training starts by keeping .88: R learns before S drops."""
    collapse_after: float = 0.5
    """Fraction of the steps after which a kept fraction outside [p/2, 1.5p + 0.05] stops the run."""
    mask_images: int = 6
    """Validation images whose masks are pictured after each epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        heat, after, bias = self.temperature, self.collapse_after, self.initial_bias
        _check("pretrain.keep", self.keep, 0 < self.keep < 1, "0 < keep < 1")
        # The logits are divided by it: far below it float32 overflows.
        _check("pretrain.temperature", heat, 0.01 <= heat <= 100, "0.01 <= temperature <= 100")
        _check("pretrain.collapse_after", after, 0 < after <= 1, "0 < collapse_after <= 1")
        _check("pretrain.initial_bias", bias, abs(bias) <= 20, "-20 <= initial_bias <= 20")
        _check_counts("pretrain", self, "mask_images")
        _check_choice("pretrain.normalise", self.normalise, ("none", "variance"))


@dataclass(frozen=True)
class Distill(SelectorTraining):
    """The selector that learns from the frozen language model which tokens its answers depend on."""

    SECTION: ClassVar[str] = "distill"

    learning_rate: float = 8e-4
    """Peak of AdamW's."""
    lowest: float = 0.05
    """Kept fractions are drawn evenly from this one up, as one ranking is to serve every budget."""
    highest: float = 0.6
    """The largest of them: above it nearly every ranking answers alike."""
    images: int = 5120
    """Pretraining images to learn from, a seeded sample; all where there are fewer."""
    max_new_tokens: int = 8
    """Tokens of an answer to learn from at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        heat = self.temperature
        _check_counts("distill", self, "images", "max_new_tokens")
        _check("distill.lowest", self.lowest, 0 < self.lowest < 1, "0 < lowest < 1")
        above = self.lowest <= self.highest <= 1
        _check("distill.highest", self.highest, above, f"distill.lowest, {self.lowest}, <= highest <= 1")
        _check("distill.temperature", heat, 0 <= heat <= 100, "0 <= temperature <= 100")


@dataclass(frozen=True)
class Evaluate:
    """Which reducers answer the questions, at which budgets."""

    reducers: list[str] = field(default_factory=lambda: ["full", "none", "random"])
    """The reducers without training, one stage each; full, of which all others keep a part, is always among
    them. Without none or random the report leaves their lines out."""
    selectors: list[str] = field(default_factory=lambda: ["selector", "selector_adaptive"])
    """Those made of the trained selector, one stage each; the selector itself is always among them."""
    distilled: list[str] = field(default_factory=lambda: ["distilled"])
    """Those made of the one that the language model taught, one stage each."""
    keep: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    """Kept fractions of an image's tokens; the count is rounded to the nearest, halves up, at least 1. Inside
    the language model they are means over its layers, of which those that cannot be had are left out."""
    random_seeds: int = 3
    """Draws of the random reducer, of seeds 0 and up whatever `seed` is; its score is their mean."""
    positions: str = "original"
    """Position ids after the removal: original (with their gaps), or contiguous (renumbered)."""
    budget: str = "image"
    """Of an image cut into tiles: shared by all of its tiles, the best tokens first, as a page has empty
    corners; or tile, each its share."""
    newline: str = "keep"
    """The tokens that end the rows of tiles: keep all, as the model has always seen them, though they count
    beside the budget; or follow, only where a token of the row is kept."""
    interpolation: str = "model"
    """Where LLaVA-OneVision shrinks the features of a large image: model, choose among the shrunk ones, so
    that full is the model as published; or off, among all of them, as in the paper."""
    batch_size: int = 128
    """Questions answered at a time."""
    max_new_tokens: int = 8
    """Tokens of an answer at most."""
    bootstrap: int = 1000
    """Resamples of the questions behind a 95 % interval."""

    def __post_init__(self) -> None:
        _check_names("evaluate.reducers", self.reducers, REDUCERS)
        _check_names("evaluate.selectors", self.selectors, SELECTORS)
        _check_names("evaluate.distilled", self.distilled, DISTILLED)
        for key, name in (("reducers", "full"), ("selectors", "selector")):
            names = getattr(self, key)
            _check(f"evaluate.{key}", names, name in names, f"a list with {name} in it")
        _check_fractions("evaluate.keep", "keep", self.keep)
        _check_counts("evaluate", self, "random_seeds", most=1000)
        _check_counts("evaluate", self, "batch_size", "max_new_tokens")
        _check_counts("evaluate", self, "bootstrap", most=100_000)  # all of them lie in memory
        for key, choices in LAYOUT.items():
            _check_choice(f"evaluate.{key}", getattr(self, key), choices)

    @property
    def names(self) -> list[str]:
        """All reducers, one stage each."""
        return [*self.reducers, *self.selectors, *self.distilled]

    @property
    def budgeted(self) -> list[str]:
        """Those of them that take a budget."""
        return _budgeted(self.names)


def serving(names: Iterable[str], vlm: VlmPreset) -> list[str]:
    """Those of the reducers that can serve a model: where it is known to cut images, none of ONE_TILE."""
    return [name for name in names if vlm.tiles == 1 or name not in ONE_TILE]


def _budgeted(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in ("full", "none") and not name.endswith("_adaptive")]


@dataclass(frozen=True)
class Intrinsic:
    """What is measured of the reducers without a language model."""

    images: int = 48
    """Held-out images that are measured, at even steps through all; all where there are fewer."""
    batch_size: int = 24
    """Images at a time."""
    pretrain_images: int = 5120
    """Images that the reconstructor of random masks is trained on; all where there are fewer."""
    epochs: int = 1
    """Passes over these; all else of that training is as in `pretrain`."""
    overlap_keep: float = 0.4
    """Kept fraction at which the overlap between reducers is measured."""
    training_seeds: int = 1
    """Selectors that are compared with each other, the trained one among them; each more is a training."""

    def __post_init__(self) -> None:
        _check_counts("intrinsic", self, "images", "batch_size", "pretrain_images", "epochs")
        _check_counts("intrinsic", self, "training_seeds", most=1000)
        keep = self.overlap_keep
        _check("intrinsic.overlap_keep", keep, 0 < keep <= 1, "0 < overlap_keep <= 1")


@dataclass(frozen=True)
class Latency:
    """What is timed: selection, and the prefill that it saves."""

    kept: list[float] = field(default_factory=lambda: [0.2, 0.5])
    """Kept fractions."""
    batches: list[int] = field(default_factory=lambda: [1, 32])
    """Images at a time."""
    seconds: float = 0.2
    """Time that each measurement takes at least, in seconds; its median is reported."""

    def __post_init__(self) -> None:
        _check_fractions("latency.kept", "kept", self.kept)
        valid = _distinct(self.batches) and all(1 <= batch <= MANY for batch in self.batches)
        _check("latency.batches", self.batches, valid, f"one or more distinct counts >= 1, at most {MANY}")
        _check("latency.seconds", self.seconds, 0 < self.seconds <= 60, "0 < seconds <= 60")


@dataclass(frozen=True)
class Robustness:
    """How stable selections and answers are where deployment differs from training."""

    questions: int = 20
    """Held-out questions of each benchmark, the first ones; all where there are fewer."""
    keep: list[float] = field(default_factory=lambda: [0.3, 0.5])
    """Kept fractions."""

    def __post_init__(self) -> None:
        _check_counts("robustness", self, "questions")
        _check_fractions("robustness.keep", "keep", self.keep)


@dataclass(frozen=True)
class Report:
    """What the report compares and pictures."""

    best: str = "distilled"
    """The reducer whose difference to each other one is reported: the project's best; one that is evaluated
    and takes a budget."""
    pages: int = 3
    """Held-out images of a benchmark whose kept patches are pictured at the kept fraction nearest to the 0.4
    of the paper's Figure 1; masks of three are stored."""
    examples: int = 6
    """Questions shown with their answers under full, random and selected tokens (the paper's Figure 8)."""

    def __post_init__(self) -> None:
        _check_choice("report.best", self.best, _budgeted((*SELECTORS, *DISTILLED, *REDUCERS)))
        _check("report.pages", self.pages, 1 <= self.pages <= 3, "1 <= pages <= 3")
        _check_counts("report", self, "examples", most=60)  # one picture holds them all


@dataclass(frozen=True)
class Recipe:
    """How a small vision-language model of the micro world is trained, outside the pipeline."""

    SECTION: ClassVar[str]

    steps: int = 15000
    """Optimizer steps of both phases."""
    reading: float = 0.35
    """Fraction of the steps in which the model learns to read alone; without it nothing is learned."""
    reading_weight: float = 0.3
    """Weight afterwards of the reading and naming losses, so that reading is not unlearned."""
    batch_size: int = 8
    """Images a step; smaller ones learn more from the same images."""
    learning_rate: float = 5e-4
    """Peak of AdamW's; 1e-3 stalls."""
    weight_decay: float = 0.05
    """AdamW's."""
    warmup_steps: int = 200
    """Steps of the linear rise of the learning rate."""
    constant: float = 0.6
    """Fraction of the steps before the learning rate falls linearly to 2 %."""
    epochs: int = 20
    """Parts of the training; after each a checkpoint and an examination on validation questions."""
    workers: int = 1
    """Processes that draw images; 0 draws in the main process."""
    compile: bool = True
    """Compile tower and language model: 1.3 times as fast on a CPU, needs a C++ compiler."""
    questions: int = 500
    """Held-out questions of each benchmark behind the model card's scores."""

    def __post_init__(self) -> None:
        section = self.SECTION
        _check_counts(section, self, "steps", "batch_size", "warmup_steps", "epochs", "questions")
        _check_counts(section, self, "workers", least=0, most=PROCESSES)
        for key in ("reading", "reading_weight", "weight_decay", "constant"):
            _check(f"{section}.{key}", getattr(self, key), 0 <= getattr(self, key) < 1, f"0 <= {key} < 1")
        rate = self.learning_rate
        _check(f"{section}.learning_rate", rate, 0 < rate <= 1, "0 < learning_rate <= 1")
        whole = self.steps % self.epochs == 0
        _check(f"{section}.epochs", self.epochs, whole, f"a divisor of {section}.steps, {self.steps}")


@dataclass(frozen=True)
class Micro(Recipe):
    """Training of the micro world's first model, whose tower learns with it."""

    SECTION: ClassVar[str] = "micro"

    width: int = 192
    """Channels of tower, projector and language model, 64 to an attention head."""
    layers: int = 4
    """Transformer layers of the tower."""
    reading_layer: int = 2
    """Of these, behind which a patch is to tell its characters, as it is again behind the last."""
    naming_layer: int = 3
    """Of these, behind which a patch is to name what it shows, as it is again behind the projector."""
    text_layers: int = 4
    """Layers of the language model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts("micro", self, "layers", "text_layers", most=LAYERS)
        for key in ("reading_layer", "naming_layer"):
            layer = getattr(self, key)
            _check(f"micro.{key}", layer, 0 <= layer <= self.layers, f"0 <= {key} <= layers, {self.layers}")
        wide = 64 <= self.width <= 8192 and self.width % 64 == 0
        _check("micro.width", self.width, wide, "a multiple of 64, at most 8192")


@dataclass(frozen=True)
class MicroDinov2(Recipe):
    """Training of the second model, on stored features of the frozen encoder dinov2-small.

    Its language model is that of the first one, which knows how to look up what it is asked for, above
    `new_layers` new layers. They look back for what a frozen tower does not tell: a value little of the key
    before it.
    """

    SECTION: ClassVar[str] = "micro_dinov2"

    new_layers: int = 2
    """Behind them a patch is to name what it shows. Without the first model above them the naming loss on
    held-out lessons, all patches weighing alike, was 1.63 after 240 steps, at the projector 1.87."""
    compile: bool = False
    """Compile the language model: alone, and asked for the states of a layer, it was no faster on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_counts("micro_dinov2", self, "new_layers", least=0, most=LAYERS)


@dataclass(frozen=True)
class MicroProbe:
    """Which layer of the encoder dinov2-small can be read from, and at which size of the images."""

    images: int = 400
    """Lessons whose patches the probes learn from; a quarter as many more are held out."""
    sizes: list[int] = field(default_factory=lambda: [224, 252, 336])
    """Sides in pixels to which images are resized, multiples of its patches' 14."""

    def __post_init__(self) -> None:
        _check_counts("micro_probe", self, "images", least=4)
        valid = _distinct(self.sizes) and all(14 <= size <= 1400 and size % 14 == 0 for size in self.sizes)
        _check("micro_probe.sizes", self.sizes, valid, "one or more distinct multiples of 14, at most 1400")


@dataclass(frozen=True)
class MicroFeatures:
    """The lessons of the second model, whose images go through the frozen encoder once."""

    images: int = 24000
    """Lessons; each is learned from many times, with other questions or in another order."""
    reading: float = 0.3
    """Fraction of them that is full of things to be read, for the first phase; the rest is asked about."""
    charts: float = 0.3
    """Fraction of charts in each of the two kinds: they take longest to learn, see `MicroTraining`."""
    batch_size: int = 16
    """Images a step on each device."""
    workers: int = 0
    """Processes that draw images; 0 draws in the main process."""

    def __post_init__(self) -> None:
        _check_counts("micro_features", self, "images", least=2)
        both = 0 < self.reading < 1 and 0 < self.reading_images < self.images
        _check(
            "micro_features.reading", self.reading, both, "0 < reading < 1, an image of each kind at least"
        )
        _check("micro_features.charts", self.charts, 0 <= self.charts < 1, "0 <= charts < 1")
        _check_counts("micro_features", self, "batch_size")
        _check_counts("micro_features", self, "workers", least=0, most=PROCESSES)

    @property
    def reading_images(self) -> int:
        """The first ones of the store."""
        return round(self.images * self.reading)


_SECTIONS: dict[str, Any] = {
    "trainer": Trainer,
    "prepare": Prepare,
    "extract": Extract,
    "pretrain": Pretrain,
    "distill": Distill,
    "evaluate": Evaluate,
    "intrinsic": Intrinsic,
    "latency": Latency,
    "robustness": Robustness,
    "report": Report,
    "micro": Micro,
    "micro_probe": MicroProbe,
    "micro_features": MicroFeatures,
    "micro_dinov2": MicroDinov2,
}
_KEYS = (*(key.name for key in fields(Common)), *_SECTIONS)


class Params:
    """The parameters that one stage declared, read-only; reading another one is an error of our own."""

    seed: int
    encoder: EncoderPreset
    vlm: VlmPreset
    trainer: Trainer
    prepare: Prepare
    extract: Extract
    pretrain: Pretrain
    distill: Distill
    evaluate: Evaluate
    intrinsic: Intrinsic
    latency: Latency
    robustness: Robustness
    report: Report
    micro: Micro
    micro_probe: MicroProbe
    micro_features: MicroFeatures
    micro_dinov2: MicroDinov2
    path: Path
    """The file they come from, absolute; for tracking only."""

    def __init__(self, stage: str, path: str | Path = "params.yaml", **declared: Any) -> None:
        assert set(declared) == {key.partition(".")[0] for key in STAGES[stage]}, (
            f"stage {stage} declares {STAGES[stage]}, not {tuple(declared)}"
        )
        self.__dict__.update(stage=stage, path=Path(path).resolve(), declared=declared, **declared)

    def __getattr__(self, name: str) -> Never:
        assert name not in _KEYS, (
            f"stage {self.__dict__.get('stage')} reads {name}, which it does not declare"
        )
        raise AttributeError(name)

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError(f"{name}: parameters are read-only")

    def raw(self) -> dict[str, Any]:
        """The declared parameters as plain nested dicts, presets by their names, for manifests and logs."""
        return {key: _plain(value) for key, value in self.__dict__["declared"].items()}

    def flat(self) -> dict[str, Any]:
        """The declared parameters by dotted key."""
        return _flatten(self.raw())


def _flatten(raw: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in raw.items():
        table |= (
            {f"{key}.{name}": item for name, item in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, EncoderPreset | VlmPreset):
        return value.name
    if isinstance(value, SimpleNamespace):
        return dict(vars(value))
    return value if isinstance(value, int) else asdict(value)


def load(stage: str, path: str | Path = "params.yaml") -> Params:
    """Check the whole file and return the sections that the stage declares.

    Raises ConfigError, one line with key, value and what is allowed, for anything that cannot be used.
    """
    everything = _validated(path)
    return Params(stage, path, **_declared(STAGES[stage], everything))


def _declared(keys: Iterable[str], everything: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that the keys name; of one that is named by fields, these alone."""
    found: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        if name:
            setattr(found.setdefault(section, SimpleNamespace()), name, getattr(everything[section], name))
        else:
            found[section] = everything[section]
    return found


def load_or_exit(stage: str, path: str | Path = "params.yaml") -> Params:
    """Return what `load` does; where that raises, print its one line to stderr and exit with 2."""
    try:
        return load(stage, path)
    except ConfigError as error:
        print(f"atr {stage}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def labels(path: str | Path = "params.yaml") -> dict[str, str]:
    """Names of the encoder and of the model, the tags of every MLflow run."""
    everything = _validated(path)
    return {key: everything[key].name for key in ("encoder", "vlm")}


def flat(path: str | Path = "params.yaml") -> dict[str, Any]:
    """All parameters by dotted key, for tracking only: a stage must not run on what it did not declare."""
    return _flatten({key: _plain(value) for key, value in _validated(path).items()})


def _validated(path: str | Path) -> dict[str, Any]:
    """All of the file's parameters by top-level key, checked."""
    tree = read(path)
    for key, value in tree.items():
        if key not in _KEYS:
            raise ConfigError(f"{key}: {_short(value)} is an unknown section, allowed: {_listed(_KEYS)}")
    for key in _KEYS:
        if key not in tree:
            raise ConfigError(f"{key}: missing from {path}, allowed: a value for each of {_listed(_KEYS)}")
    common: Common = _build(Common, "", {key.name: tree[key.name] for key in fields(Common)})
    encoder = _encoder(common.encoder)
    vlm = _vlm(common.vlm, encoder)
    sections = {name: _build(kind, f"{name}.", tree[name]) for name, kind in _SECTIONS.items()}
    _check_fit(encoder, sections)
    _check_evaluated(vlm, sections["evaluate"], sections["report"])
    return {"seed": common.seed, "encoder": encoder, "vlm": vlm, **sections}


def _check_fit(encoder: EncoderPreset, sections: Mapping[str, Any]) -> None:
    """Refuse selectors that cannot be made for the encoder, where its width is known."""
    if encoder.width is None:
        return
    for name in ("pretrain", "distill"):
        heads, position = sections[name].heads, sections[name].position
        fits = encoder.width % heads == 0
        _check(f"{name}.heads", heads, fits, f"a divisor of {encoder.width}, the width of {encoder.name}")
        fits = position == "none" or encoder.width % 4 == 0
        _check(f"{name}.position", position, fits, f"none, as 4 does not divide {encoder.width}")


def _check_evaluated(vlm: VlmPreset, evaluate: Evaluate, report: Report) -> None:
    """Refuse a reducer that cannot serve the model, and a report on one that is not evaluated."""
    for key in ("reducers", "selectors", "distilled"):
        names = getattr(evaluate, key)
        able = serving(names, vlm)
        allowed = f"{_listed(able)}, as {vlm.name} cuts images into tiles"
        _check(f"evaluate.{key}", names, able == names, allowed)
    _check("report.best", report.best, report.best in evaluate.budgeted, _listed(evaluate.budgeted))


def read(path: str | Path) -> dict[str, Any]:
    """The plain content of a parameter file, or of an overlay; checked is that it is a mapping, and `parse`.

    Raises ConfigError, one line that names the file.
    """
    try:
        tree = parse(Path(path).read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, allowed: a YAML file with {_listed(_KEYS)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}, allowed: a YAML file with {_listed(_KEYS)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: {_short(tree)} is no mapping, allowed: {_listed(_KEYS)}")
    return {str(key): value for key, value in tree.items()}


def parse(text: str, source: str | Path) -> Any:
    """The plain content of YAML 1.2, as which DVC reads it: what DVC records is what a stage runs with.

    Raises ConfigError, one line that names the source, for text that is no YAML, and by its key for a value
    that YAML 1.1 reads as another: `010` is ten in the one and eight in the other, and people know either.
    """
    try:
        tree = YAML(typ="safe").load(text)
        # OmegaConf reads 1.1, but for `3e-4`, a number as in 1.2.
        other = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (OSError, ValueError, RecursionError, YAMLError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: {reason}, allowed: a YAML file with {_listed(_KEYS)}") from None
    for key, value, misread in _ambiguous(tree, other) if isinstance(tree, dict) else ():
        raise ConfigError(
            f"{key}: {_short(value)} in YAML 1.2, which DVC reads, is {_short(misread)} in YAML 1.1, "
            "allowed: what both read alike, or text in quotes"
        )
    return tree


def _ambiguous(value: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What two readings of a file differ in, by dotted key; `off` is a word, as one of our choices."""
    if isinstance(value, dict) and isinstance(other, dict):
        for name, item in value.items():
            yield from _ambiguous(item, other.get(name), f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and isinstance(other, list):
        for item, twin in zip(value, other, strict=True):
            yield from _ambiguous(item, twin, key)
    elif repr(value) != repr(other) and value != "off":
        yield key, value, other


def _build(kind: Any, prefix: str, values: Any) -> Any:
    """A checked dataclass of that kind from its section's plain values; prefix: "<section>." or empty."""
    types = {key.name: inspect.formatannotation(key.type) for key in fields(kind)}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix[:-1]}: {_short(values)} is no section, allowed: {_listed(types)}")
    for key, value in values.items():
        if key not in types:
            raise ConfigError(f"{prefix}{key}: {_short(value)} is an unknown key, allowed: {_listed(types)}")
        if not _is_written_out(value):
            raise ConfigError(
                f"{prefix}{key}: {_short(value)} is not a value, allowed: {types[key]}, written out"
            )
        if _is_nested(value):
            raise _wrong_type(f"{prefix}{key}", value, types[key])
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except ValidationError as error:
        key = str(error.full_key).split("[")[0]
        raise _wrong_type(f"{prefix}{key}", values[key], types[key]) from None


def _is_nested(value: object) -> bool:
    """Whether it is deeper than a list: no key takes that, and OmegaConf lets it through or names no key."""
    inner = value if isinstance(value, list) else []
    return isinstance(value, Mapping) or any(isinstance(item, Mapping | list) for item in inner)


def _wrong_type(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{key}: {_short(value)} has a wrong type, allowed: {allowed}")


def _is_written_out(value: object) -> bool:
    """Whether it is no interpolation, whose change DVC would not see, nor what OmegaConf calls missing."""
    if isinstance(value, list):
        return all(map(_is_written_out, value))
    return "${" not in str(value) and value != "???"


def _short(value: object) -> str:
    """The value on one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _encoder(name: str) -> EncoderPreset:
    if preset := _preset(ENCODERS, name):
        return preset
    _check_location("encoder", name, ENCODERS)
    return EncoderPreset(name=name, path=name)


def _vlm(name: str, encoder: EncoderPreset) -> VlmPreset:
    """The model of that name or path; one of the presets only with the encoder whose features it reads.

    Whether a model reads an encoder of the user's own shows when both are loaded.
    """
    read, model = _base(encoder.name), _base(name)
    readers = [preset for preset in VLMS.values() if preset.encoder == read]
    allowed = f"{_listed([preset.name for preset in readers]) or 'no preset'}, a folder, or a hub id org/name"
    if name == "auto" and readers:
        return readers[0]
    if name == "auto":
        raise ConfigError(
            f"vlm: 'auto' finds no model that reads encoder {encoder.name!r}, allowed: {allowed}"
        )
    preset = _preset(VLMS, name)
    if preset and preset.encoder == read:
        return preset
    if preset and (model in VLMS or read in ENCODERS):
        raise ConfigError(f"vlm: {name!r} does not read encoder {encoder.name!r}, allowed: {allowed}")
    _check_location("vlm", name, ("auto", *VLMS))
    return VlmPreset(name=name, path=name, encoder=None)


def _preset(presets: Mapping[str, Preset], name: str) -> Preset | None:
    """The preset of that name, or whose folder or hub id it is; at the revision that stands behind it.

    Without one it is the preset's own, so that what the hub publishes later changes no result.
    """
    base = _base(name)
    found = next((preset for preset in presets.values() if base in (preset.name, _base(preset.path))), None)
    if found is None or name in (base, found.path):
        return found
    revision = name.removeprefix(base)
    at = replace(found, name=found.name + revision, path=_base(found.path) + revision)
    return at if _HUB_ID.fullmatch(at.path) else None


def _base(name: str) -> str:
    """A name without the revision behind it."""
    return name.partition("@")[0]


def _check_location(key: str, name: str, presets: Collection[str]) -> None:
    """Refuse what is no folder and cannot be a hub id: beside a folder `data`, `data/mirco` is misspelt."""
    is_hub_id = _HUB_ID.fullmatch(name) and not os.path.isdir(os.path.dirname(_base(name)))
    if not (os.path.isdir(name) or is_hub_id):
        allowed = f"{_listed(presets)}, a folder that exists, or a hub id org/name or org/name@revision"
        raise ConfigError(f"{key}: {_short(name)} is unknown, allowed: {allowed}")
