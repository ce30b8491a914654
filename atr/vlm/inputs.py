"""Where the visual tokens of questions come from: stored features of whole images, or the images themselves.

Either way they come out as one `Prepared`, with all tokens encoded and projected, so that everything after
(reducing, generating, counting) is the same for both.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor

from atr.reduction import EncoderOutput
from atr.vlm.families import Tiling, encode, project
from atr.vlm.reduce import Prepared, prepare
from atr.vlm.tiling import TileLayout


class Features(Protocol):
    """What is read of a feature store, by the names of its images."""

    manifest: dict[str, Any]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image."""

    def index(self, image: str) -> int:
        """Position of an image."""

    def __getitem__(self, position: int) -> Tensor:
        """features_ND of one image, before the projector."""


class Images(Protocol):
    """What is read of the prepared images."""

    def image(self, name: str) -> Image.Image:
        """The image of that name, RGB."""


class Source(Protocol):
    """Makes questions about one or more images ready, the same number of them for all questions."""

    pads: ClassVar[bool]
    """Whether rows of different length may stand in one batch, left-padded to the longest."""

    def prepare(
        self,
        images: Sequence[Sequence[str]],
        questions: Sequence[str | Sequence[str]],
        needs: Collection[str] = frozenset(),
    ) -> Prepared:
        """The questions with every visual token of their images, named in the order of the prompt.

        In place of a question there may be a conversation, as `Prompts.text` has it. `needs` are those of the
        reducers that will be asked.
        """


@dataclass(frozen=True)
class Prompts:
    """Questions in the model's own chat template."""

    processor: Any

    def text(self, question: str | Sequence[str], images: int) -> str:
        """The prompt of a question with a placeholder for each image; the images come before the text.

        Several turns are a conversation: a question, its answer, the next question, and so on.
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
        """How a tokenizer takes them, padded to the longest; a template may have opened them itself."""
        opening = self.processor.tokenizer.bos_token
        opened = opening is not None and texts[0].startswith(opening)
        return {"add_special_tokens": not opened, "padding": True, "return_tensors": "pt"}

    def length(self, question: str | Sequence[str]) -> int:
        """Tokens of the prompt without image."""
        text = self.text(question, 0)
        return int(self.tokenize([text], torch.device("cpu"))["input_ids"].shape[1])

    def tokenize(self, texts: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Token ids and mask of prompts whose placeholders are as many as the visual tokens."""
        texts = list(texts)
        tokens = self.processor.tokenizer(texts, **self.options(texts)).to(device)
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class StoredFeatures:
    """Features of a store, for models that read whole images; each distinct image is read once a batch.

    `images` opens the images themselves: of them comes what reducers need beside features.
    """

    pads: ClassVar[bool] = False

    model: Any
    processor: Any
    features: Features
    images: Callable[[], Images]

    def prepare(
        self,
        images: Sequence[Sequence[str]],
        questions: Sequence[str | Sequence[str]],
        needs: Collection[str] = frozenset(),
    ) -> Prepared:
        """As `Source`; no image is opened unless attention, keys or pixels are needed."""
        shown = [name for names in images for name in names]
        place = {name: position for position, name in enumerate(dict.fromkeys(shown))}
        encoded = self._encoded(list(place), needs)
        prompts, placeholder = Prompts(self.processor), self.processor.image_token
        texts = [
            prompts.text(question, len(names)).replace(placeholder, placeholder * encoded.tokens)
            for names, question in zip(images, questions, strict=True)
        ]
        packing = TileLayout(self.model, Tiling((1,) * len(place), self.features.grid))
        inputs = prompts.tokenize(texts, self.model.device)
        image_of = [place[name] for name in shown]
        return Prepared(self.model, inputs, packing, encoded, packing.tokens(encoded), image_of)

    def _encoded(self, names: Sequence[str], needs: Collection[str]) -> EncoderOutput:
        """The stored features; what else is needed is of the tower's own look at the images."""
        stored = [self.features[self.features.index(name)] for name in names]
        features_BND = torch.stack(stored).to(self.model.device)
        encoded = EncoderOutput(
            features_BND, self.features.grid, projected_BND=project(self.model, features_BND)
        )
        beside = set(needs) - {"grid", "projected_BND", "text_BD"}
        if not beside:
            return encoded
        images = self.images()
        pixels = self.processor.image_processor([images.image(name) for name in names], return_tensors="pt")
        looked = encode(self.model, pixels, Tiling((1,) * len(names), self.features.grid), needs)
        return replace(encoded, **{name: getattr(looked, name) for name in beside})


@dataclass(frozen=True)
class WholeInputs:
    """The images as the model's own processor makes its input of them, encoded once a batch."""

    pads: ClassVar[bool] = True

    model: Any
    processor: Any
    images: Images
    interpolation: str = "model"

    def prepare(
        self,
        images: Sequence[Sequence[str]],
        questions: Sequence[str | Sequence[str]],
        needs: Collection[str] = frozenset(),
    ) -> Prepared:
        """As `Source`; raises ValueError for a placeholder typed in a question."""
        prompts = Prompts(self.processor)
        texts = [prompts.text(text, len(names)) for names, text in zip(images, questions, strict=True)]
        # Nested, because OneVision's does not cut the images of a question that has several.
        pictures = [[self.images.image(name) for name in names] for names in images]
        inputs = self.processor(images=pictures, text=texts, **prompts.options(texts))
        return prepare(self.model, inputs.to(self.model.device), self.interpolation, needs)
