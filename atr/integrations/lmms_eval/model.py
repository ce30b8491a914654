"""The model class that lmms-eval instantiates and asks for answers."""

import time
from collections.abc import Sequence
from typing import Any, Never

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from loguru import logger
from tqdm import tqdm

from atr.integrations.lmms_eval.arguments import Arguments
from atr.integrations.lmms_eval.reduced_vlm import Answer, Decoding, ReducedVlm

MEDIA = ("text", "image")


class Atr(lmms):  # type: ignore[misc]
    """A model of any supported family with its visual tokens reduced by a trained selector.

    Arguments and their errors: `atr.integrations.lmms_eval.arguments.Arguments`. Each of several
    processes holds a whole model. Questions are asked, and answers cut, as by lmms-eval's own class for the
    family (`atr.integrations.lmms_eval.prompts`). Of a task's generation_kwargs only the fields of `Decoding`
    are used. An answer ends with the end token or at max_new_tokens.

    A question that cannot be answered ends the evaluation with an error that names it, because lmms-eval has
    no missing answers and would score an empty one.
    """

    is_simple = False

    def __init__(self, **given: Any) -> None:
        super().__init__()
        arguments = Arguments.of(given)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(arguments.device or self.accelerator.device)
        self.batch_size = arguments.batch_size
        self.vlm = ReducedVlm.load(arguments, self.device)
        logger.info(f"atr: {arguments}")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer questions, in batches with equal generation_kwargs.

        Raises RuntimeError naming the questions of a batch that failed.
        """
        order = Collator([request.args for request in requests], lambda _: 0, lambda args: args[2], True)
        answers: list[Answer] = []
        start = time.perf_counter()
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as progress:
            for batch in order.get_batched(n=self.batch_size):
                answers += self._answer(batch)
                progress.update(len(batch))
        _log_kept_tokens(answers, time.perf_counter() - start)
        results = [
            GenerationResult(
                answer.text,
                TokenCounts(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens),
            )
            for answer in answers
        ]
        ordered: list[GenerationResult] = order.get_original(results)
        return ordered

    def loglikelihood(self, requests: list[Instance]) -> Never:
        """Not supported: raises NotImplementedError."""
        raise NotImplementedError("atr: output_type loglikelihood is not supported, allowed: generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> Never:
        """Not supported: raises NotImplementedError."""
        raise NotImplementedError(
            "atr: output_type generate_until_multi_round is not supported, allowed: generate_until"
        )

    def _answer(self, batch: Sequence[tuple[Any, ...]]) -> list[Answer]:
        names = [f"{task} {split} {doc_id}" for _, _, _, doc_id, task, split in batch]
        try:
            conversations = [self._conversation(*request) for request in batch]
            answers = self.vlm.answer(conversations, Decoding.of(self.vlm.prompt.decoding, batch[0][2]))
        except Exception as error:
            raise RuntimeError(f"no answer to {', '.join(names)}: {error}") from error
        for name, answer in zip(names, answers, strict=True):
            kept = ", ".join(f"{image.tokens} of {image.of}" for image in answer.kept)
            logger.debug(f"atr: {name}: visual tokens kept: {kept or 'no image'}")
        return answers

    def _conversation(
        self, context: str, to_messages: Any, generation: Any, doc_id: int, task: str, split: str
    ) -> list[dict[str, Any]]:
        _use_wording(to_messages, self.vlm.prompt.model)
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        media = {item.type for message in messages.messages for item in message.content}
        if unsupported := sorted(media - set(MEDIA)):
            raise ValueError(f"content: {unsupported[0]} is not supported, allowed: {', '.join(MEDIA)}")
        conversation: list[dict[str, Any]] = messages.to_hf_messages()
        return conversation


def _use_wording(to_messages: Any, model: str) -> None:
    """Make a task use the wording it has for lmms-eval's own class: it looked for one for ours, by name."""
    task: Any = getattr(to_messages, "__self__", None)
    config = getattr(task, "config", None)
    wordings = getattr(config, "lmms_eval_specific_kwargs", None) or {}
    if model in wordings:
        task.lmms_eval_specific_kwargs = wordings[model]


def _log_kept_tokens(answers: Sequence[Answer], seconds: float) -> None:
    """Log the numbers of kept tokens, also through lmms-eval, which writes them to its results."""
    images = [image for answer in answers for image in answer.kept]
    output_tokens = sum(answer.output_tokens for answer in answers)
    kept, of = sum(image.tokens for image in images), sum(image.of for image in images)
    fed = kept + sum(image.newlines for image in images)
    logger.info(f"atr: {len(answers)} questions, {len(images)} images, visual tokens kept: {kept} of {of}")
    totals = {"visual_tokens_kept": kept, "visual_tokens_fed": fed, "visual_tokens": of}
    per_image = {name: total / len(images) for name, total in totals.items()} if images else {}
    log_metrics(seconds, output_tokens, output_tokens / seconds, per_image)
