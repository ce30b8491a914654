"""A LLaVA with reduced visual tokens that answers conversations with any number of images, without lmms-eval.

Shapes: see atr.core.tokens; L tokens of a batch's longest answer, E end tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig

from atr.core.hub import pretrained_arguments
from atr.integrations.lmms_eval.arguments import DTYPES, Arguments
from atr.integrations.lmms_eval.selector_digest import check_selector_digest
from atr.reduction import FeatureSelector
from atr.vlm.checkpoint import load_vlm
from atr.vlm.compatibility import check_positions, check_selector, warn_of_positions
from atr.vlm.families import family_of
from atr.vlm.reduce import Kept, reduce


@dataclass(frozen=True)
class Decoding:
    """Decoding options, with the usual defaults: greedy at temperature 0, sampling above it."""

    max_new_tokens: int = 1024
    temperature: float = 0
    top_p: float | None = None
    num_beams: int = 1


@dataclass(frozen=True)
class Answer:
    """An answer, the tokens kept of each image of its question, and numbers of input and output tokens."""

    text: str
    kept: tuple[Kept, ...]
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class ReducedVlm:
    """A frozen model, its processor, and the selector that chooses its visual tokens."""

    model: Any
    processor: Any
    selector: FeatureSelector
    arguments: Arguments

    @classmethod
    def load(cls, arguments: Arguments, device: torch.device) -> Self:
        """Load all three, the small files first, so that a selector that does not fit is refused at once.

        Raises ValueError for a path that is not a checkpoint, an unsupported model family, positions that the
        model does not allow, and a selector that does not fit or has another digest.
        """
        selector = FeatureSelector.from_pretrained(arguments.selector)
        check_selector_digest(arguments.selector_digest, selector)
        config = _config(arguments.pretrained)
        unloaded = SimpleNamespace(config=config, name_or_path=arguments.pretrained)
        family_of(unloaded)
        check_positions(unloaded, arguments.positions)
        check_selector(unloaded, selector)
        warn_of_positions(selector, arguments.positions)
        dtype = DTYPES[arguments.dtype] or config.dtype or torch.float32
        model, processor = load_vlm(arguments.pretrained, dtype, arguments.attn_implementation)
        check_selector(model, selector)
        return cls(model.to(device), processor, selector.eval().to(device), arguments)

    @torch.inference_mode()
    def answer(self, conversations: Sequence[list[dict[str, Any]]], decoding: Decoding) -> list[Answer]:
        """Answer a batch of conversations in the format of transformers' chat templates, including images.

        Raises ValueError for a text that contains the image placeholder.
        """
        inputs = self._inputs(conversations)
        policy = self.arguments.policy
        reduced = reduce(
            self.model,
            inputs,
            self.selector,
            policy.keep,
            policy.positions,
            policy.budget,
            policy.newline,
            self.arguments.interpolation,
        )
        answers_BL = self._generate(reduced, decoding)
        texts = self.processor.batch_decode(answers_BL, skip_special_tokens=True)
        input_tokens = reduced["attention_mask"].sum(1).tolist()
        kept = iter(reduced.kept)
        return [
            Answer(text.strip(), tuple(next(kept) for _ in range(_count_images(conversation))), *counts)
            for text, conversation, *counts in zip(
                texts, conversations, input_tokens, self._count_output_tokens(answers_BL), strict=True
            )
        ]

    def _inputs(self, conversations: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        keys = {"input_ids", "attention_mask"} | family_of(self.model).image_keys(self.model)
        return {key: value.to(self.model.device) for key, value in inputs.items() if key in keys}

    def _generate(self, reduced: Any, decoding: Decoding) -> Tensor:
        """Token ids of the answers, without the prompts; (B, L)."""
        do_sample = decoding.temperature > 0
        ids_BL = self.model.generate(
            **reduced,
            do_sample=do_sample,
            temperature=decoding.temperature if do_sample else None,
            top_p=decoding.top_p,
            num_beams=decoding.num_beams,
            max_new_tokens=decoding.max_new_tokens,
        )
        answers_BL: Tensor = ids_BL[:, reduced["input_ids"].shape[1] :]
        return answers_BL

    def _count_output_tokens(self, answers_BL: Tensor) -> list[int]:
        """Tokens of each answer up to and including its end token; the rest is padding."""
        ends = self.model.generation_config.eos_token_id
        ends_E = torch.tensor([] if ends is None else ends, device=answers_BL.device).long()
        end_BL = torch.isin(answers_BL, ends_E).long()
        counts: list[int] = (end_BL.cumsum(1) - end_BL == 0).sum(1).tolist()
        return counts


def _config(path: str) -> Any:
    try:
        return AutoConfig.from_pretrained(**pretrained_arguments(path))
    except OSError as error:
        raise ValueError(
            f"pretrained: {path!r} is not a model: {error}, allowed: a folder or hub id"
        ) from error


def _count_images(conversation: list[dict[str, Any]]) -> int:
    return sum(item["type"] == "image" for turn in conversation for item in turn["content"])
