"""The teacher's answers against the model's own generation, and the files they are kept in."""

import pytest
import torch

from atr.config import Evaluate
from atr.reduction import Full
from atr.vlm import teacher
from atr.vlm.generation import Generator
from atr.vlm.inputs import ImageInputs
from atr.vlm.prompted import Answers, PromptReader
from atr.vlm.teacher import StoredAnswers, answer
from tests.vlm.test_distillation import BATCH, FAMILIES, Pictures


@pytest.fixture
def reader(model, processor, family):
    return PromptReader(
        Generator(
            model, processor, ImageInputs(model, processor, Pictures(family)), Evaluate(max_new_tokens=4)
        )
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_answers_are_those_of_the_generator(reader, attention):
    reader.generator.model.set_attn_implementation(attention)
    decode = reader.generator.processor.decode
    for (name, prompts), answers in zip(BATCH, answer(reader, BATCH), strict=True):
        for prompt, ids_A in zip(prompts, answers.ids, strict=True):
            [(expected, *_)] = reader.generator.answer(
                reader.generator.prepare([[name]], [prompt]), Full(), 1.0
            )
            assert decode(ids_A, skip_special_tokens=True).strip() == expected


def test_log_probabilities_are_those_of_the_answers_tokens(reader):
    for answers in answer(reader, BATCH):
        assert torch.equal(answers.log_probabilities_AV.argmax(1), torch.cat(answers.ids))
        assert answers.log_probabilities_AV.exp().sum(1).allclose(torch.ones(()))


def test_an_answer_ends_with_its_end_token_and_does_not_change_the_others(reader):
    whole = answer(reader, BATCH)
    ends = whole[0].ids[0][1].item()
    reader.generator.model.generation_config.eos_token_id = [ends]
    for before, now in zip(whole, answer(reader, BATCH), strict=True):
        for ids_A, cut_A in zip(before.ids, now.ids, strict=True):
            listed = ids_A.tolist()
            assert cut_A.tolist() == listed[: listed.index(ends) + 1] if ends in listed else listed


def test_a_placeholder_that_the_model_spells_out_ends_the_answer(reader):
    config = reader.generator.model.config
    head = reader.generator.model.lm_head.weight
    with torch.no_grad():
        head.zero_()
        head[config.image_token_id] = 1.0
        head[5] = -1.0
    found = [ids_A == config.image_token_id for answers in answer(reader, BATCH) for ids_A in answers.ids]
    assert any(is_placeholder_A[-1] for is_placeholder_A in found)
    assert not any(is_placeholder_A[:-1].any() for is_placeholder_A in found)


def test_stored_answers_are_read_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "IMAGES_PER_FILE", 2)
    images = [(f"image {index}", ["a"] * (index + 1)) for index in range(5)]
    stored = StoredAnswers(tmp_path, images)
    ids = [[torch.arange(1 + place) for place in range(len(prompts))] for _, prompts in images]
    answers = [Answers(part, torch.randn(len(torch.cat(part)), 7)) for part in ids]
    assert stored.files == 3 and list(stored.images_of(2)) == [4]
    for number in range(stored.files):
        assert not stored.has(number)
        stored.write(number, [answers[index] for index in stored.images_of(number)])
    for (name, _), expected in zip(images, answers, strict=True):
        found = StoredAnswers(tmp_path, images)[name]
        assert torch.equal(found.log_probabilities_AV, expected.log_probabilities_AV)
        assert all(map(torch.equal, found.ids, expected.ids)) and len(found.ids) == len(expected.ids)


def test_a_prompt_is_tokenized_once(reader, monkeypatch):
    first = reader.read(BATCH)
    monkeypatch.setattr("atr.vlm.prompted.Prompts", None)
    again = reader.read(BATCH)
    assert [[ids_T.tolist() for ids_T in part] for part in again.prompts] == [
        [ids_T.tolist() for ids_T in part] for part in first.prompts
    ]
