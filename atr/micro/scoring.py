"""Scores a micro model on a benchmark."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from atr.benchmarks.metrics import exact_match
from atr.micro.world import sample


@torch.inference_mode()
def generate_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Image],
    questions: Sequence[str],
    batch_size: int = 64,
    shorten: Callable[[Any], Mapping[str, Any]] = dict,
) -> list[str]:
    """Greedy answers to one-token questions, one per image; `shorten` drops visual tokens of the inputs."""
    answers: list[str] = []
    for start in range(0, len(images), batch_size):
        batch = slice(start, start + batch_size)
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            )
            for question in questions[batch]
        ]
        inputs = processor(images=list(images[batch]), text=prompts, return_tensors="pt").to(model.device)
        inputs = shorten(inputs)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def score_benchmark(
    processor: LlavaProcessor,
    model: LlavaForConditionalGeneration,
    benchmark: str,
    split: str,
    count: int,
    seed: int,
    shorten: Callable[[Any], Mapping[str, Any]] = dict,
) -> float:
    """Exact match of greedy answers to one question on each of `count` images; `shorten` drops tokens."""
    samples = [sample(benchmark, split, index, seed) for index in range(count)]
    questions, references = zip(*(item.turns[0] for item in samples), strict=True)
    images = [item.image for item in samples]
    answers = generate_answers(model, processor, images, questions, shorten=shorten)
    matches = [exact_match(answer, [right]) for answer, right in zip(answers, references, strict=True)]
    return sum(matches) / count
