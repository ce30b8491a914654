"""Model inputs with their visual tokens: from stored features of whole images, or from the images themselves.

Both give one `Prepared` with all visual tokens encoded and projected, so that reduction, generation and token
counts are the same for both.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor

from atr.reduction import EncoderOutput
from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.families import Layer, Tiling, family_of
from atr.vlm.families.rule import Rule
from atr.vlm.families.tower import encode_tiles, project
from atr.vlm.processors import count_image_tokens, make_token_types, read_images
from atr.vlm.reduce import Prepared, prepare
from atr.vlm.sequence import has_axes
from atr.vlm.tiling import TileLayout

_GRIDS = "image_grid_thw"


class NamedFeatures(Protocol):
    """Stored features by image name; `FeatureStore` is one."""

    manifest: dict[str, Any]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image."""

    def index(self, image: str) -> int:
        """Position of an image."""

    def __getitem__(self, position: int) -> Tensor:
        """features_ND of one image, before the projector."""


class ImagesByName(Protocol):
    """Images by name; `PreparedImages` is one."""

    def image(self, name: str) -> Image.Image:
        """One image, RGB."""


class VisualInputs(Protocol):
    """Prepares batches of questions, each about the same number of images."""

    pads: ClassVar[bool]
    """Whether prompts of different lengths may share a batch, left-padded to the longest."""

    def count_tokens(self, images: Iterable[str]) -> dict[str, int]:
        """Visual tokens of each image without reduction, at most; by its name."""

    def prepare(
        self,
        images: Sequence[Sequence[str]],
        questions: Sequence[str | Sequence[str]],
        needs: Collection[str] = frozenset(),
        layer: Layer = None,
    ) -> Prepared:
        """Encode the images of each question, named in the order of its prompt, and tokenize the prompts.

        A question may be a conversation, as in `Prompts.text`. `needs` names the optional fields of
        EncoderOutput that the reducers read, `layer` is what they read of an image, as in
        `atr.vlm.reduce.prepare`.
        """


@dataclass(frozen=True)
class Prompts:
    """Questions in the model's own chat template."""

    processor: Any

    def text(self, question: str | Sequence[str], images: int) -> str:
        """The prompt of a question, with one placeholder per image before the text.

        A sequence of turns is a conversation: a question, its answer, the next question, and so on.
        """
        turns = [question] if isinstance(question, str) else question
        contents = [[{"type": "text", "text": turn}] for turn in turns]
        contents[0] = [{"type": "image"}] * images + contents[0]
        roles = itertools.cycle(("user", "assistant"))
        text: str = self.processor.apply_chat_template(
            [{"role": role, "content": content} for content, role in zip(contents, roles, strict=False)],
            add_generation_prompt=len(turns) % 2 == 1,
            tokenize=False,
        )
        return text

    def options(self, texts: Sequence[str]) -> dict[str, Any]:
        """Tokenizer options: pad to the longest, and add no second BOS token if the template writes one."""
        bos = self.processor.tokenizer.bos_token
        has_bos = bos is not None and texts[0].startswith(bos)
        return {"add_special_tokens": not has_bos, "padding": True, "return_tensors": "pt"}

    def length(self, question: str | Sequence[str]) -> int:
        """Number of tokens of the prompt without images."""
        return self.lengths([question])[0]

    def lengths(self, questions: Sequence[str | Sequence[str]]) -> list[int]:
        """Number of tokens of each prompt without images."""
        if not questions:
            return []
        texts = [self.text(question, 0) for question in questions]
        options = self.options(texts) | {"padding": False, "return_tensors": None}
        return [len(ids) for ids in self.processor.tokenizer(texts, **options)["input_ids"]]

    def expand(self, question: str | Sequence[str], images: Sequence[str]) -> str:
        """The prompt of a question with the text of each of its `images`, as `read_images` gives it.

        Raises ValueError for a question that contains a placeholder.
        """
        placeholder = self.processor.image_token
        parts = self.text(question, len(images)).split(placeholder)
        if len(parts) != len(images) + 1:
            raise ValueError(f"question: {question!r} contains the placeholder {placeholder} of an image")
        return "".join(itertools.chain.from_iterable(zip(parts, [*images, ""], strict=True)))

    def tokenize(self, texts: Iterable[str], model: Any) -> dict[str, Tensor]:
        """Token ids, attention mask and token types of expanded prompts, as the model reads them."""
        texts = list(texts)
        tokens = self.processor.tokenizer(texts, **self.options(texts)).to(model.device)
        read = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        return read | make_token_types(self.processor, model, read["input_ids"])


