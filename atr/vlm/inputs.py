"""Model inputs with their visual tokens: from stored features of whole images, or from the images themselves.

Both give one `Prepared` with all visual tokens encoded and projected, so that reduction, generation and token
counts are the same for both.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor

from atr.reduction import EncoderOutput
from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.families import Tiling
from atr.vlm.families.tower import encode_tiles, project
from atr.vlm.reduce import Prepared, prepare
from atr.vlm.tiling import TileLayout


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

    @property
    def tokens(self) -> int:
        """Most visual tokens that an image can have, without reduction."""

    def prepare(
        self,
        images: Sequence[Sequence[str]],
        questions: Sequence[str | Sequence[str]],
        needs: Collection[str] = frozenset(),
    ) -> Prepared:
        """Encode the images of each question, named in the order of its prompt, and tokenize the prompts.

        A question may be a conversation, as in `Prompts.text`. `needs` names the optional fields of
        EncoderOutput that the reducers read.
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

    def expand(self, question: str | Sequence[str], tokens: Sequence[int]) -> str:
        """The prompt of a question with as many placeholders for each image as it has `tokens`.

        Raises ValueError for a question that contains a placeholder.
        """
        placeholder = self.processor.image_token
        parts = self.text(question, len(tokens)).split(placeholder)
        if len(parts) != len(tokens) + 1:
            raise ValueError(f"question: {question!r} contains the placeholder {placeholder} of an image")
        runs = [placeholder * count for count in tokens]
        return "".join(itertools.chain.from_iterable(zip(parts, [*runs, ""], strict=True)))

    def tokenize(self, texts: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Token ids and attention mask of prompts that hold one placeholder per visual token."""
        texts = list(texts)
        tokens = self.processor.tokenizer(texts, **self.options(texts)).to(device)
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}


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
    ) -> Prepared:
        """As `VisualInputs.prepare`; images are opened only for attention, keys or pixels."""
        shown = [name for names in images for name in names]
        place = {name: position for position, name in enumerate(dict.fromkeys(shown))}
        encoded = EncodedTiles.of_one_grid(self._encode(list(place), needs))
        prompts = Prompts(self.processor)
        texts = [
            prompts.expand(question, [self.tokens] * len(names))
            for names, question in zip(images, questions, strict=True)
        ]
        layout = TileLayout(self.model, Tiling.of_one_grid((1,) * len(place), self.features.grid))
        inputs = prompts.tokenize(texts, self.model.device)
        image_of = [place[name] for name in shown]
        return Prepared(self.model, inputs, layout, encoded, layout.tokens(encoded), image_of)

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
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
    ) -> Prepared:
        """As `VisualInputs.prepare`; raises ValueError for a question that contains a placeholder."""
        prompts, samples = Prompts(self.processor), list(dict.fromkeys(map(tuple, images)))
        # Nested, so that OneVision's processor does not cut the images of a question with several.
        pictures = [[self.images.image(name) for name in names] for names in samples]
        texts = [self.processor.image_token * len(names) for names in samples]
        inputs = self.processor(images=pictures, text=texts, **prompts.options(texts))
        needed = set(needs) - {"text_BD"}
        encoded = prepare(self.model, inputs.to(self.model.device), self.interpolation, needed)
        bounds = itertools.pairwise(itertools.accumulate(map(len, samples), initial=0))
        shown = {names: range(first, after) for names, (first, after) in zip(samples, bounds, strict=True)}
        rows = [shown[tuple(names)] for names in images]
        lengths = encoded.layout.lengths
        texts = [
            prompts.expand(question, [lengths[image] for image in row])
            for question, row in zip(questions, rows, strict=True)
        ]
        prepared = replace(
            encoded,
            inputs=prompts.tokenize(texts, self.model.device),
            image_of=list(itertools.chain.from_iterable(rows)),
        )
        return prepared.with_text() if "text_BD" in needs else prepared

    @property
    def tokens(self) -> int:
        """Tokens of an image with as many tiles as the model allows, newlines included."""
        return _most_tokens(self.model.config, self.interpolation)


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
