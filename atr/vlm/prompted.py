"""Images in front of their prompts: the sequences that teacher and student of a distillation read.

A prompt is split behind its image. What stands before is the same for all prompts of an image, its prefix.
Shapes: P packed tokens of an image, L tokens of a prefix, T tokens of a prompt behind its image or of a
sequence, A answer tokens, V words of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atr.vlm.generation import Generator
from atr.vlm.inputs import Prompts
from atr.vlm.prefix import ALL_BRANCHES
from atr.vlm.reduce import Prepared
from atr.vlm.weighted_attention import WeightedSequence

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

    A row of `prefixes` and `prompts` is about the image of its place in `prepared.image_of`.
    """

    prepared: Prepared
    prefixes: list[Tensor]
    prompts: list[list[Tensor]]

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
        counted_L = weight_L > 0.5 if positions == "contiguous" else torch.ones_like(visual_L)
        ids, places, predicts = [ids_L[read_L]], [(counted_L.cumsum(0) - 1).clamp(min=0)[read_L]], []
        branches, start, length = [torch.full_like(ids[0], ALL_BRANCHES)], int(counted_L.sum()), len(ids[0])
        for branch, (prompt_T, answer_A) in enumerate(zip(self.prompts[row], answers.ids, strict=True)):
            # A token is predicted at the place before it, so that the last one is not read.
            ids_T = torch.cat([prompt_T, answer_A[:-1]])
            place_T = torch.arange(len(ids_T), device=device)
            ids.append(ids_T)
            places.append(start + place_T)
            branches.append(torch.full_like(ids_T, branch))
            predicts.append(length + place_T[len(prompt_T) - 1 :])
            length += len(ids_T)
        weight_T = torch.cat([weight_L[read_L], weight_L.new_ones(length - len(ids[0]))])
        tokens_KD = self.prepared.tokens.images[self.prepared.image_of[row]][read_P]
        ids_T, positions_T, branch_T = (torch.cat(parts) for parts in (ids, places, branches))
        return WeightedSequence(ids_T, positions_T, branch_T, weight_T, tokens_KD, torch.cat(predicts))


@dataclass(frozen=True)
class PromptReader:
    """Encodes images and tokenizes their prompts, each prompt once."""

    generator: Generator
    _prompts: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def read(self, batch: Sequence[PromptedImage]) -> PromptedBatch:
        """The images with all visual tokens, and their prompts."""
        # The prefix is that of the first prompt.
        prepared = self.generator.source.prepare(
            [[name] for name, _ in batch], [prompts[0] for _, prompts in batch]
        )
        inputs = prepared.inputs["input_ids"], prepared.inputs["attention_mask"].bool()
        prefixes = [self._split(ids_L[real_L])[0] for ids_L, real_L in zip(*inputs, strict=True)]
        return PromptedBatch(
            prepared, prefixes, [[self._prompt(prompt) for prompt in prompts] for _, prompts in batch]
        )

    def _prompt(self, prompt: str) -> Tensor:
        if prompt not in self._prompts:
            prompts = Prompts(self.generator.processor)
            tokens = prompts.tokenize([prompts.text(prompt, 1)], self.generator.model.device)
            self._prompts[prompt] = self._split(tokens["input_ids"][0])[1]
        return self._prompts[prompt]

    def _split(self, ids_L: Tensor) -> tuple[Tensor, Tensor]:
        """The ids up to the last placeholder, and those behind it."""
        end = int((ids_L == self.generator.model.config.image_token_id).nonzero()[-1]) + 1
        return ids_L[:end], ids_L[end:]
