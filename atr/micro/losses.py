"""Losses of the micro models, on answers and on the content of each image patch.

Shapes: B images, N patches, D width, L text tokens, V vocabulary, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from atr.micro.targets import BLANK, CHARACTERS, DIGITS, IGNORE, LONGEST_NUMBER

NO_TEXT_WEIGHT = 0.1
"""Weight of a patch without text; such patches are many, and all of a region have the same target."""


def answer_loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Cross-entropy averaged over each sample's answer tokens, then over samples.

    Thus long answers weigh no more than short ones.
    """
    losses_BL = functional.cross_entropy(
        logits_BLV.transpose(1, 2).float(), labels_BL, ignore_index=IGNORE, reduction="none"
    )
    answers_BL = labels_BL != IGNORE
    return (losses_BL.sum(1) / answers_BL.sum(1)).mean()


def name_loss(states_BND: Tensor, embedding_VD: Tensor, names_BN2: Tensor, has_text_BN: Tensor) -> Tensor:
    """Cross-entropy of each patch's state against the embeddings of the two names of its content.

    A patch of text has two names: the question that its line answers, and its word. Without this loss the
    language model learns to read, but confuses the lines of a page for a long time.
    """
    logits_BNV = functional.linear(normalise_states(states_BND), embedding_VD)
    weights_BN2 = torch.where(has_text_BN, 1.0, NO_TEXT_WEIGHT).unsqueeze(-1).expand_as(names_BN2)
    return _two_slot_loss([logits_BNV] * 2, names_BN2, weights_BN2)


class CharacterHeads(nn.Module):
    """Two linear heads that predict the first two characters of each patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, 2 + len(CHARACTERS)) for _ in range(2))

    def loss(self, states_BND: Tensor, characters_BN2: Tensor) -> Tensor:
        """Cross-entropy, averaged over the two characters."""
        logits = [head(normalise_states(states_BND)) for head in self.heads]
        weights_BN2 = torch.where(characters_BN2 == BLANK, NO_TEXT_WEIGHT, 1.0)
        return _two_slot_loss(logits, characters_BN2, weights_BN2)


class DigitHeads(nn.Module):
    """One linear head per place of a number: a patch of text predicts the digits of its line up to itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, 1 + len(DIGITS)) for _ in range(LONGEST_NUMBER))

    def loss(self, states_BND: Tensor, digits_BN4: Tensor) -> Tensor:
        """Cross-entropy, averaged over places and patches of text; zero if no patch has text."""
        logits_BN4C = torch.stack([head(normalise_states(states_BND)) for head in self.heads], dim=2)
        logits, digits = logits_BN4C.flatten(0, 2).float(), digits_BN4.flatten()
        total = functional.cross_entropy(logits, digits, ignore_index=IGNORE, reduction="sum")
        return total / (digits != IGNORE).sum().clamp(min=1)


def normalise_states(states_BND: Tensor) -> Tensor:
    """Layer norm without parameters: tower and projector end without one, and features grow in training."""
    return functional.layer_norm(states_BND, states_BND.shape[-1:])


def _two_slot_loss(logits: Sequence[Tensor], targets_BN2: Tensor, weights_BN2: Tensor) -> Tensor:
    """Mean over two slots, each with its logits_BNC, of the weighted mean cross-entropy."""
    losses_BN2 = torch.stack(
        [
            functional.cross_entropy(logits_BNC.transpose(1, 2).float(), target_BN, reduction="none")
            for logits_BNC, target_BN in zip(logits, targets_BN2.unbind(-1), strict=True)
        ],
        dim=-1,
    )
    return ((losses_BN2 * weights_BN2).sum((0, 1)) / weights_BN2.sum((0, 1))).mean()
