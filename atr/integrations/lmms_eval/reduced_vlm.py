"""A model with reduced visual tokens that answers conversations with any number of images, without lmms-eval.

Shapes: see atr.core.tokens; L tokens of a batch's longest answer, E end tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig

from atr.core.hub import pretrained_arguments
from atr.integrations.lmms_eval.arguments import DTYPES, Arguments
from atr.integrations.lmms_eval.conversations import Conversation, finish_answer, make_inputs
from atr.integrations.lmms_eval.prompts import Prompt, prompt_of
from atr.integrations.lmms_eval.selector_digest import check_selector_digest
from atr.reduction import FeatureSelector
from atr.vlm.checkpoint import load_vlm
from atr.vlm.compatibility import check_positions, check_selector, warn_of_positions
from atr.vlm.families import family_named, family_of
from atr.vlm.families.rule import Rule
from atr.vlm.reduce import Kept, reduce
from atr.vlm.sequence import TEXT_KEYS, token_types


@dataclass(frozen=True)
class Decoding:
    """Decoding options: greedy at temperature 0, sampling above it; None leaves a value to the model."""

    max_new_tokens: int = 1024
    temperature: float = 0
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float | None = None
    until: tuple[str, ...] = ()

    @classmethod
    def of(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Self:
        """A task's generation_kwargs over a family's defaults; keys other than the fields are ignored."""
        known = {field.name for field in fields(cls)}
        options = {key: value for key, value in {**defaults, **given}.items() if key in known}
        until = options.get("until") or ()
        return cls(**{**options, "until": (until,) if isinstance(until, str) else tuple(until)})

    def as_generate(self) -> dict[str, Any]:
        """Keywords of `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if self.temperature <= 0:
            return {**options, "do_sample": False, "temperature": None, "top_p": None}
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {**options, **sampling, **({"top_k": self.top_k} if self.top_k is not None else {})}


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
    prompt: Prompt

    @classmethod
    def load(cls, arguments: Arguments, device: torch.device) -> Self:
        """Load all three, the small files first, so that a selector that does not fit is refused at once.

        Raises ValueError for a path that is not a checkpoint, an unsupported model family, positions that the
        model does not allow, arguments that lmms-eval has not for the family, and a selector that does not
        fit or has another digest.
        """
        selector = FeatureSelector.from_pretrained(arguments.selector)
        check_selector_digest(arguments.selector_digest, selector)
        config = _config(arguments.pretrained)
        prompt = prompt_of(config.model_type, arguments)
        if not isinstance(family_named(config.model_type), Rule):  # which is asked of the model itself
            _check(SimpleNamespace(config=config, name_or_path=arguments.pretrained), selector, arguments)
        dtype = DTYPES[arguments.dtype] or config.dtype or torch.float32
        model, processor = load_vlm(arguments.pretrained, dtype, arguments.attn_implementation)
        _check(model, selector, arguments)
        warn_of_positions(selector, arguments.positions)
        return cls(model.to(device), processor, selector.eval().to(device), arguments, prompt)

    @torch.inference_mode()
    def answer(self, conversations: Sequence[Conversation], decoding: Decoding) -> list[Answer]:
        """Answer a batch of conversations in the format of transformers' chat templates, including images.

        They are asked as by lmms-eval's own class for the model's family.

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
            policy.bounds,
        )
        answers_BL = self._generate(reduced, decoding)
        texts = self.processor.batch_decode(answers_BL, skip_special_tokens=True)
        input_tokens = reduced["attention_mask"].sum(1).tolist()
        kept = iter(reduced.kept)
        return [
            Answer(
                finish_answer(text, self.prompt, decoding.until),
                tuple(next(kept) for _ in range(_count_images(conversation))),
                *counts,
            )
            for text, conversation, *counts in zip(
                texts, conversations, input_tokens, self._count_output_tokens(answers_BL), strict=True
            )
        ]

    def _inputs(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        inputs = make_inputs(self.processor, self.prompt, conversations)
        keys = TEXT_KEYS | family_of(self.model).image_keys(self.model) | token_types(self.model)
        return {key: value.to(self.model.device) for key, value in inputs.items() if key in keys}

    def _generate(self, reduced: Any, decoding: Decoding) -> Tensor:
        """Token ids of the answers, without the prompts; (B, L)."""
        ids_BL = self.model.generate(**reduced, **decoding.as_generate())
        answers_BL: Tensor = ids_BL[:, reduced["input_ids"].shape[1] :]
        return answers_BL

    def _count_output_tokens(self, answers_BL: Tensor) -> list[int]:
        """Tokens of each answer up to and including its end token; the rest is padding."""
        ends = self.model.generation_config.eos_token_id
        ends_E = torch.tensor([] if ends is None else ends, device=answers_BL.device).long()
        end_BL = torch.isin(answers_BL, ends_E).long()
        counts: list[int] = (end_BL.cumsum(1) - end_BL == 0).sum(1).tolist()
        return counts


def _check(model: Any, selector: FeatureSelector, arguments: Arguments) -> None:
    """Raise ValueError for positions and a selector that the model has no use for."""
    check_positions(model, arguments.positions)
    check_selector(model, selector)


def _config(path: str) -> Any:
    try:
        return AutoConfig.from_pretrained(**pretrained_arguments(path))
    except OSError as error:
        raise ValueError(
            f"pretrained: {path!r} is not a model: {error}, allowed: a folder or hub id"
        ) from error


def _count_images(conversation: list[dict[str, Any]]) -> int:
    return sum(item["type"] == "image" for turn in conversation for item in turn["content"])
