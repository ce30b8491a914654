"""Images in front of their prompts: the sequences that teacher and student of a distillation read.

A prompt is split behind its image. What stands before is the same for all prompts of an image, its prefix.
Shapes: P packed tokens of an image, L tokens of a prefix, T tokens of a prompt behind its image or of a
sequence, A answer tokens, V words of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from atr.vlm.compatibility import is_ruled
from atr.vlm.families import Layer
from atr.vlm.generation import Generator
from atr.vlm.inputs import Prompts
from atr.vlm.prefix import ALL_BRANCHES
from atr.vlm.processors import make_token_types, read_images
from atr.vlm.reduce import Prepared
from atr.vlm.sequence import position_ids
from atr.vlm.weighted_attention import WeightedSequence

_SAMPLE = Image.new("RGB", (97, 61))

PromptedImage = tuple[str, list[str]]
"""The name of an image and its prompts."""


@dataclass(frozen=True)
class Answers:
    """Answers to the prompts of an image: their token ids, and log probabilities at each token of all.

    An answer ends with its end token, unless it was cut off.
    """

    ids: list[Tensor]
    log_probabilities_AV: Tensor

    def to(self, device: torch.device) -> "Answers":
        """The same on a device."""
        return Answers([ids_A.to(device) for ids_A in self.ids], self.log_probabilities_AV.to(device))


@dataclass(frozen=True)
class PromptedBatch:
    """Images with all visual tokens, the ids (L,) of their prefixes, and those (T,) of their prompts.

    A row of `prefixes` and `prompts` is about the image of its place in `prepared.image_of`. `positions` are
    the position ids of the prefixes and of the token behind each, (L + 1,) or (axes, L + 1), as the model
    numbers them.
    """

    prepared: Prepared
    prefixes: list[Tensor]
    prompts: list[list[Tensor]]
    positions: list[Tensor]
    processor: Any = None

    def token_types(self, ids_BL: Tensor) -> dict[str, Tensor]:
        """The token types (B, L) that the model reads."""
        return make_token_types(self.processor, self.prepared.model, ids_BL)

    def sequence(
        self, row: int, answers: Answers, weight_P: Tensor, read_P: Tensor, positions: str
    ) -> WeightedSequence:
        """The packed tokens `read_P` of a row's image with their weights, and each prompt with its answer.

        With contiguous positions, tokens of weight 0 take none.
        """
        ids_L, device = self.prefixes[row], weight_P.device
        visual_L = ids_L == self.prepared.model.config.image_token_id
        weight_L = torch.ones(len(ids_L), dtype=weight_P.dtype, device=device).masked_scatter(
            visual_L, weight_P
        )
        read_L = torch.ones_like(visual_L).masked_scatter(visual_L, read_P)
        places_L, start = self._places(row, weight_L > 0.5, positions)
        ids, places, predicts = [ids_L[read_L]], [places_L[..., read_L]], []
        branches, length = [torch.full_like(ids[0], ALL_BRANCHES)], len(ids[0])
        for branch, (prompt_T, answer_A) in enumerate(zip(self.prompts[row], answers.ids, strict=True)):
            # A token is predicted at the place before it, so that the last one is not read.
            ids_T = torch.cat([prompt_T, answer_A[:-1]])
            place_T = torch.arange(len(ids_T), device=device)
            ids.append(ids_T)
            places.append(start[..., None] + place_T)
            branches.append(torch.full_like(ids_T, branch))
            predicts.append(length + place_T[len(prompt_T) - 1 :])
            length += len(ids_T)
        weight_T = torch.cat([weight_L[read_L], weight_L.new_ones(length - len(ids[0]))])
        ids_T, branch_T = torch.cat(ids), torch.cat(branches)
        image = self.prepared.tokens.of([self.prepared.image_of[row]])
        types = {name: types_1T[0] for name, types_1T in self.token_types(ids_T[None]).items()}
        return WeightedSequence(
            ids_T,
            torch.cat(places, dim=-1),
            branch_T,
            weight_T,
            image.images[0][read_P],
            torch.cat(predicts),
            [level[0][read_P] for level in image.levels],
            image.carried,
            types,
        )

    def _places(self, row: int, kept_L: Tensor, positions: str) -> tuple[Tensor, Tensor]:
        """Position ids of a prefix, (L,) or (axes, L), and of the token behind it, () or (axes,)."""
        if positions == "contiguous":
            return (kept_L.cumsum(0) - 1).clamp(min=0), kept_L.sum()
        own = self.positions[row]
        return own[..., :-1], own[..., -1]


@dataclass(frozen=True)
class PromptReader:
    """Encodes images and tokenizes their prompts, each prompt once.

    `layer` is what the selector reads of an image, as in `VisualInputs.prepare`.
    """

    generator: Generator
    layer: Layer = None
    _prompts: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def read(self, batch: Sequence[PromptedImage]) -> PromptedBatch:
        """The images with all visual tokens, and their prompts.

        Raises ValueError if the text behind the visual tokens of an image depends on the image.
        """
        model = self.generator.model
        # The prefix is that of the first prompt.
        prepared = self.generator.source.prepare(
            [[name] for name, _ in batch], [prompts[0] for _, prompts in batch], layer=self.layer
        )
        prefixes, places = [], []
        positions_ABL = position_ids(model, prepared.inputs)
        inputs = prepared.inputs["input_ids"], prepared.inputs["attention_mask"].bool()
        prompts = [[self._prompt(prompt) for prompt in prompts] for _, prompts in batch]
        for row, (ids_L, real_L) in enumerate(zip(*inputs, strict=True)):
            prefix_L, behind_T = self._split(ids_L[real_L])
            if not torch.equal(behind_T, prompts[row][0]):
                kind = model.config.model_type
                raise ValueError(f"{kind} cannot teach: the end of an image's text depends on the image")
            prefixes.append(prefix_L)
            places.append(positions_ABL[..., row, real_L][..., : len(prefix_L) + 1])
        return PromptedBatch(prepared, prefixes, prompts, places, self.generator.processor)

    def _prompt(self, prompt: str) -> Tensor:
        if prompt not in self._prompts:
            prompts = Prompts(self.generator.processor)
            tokens = prompts.tokenize([prompts.expand(prompt, [self._end_of_image])], self.generator.model)
            self._prompts[prompt] = self._split(tokens["input_ids"][0])[1]
        return self._prompts[prompt]

    @cached_property
    def _end_of_image(self) -> str:
        """The last placeholder of an image, and the text that the processor writes behind it."""
        processor, model = self.generator.processor, self.generator.model
        if not is_ruled(model):
            return str(processor.image_token)
        _, (written,) = read_images(
            processor, [[_SAMPLE]], [Prompts(processor).text("", 1)], return_tensors="pt"
        )
        placeholder = str(processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id))
        return placeholder + written.rpartition(placeholder)[2]

    def _split(self, ids_L: Tensor) -> tuple[Tensor, Tensor]:
        """The ids up to the last placeholder, and those behind it."""
        end = int((ids_L == self.generator.model.config.image_token_id).nonzero()[-1]) + 1
        return ids_L[:end], ids_L[end:]
