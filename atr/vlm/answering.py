"""Greedy answers to questions about images whose features are stored, the visual tokens really removed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from atr.config import Evaluate
from atr.reduction import Encoded, Reducer
from atr.tokens import budget
from atr.vlm.checkpoint import check_features, load_vlm, weight_dtype
from atr.vlm.choice import choose
from atr.vlm.hosts import Tiling
from atr.vlm.packing import Packing
from atr.vlm.reduce import shorten


@dataclass(frozen=True)
class Batch:
    """Questions made ready once for all reducers and budgets; prompts of one length, so no row is padded.

    `inputs` hold every visual token, `blind` the prompts without image; `packed` are the projected tokens of
    each distinct image, and `image_of_row` says which of them a question is about.
    """

    inputs: dict[str, Tensor]
    blind: dict[str, Tensor]
    encoded: Encoded
    packed: list[Tensor]
    image_of_row: list[int]


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


@dataclass(frozen=True)
class Answerer:
    """A frozen model that answers, by greedy decoding, questions about images whose features are stored."""

    model: Any
    processor: Any
    features: Features
    settings: Evaluate

    @classmethod
    def load(
        cls, path: str, precision: int | str, device: torch.device, features: Features, settings: Evaluate
    ) -> Self:
        """The model in a folder or on the hub, on a device, its weights in a Lightning precision.

        Raises ValueError for what `load_vlm` refuses, and for features that the model does not read.
        """
        model, processor = load_vlm(path, weight_dtype(precision))
        check_features(model, features.manifest)
        return cls(model.to(device), processor, features, settings)

    def batches(self, questions: Sequence[str], size: int) -> list[list[int]]:
        """Indices of the questions, at most `size` together, and only those whose prompts are equally long.

        Without padding an answer cannot depend on the length of the questions beside it.
        """
        lengths = [len(self._prompt(question, tokens=1)) for question in questions]
        order = sorted(range(len(questions)), key=lengths.__getitem__)
        groups = [list(group) for _, group in groupby(order, key=lengths.__getitem__)]
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    @torch.inference_mode()
    def prepare(self, images: Sequence[str], questions: Sequence[str]) -> Batch:
        """Read and project the features of each distinct image, write the prompts: what all budgets share."""
        index = {image: position for position, image in enumerate(dict.fromkeys(images))}
        rows = [index[image] for image in images]
        encoded = self._encoded(index)
        packing = Packing(self.model, Tiling((1,) * len(index), self.features.grid))
        packed = packing.tokens(encoded)
        sizes = [len(packed[row]) for row in rows]
        return Batch(
            inputs=self._inputs(map(self._prompt, questions, sizes)),
            blind=self._inputs(self._prompt(question, tokens=0) for question in questions),
            encoded=encoded,
            packed=packed,
            image_of_row=rows,
        )

    @torch.inference_mode()
    def answer(self, batch: Batch, reducer: Reducer, keep: float) -> list[tuple[str, int]]:
        """The answer to each question, and the number of visual tokens the language model saw for it.

        A budget of no token is a prompt without image: its placeholder is left out, and no reducer is asked.
        """
        if budget(keep, batch.encoded.tokens) == 0:
            return [(answer, 0) for answer in self._generate(batch.blind)]
        shorter = self._shorten(batch, choose(reducer, batch.encoded, keep))
        tokens_B = (shorter["input_ids"] == self.model.config.image_token_id).sum(1)
        return list(zip(self._generate(shorter), tokens_B.tolist(), strict=True))

    @torch.inference_mode()
    def masks(self, images: Sequence[str], reducer: Reducer, keep: float) -> dict[str, Any]:
        """What a picture needs to show the tokens kept of each image: grid, keep, and indices by image."""
        keep_BK = choose(reducer, self._encoded(images), keep)
        kept = dict(zip(images, keep_BK.tolist(), strict=True))
        return {"grid": list(self.features.grid), "keep": keep, "masks": kept}

    def _encoded(self, images: Iterable[str]) -> Encoded:
        features_BND = torch.stack([self.features[self.features.index(image)] for image in images])
        return Encoded(features_BND.to(self.model.device), self.features.grid)

    def _shorten(self, batch: Batch, keep_BK: Tensor) -> dict[str, Any]:
        packed = [batch.packed[row] for row in batch.image_of_row]
        stay = [keep_BK[row] for row in batch.image_of_row]
        shorter = shorten(self.model, batch.inputs, packed, stay, self.settings.positions)
        removed = batch.inputs["input_ids"].shape[1] - shorter["input_ids"].shape[1]
        for tokens_ND, stay_K in zip(packed, stay, strict=True):
            assert removed == len(tokens_ND) - len(stay_K), "the sequence is not shorter by what was dropped"
        return shorter

    def _prompt(self, question: str, tokens: int) -> list[int]:
        """Token ids of a question with one image of so many tokens; with none, of the question alone."""
        image = [{"type": "image"}] if tokens else []
        turn = {"role": "user", "content": [*image, {"type": "text", "text": question}]}
        text = self.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        text = text.replace(self.processor.image_token, self.processor.image_token * tokens)
        tokenizer = self.processor.tokenizer
        opened = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids: list[int] = tokenizer(text, add_special_tokens=not opened)["input_ids"]
        return ids

    def _inputs(self, prompts: Iterable[list[int]]) -> dict[str, Tensor]:
        input_ids_BL = torch.tensor(list(prompts), device=self.model.device)
        return {"input_ids": input_ids_BL, "attention_mask": torch.ones_like(input_ids_BL)}

    def _generate(self, inputs: dict[str, Any]) -> list[str]:
        ids_BL = self.model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=self.settings.max_new_tokens
        )
        answers_BL = ids_BL[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(answers_BL, skip_special_tokens=True)
        return [text.strip() for text in texts]
