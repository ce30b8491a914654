"""Scores a micro model on a benchmark with all visual tokens."""

from collections.abc import Sequence

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
) -> list[str]:
    """Greedy answers to one-token questions, one per image."""
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
) -> float:
    """Exact match of greedy answers to one question on each of `count` images."""
    samples = [sample(benchmark, split, index, seed) for index in range(count)]
    questions, references = zip(*(item.turns[0] for item in samples), strict=True)
    answers = generate_answers(model, processor, [item.image for item in samples], questions)
    matches = [exact_match(answer, [right]) for answer, right in zip(answers, references, strict=True)]
    return sum(matches) / count