@dataclass(frozen=True)
class FeatureInputs:
    """Inputs from stored features, for models that read whole images; a batch reads each image once.

    `images` opens the images, from which attention, keys and pixels are computed for reducers that need them.
    """

    pads: ClassVar[bool] = False

    model: Any
    processor: Any
    features: NamedFeatures
    images: Callable[[], ImagesByName]

    def prepare(
        self,
        images: Sequence[Sequence[str]],
        questions: Sequence[str | Sequence[str]],
        needs: Collection[str] = frozenset(),
        layer: Layer = None,
    ) -> Prepared:
        """As `VisualInputs.prepare`; images are opened only for attention, keys or pixels.

        The features are of the stored layer, which is the model's own.
        """
        shown = [name for names in images for name in names]
        place = {name: position for position, name in enumerate(dict.fromkeys(shown))}
        encoded = EncodedTiles.of_one_grid(self._encode(list(place), needs))
        prompts = Prompts(self.processor)
        texts = [
            prompts.expand(question, [self.processor.image_token * self._tokens] * len(names))
            for names, question in zip(images, questions, strict=True)
        ]
        layout = TileLayout(self.model, Tiling.of_one_grid((1,) * len(place), self.features.grid))
        inputs = prompts.tokenize(texts, self.model)
        image_of = [place[name] for name in shown]
        return Prepared(self.model, inputs, layout, encoded, layout.tokens(encoded), image_of)

    def count_tokens(self, images: Iterable[str]) -> dict[str, int]:
        """As `VisualInputs.count_tokens`; all images have as many."""
        return dict.fromkeys(images, self._tokens)

    @property
    def _tokens(self) -> int:
        rows, columns = self.features.grid
        return rows * columns

    def _encode(self, names: Sequence[str], needs: Collection[str]) -> EncoderOutput:
        """The stored features; the tower computes the other needed fields from the images."""
        stored = [self.features[self.features.index(name)] for name in names]
        features_BND = torch.stack(stored).to(self.model.device)
        encoded = EncoderOutput(
            features_BND, self.features.grid, projected_BND=project(self.model, features_BND)
        )
        missing = set(needs) - {"grid", "projected_BND", "text_BD"}
        if not missing:
            return encoded
        images = self.images()
        pixels = self.processor.image_processor([images.image(name) for name in names], return_tensors="pt")
        tiling = Tiling.of_one_grid((1,) * len(names), self.features.grid)
        computed = encode_tiles(self.model, pixels, tiling, needs)
        return replace(encoded, **{name: getattr(computed, name) for name in missing})


