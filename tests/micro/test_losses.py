import math

import pytest
import torch

from atr.micro.losses import DigitHeads, answer_loss, name_loss
from atr.micro.targets import IGNORE


@torch.no_grad()
def test_each_place_of_a_number_has_its_own_head():
    """The loss is the mean over the places of patches with text."""
    heads = DigitHeads(64)
    states = torch.randn(1, 3, 64)
    digits = torch.tensor([[[3, 9, 0, 0], [IGNORE] * 4, [1, 0, 0, 0]]])
    normed = torch.nn.functional.layer_norm(states[0], (64,))
    expected = [
        -head(normed[patch]).log_softmax(-1)[digits[0, patch, place]]
        for patch in (0, 2)
        for place, head in enumerate(heads.heads)
    ]
    torch.testing.assert_close(heads.loss(states, digits), torch.stack(expected).mean())
    assert heads.loss(states, torch.full_like(digits, IGNORE)) == 0


@torch.no_grad()
def test_a_patch_without_text_weighs_a_tenth_of_one_with_it():
    embedding = torch.randn(12, 64)
    states, names = torch.randn(1, 3, 64), torch.tensor([[[7, 7], [8, 9], [10, 10]]])
    log = (torch.nn.functional.layer_norm(states[0], (64,)) @ embedding.T).log_softmax(-1)
    of = [-log[0, 7], -(log[1, 8] + log[1, 9]) / 2, -log[2, 10]]
    loss = name_loss(states, embedding, names, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(loss, (of[0] + 0.1 * of[1] + of[2]) / 2.1)


def test_long_answers_weigh_no_more_than_short_ones():
    """Two samples with losses 0 and log 2 weigh the same, whatever their lengths."""
    logits = torch.zeros(2, 5, 2)
    logits[0, :, 1] = 100.0
    labels = torch.tensor([[1, 1, 1, 1, 1], [1, IGNORE, IGNORE, IGNORE, IGNORE]])
    assert answer_loss(logits, labels).item() == pytest.approx(math.log(2) / 2)
