"""Packed passes against those over single prompts, and the gradients of the weights."""

import pytest
import torch

from atr.config import Evaluate
from atr.core.tokens import mask_of
from atr.reduction import Full
from atr.vlm import weighted_attention
from atr.vlm.generation import Generator
from atr.vlm.inputs import ImageInputs
from atr.vlm.policy import Policy
from atr.vlm.prompted import PromptReader
from atr.vlm.reduce import shorten
from atr.vlm.teacher import answer
from atr.vlm.tiling import ROW_END
from atr.vlm.weighted_attention import log_probabilities
from tests.vlm.test_distillation import BATCH, FAMILIES, Pictures


@pytest.fixture
def reader(model, processor, family):
    return PromptReader(
        Generator(
            model, processor, ImageInputs(model, processor, Pictures(family)), Evaluate(max_new_tokens=3)
        )
    )


def expected_log_probabilities(reader, name, prompt, ids_A, stay_P, positions):
    """The tokens' log probabilities behind a prompt that was shortened to `stay_P`, token by token."""
    model = reader.generator.model
    prepared = reader.generator.source.prepare([[name]], [prompt])
    inputs = prepared.reduce(Full(), Policy(1.0)).inputs
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    longer = {
        "input_ids": torch.cat([ids, ids_A[None, :-1]], 1),
        "attention_mask": torch.cat([mask, mask.new_ones(1, len(ids_A) - 1)], 1),
    }
    shorter = shorten(model, longer, prepared.tokens, [stay_P.nonzero()[:, 0]], positions)
    return model(**shorter).logits[0, -len(ids_A) :].log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("are_read", [False, True], ids=["dropped are not read", "dropped have no weight"])
def test_each_prompt_reads_what_it_would_alone(reader, positions, are_read, monkeypatch):
    monkeypatch.setattr(weighted_attention, "DROPPED_WEIGHT", 1e-12)
    answers, prompted = answer(reader, BATCH), reader.read(BATCH)
    stay = [(tile_P == ROW_END) | (torch.arange(len(tile_P)) % 3 == 1)
            for tile_P in prompted.prepared.layout.tile_of]  # fmt: skip
    sequences = [
        prompted.sequence(row, answers[row], stay_P.float(), stay_P | are_read, positions)
        for row, stay_P in enumerate(stay)
    ]
    expected = [
        expected_log_probabilities(reader, name, prompt, ids_A, stay[row], positions)
        for row, (name, prompts) in enumerate(BATCH)
        for prompt, ids_A in zip(prompts, answers[row].ids, strict=True)
    ]
    actual = log_probabilities(reader.generator.model, sequences)
    torch.testing.assert_close(actual, torch.cat(expected), atol=2e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [63, 64, 65])
def test_padding_changes_nothing(reader, length, monkeypatch):
    answers, prompted = answer(reader, BATCH), reader.read(BATCH)
    all_P = torch.ones(16)
    sequences = [prompted.sequence(row, answers[row], all_P, all_P.bool(), "original") for row in range(3)]
    monkeypatch.setattr(weighted_attention, "_MULTIPLE", 1)
    expected = log_probabilities(reader.generator.model, sequences)
    monkeypatch.setattr(weighted_attention, "_MULTIPLE", length)
    torch.testing.assert_close(log_probabilities(reader.generator.model, sequences), expected)


def test_the_gradient_of_a_weight_agrees_with_finite_differences(reader):
    """Of a dropped token as of a kept one: by finite differences, in float64."""
    reader.generator.model.double()
    [answers], prompted = answer(reader, BATCH[:1]), reader.read(BATCH[:1])
    expected = answers.log_probabilities_AV
    weights = mask_of(torch.tensor([1, 2, 5, 11]), 16).double().requires_grad_()

    def loss(values):
        sequence = prompted.sequence(0, answers, values, torch.ones(16).bool(), "original")
        actual = log_probabilities(reader.generator.model, [sequence])
        return (expected.exp() * (expected - actual)).sum()

    loss(weights).backward()
    for token in (0, 2, 9, 11):
        step = torch.zeros(16).double().index_fill_(0, torch.tensor(token), 2**-14)
        with torch.no_grad():
            slope = (loss(weights + step) - loss(weights - step)) / 2**-13
        assert weights.grad[token] == pytest.approx(slope.item(), rel=0.05, abs=1e-3), token
    assert (weights.grad != 0).all()  # what is gone can come back


@torch.no_grad()
def test_the_models_own_attention_is_in_place_afterwards(reader):
    model = reader.generator.model
    last = model.get_decoder().layers[-1].mlp
    [answers], prompted = answer(reader, BATCH[:1]), reader.read(BATCH[:1])
    all_P = torch.ones(16)
    sequence = prompted.sequence(0, answers, all_P, all_P.bool(), "original")
    for broken in (False, True):
        try:
            log_probabilities(model, [sequence] if not broken else [sequence, None])
        except AttributeError:
            assert broken
        assert model.config.get_text_config()._attn_implementation == "sdpa"
        assert not last._forward_hooks and not last._forward_pre_hooks