@dataclass(frozen=True)
class ImageInputs:
    """Inputs from images, preprocessed by the model's own processor; a batch encodes them once."""

    pads: ClassVar[bool] = True

    model: Any
    processor: Any
    images: ImagesByName
    interpolation: str = "model"

    def prepare(
        self,
        images: Sequence[Sequence[str]],
        questions: Sequence[str | Sequence[str]],
        needs: Collection[str] = frozenset(),
        layer: Layer = None,
    ) -> Prepared:
        """As `VisualInputs.prepare`; raises ValueError for a question that contains a placeholder."""
        samples = list(dict.fromkeys(map(tuple, images)))
        encoded, written = self._encode(samples, needs, layer)
        bounds = itertools.pairwise(itertools.accumulate(map(len, samples), initial=0))
        shown = {names: range(first, after) for names, (first, after) in zip(samples, bounds, strict=True)}
        rows = [shown[tuple(names)] for names in images]
        prompts = Prompts(self.processor)
        texts = [
            prompts.expand(question, [written[image] for image in row])
            for question, row in zip(questions, rows, strict=True)
        ]
        image_of = list(itertools.chain.from_iterable(rows))
        inputs = prompts.tokenize(texts, self.model) | _image_grids(self.model, encoded.inputs, image_of)
        prepared = replace(encoded, inputs=inputs, image_of=image_of)
        return prepared.with_text() if "text_BD" in needs else prepared

    def _encode(
        self, samples: Sequence[Sequence[str]], needs: Collection[str], layer: Layer
    ) -> tuple[Prepared, list[str]]:
        """The images of each sample encoded, and the text of each image in a prompt.

        Raises ValueError if the prompts do not keep the images of a sample apart.
        """
        prompts = Prompts(self.processor)
        pictures = [[self.images.image(name) for name in names] for names in samples]
        # In the model's own template, whose text between images may tell one's tokens from the next one's.
        texts = [prompts.text("", len(names)) for names in samples]
        inputs, written = read_images(self.processor, pictures, texts, **prompts.options(texts))
        needed = set(needs) - {"text_BD"}
        encoded = prepare(self.model, inputs.to(self.model.device), self.interpolation, needed, layer)
        lengths, count = encoded.layout.lengths, sum(map(len, samples))
        if len(lengths) != count:
            raise ValueError(
                f"{self.model.config.model_type}: {count} images became {len(lengths)} in the prompts, whose "
                "chat template puts images side by side, allowed: questions with one image"
            )
        if self.interpolation == "off" or not written:  # has other tokens than the processor writes
            written = [self.processor.image_token * length for length in lengths]
        return encoded, written

    def count_tokens(self, images: Iterable[str]) -> dict[str, int]:
        """As `VisualInputs.count_tokens`.

        An image that is cut by LLaVA's rules counts as many as it can have; elsewhere the processor counts
        the tokens of an image of its size: none of one that it refuses.
        """
        names = list(dict.fromkeys(images))
        if isinstance(family_of(self.model), Rule):
            sizes = [_size(self.images, name) for name in names]
            counts = _count_tokens(self.processor, [(height, width) for width, height in sizes])
            return dict(zip(names, counts, strict=True))
        return dict.fromkeys(names, _most_tokens(self.model.config, self.interpolation))


def _size(images: ImagesByName, name: str) -> tuple[int, int]:
    """(width, height) of an image; prepared ones, of which there are many, are not decoded for it."""
    size: tuple[int, int] = images.size(name) if hasattr(images, "size") else images.image(name).size
    return size


def _count_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """As `count_image_tokens`, and 0 for a size that the processor refuses: it will say why in `prepare`."""
    try:
        return count_image_tokens(processor, sizes)
    except ValueError:
        if len(sizes) == 1:
            return [0]
        return [count for size in sizes for count in _count_tokens(processor, [size])]


def _image_grids(model: Any, inputs: Mapping[str, Any], image_of: Sequence[int]) -> dict[str, Tensor]:
    """What a model with several axes of positions reads of each image to number its tokens."""
    if not has_axes(model) or _GRIDS not in inputs:
        return {}
    return {_GRIDS: torch.as_tensor(inputs[_GRIDS])[list(image_of)]}


def _most_tokens(config: Any, interpolation: str) -> int:
    """Visual tokens of an image that is cut into the most tiles; an upper bound."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    pinpoints = getattr(config, "image_grid_pinpoints", None) or [(0, 0)]
    rows, columns = zip(
        *([length // vision.image_size for length in sizes] for sizes in pinpoints), strict=True
    )
    tiles = max(height * width for height, width in zip(rows, columns, strict=True))
    limit = str(getattr(config, "vision_aspect_ratio", "")).removeprefix("anyres_max_")
    if limit.isdecimal() and interpolation == "model":
        tiles = min(tiles, ceil(1.1**2 * int(limit)))  # OneVision shrinks images only above that
    most: int = side**2 * (1 + tiles) + side * max(rows)
    return most
