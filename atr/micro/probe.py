"""Which layer of a frozen tower can be read from: a small probe on each names the characters in the patches.

Shapes: L layers, P patches in which something is written, D width of the tower, C characters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from atr.features.encoder import Encoder
from atr.micro.curriculum import BLANK, CHARACTERS, Collator, Lesson

HIDDEN = 256
"""Channels of the probe's hidden layer."""
EPOCHS, BATCH, RATE = 12, 512, 2e-3


@dataclass(frozen=True)
class Written:
    """The patches of some lessons that bear characters, as every layer gives them."""

    states_LPD: Tensor
    """bfloat16, as the store keeps them; layer 1 of the tower first."""
    characters_P2: Tensor
    """The first and second character in each patch, BLANK where there is no second."""


@torch.inference_mode()
def written(encoder: Encoder, lessons: Sequence[Lesson], collate: Collator, batch_size: int = 16) -> Written:
    """The patches with characters of `lessons`, at all layers that `encoder` runs.

    Raises ValueError where there are none.
    """
    states, characters = [], []
    for start in range(0, len(lessons), batch_size):
        batch = [lessons[index] for index in range(start, min(start + batch_size, len(lessons)))]
        characters_BN2 = torch.stack([collate.characters(lesson) for lesson in batch])
        written_BN = (characters_BN2 != BLANK).any(-1)
        of_layers = encoder.states(encoder.preprocess([lesson.image for lesson in batch]))
        states.append(torch.stack([state_BND[written_BN].bfloat16() for state_BND in of_layers]))
        characters.append(characters_BN2[written_BN])
    found = Written(torch.cat(states, dim=1), torch.cat(characters))
    if not len(found.characters_P2):
        raise ValueError(f"nothing is written in {len(lessons)} lessons: more of them are needed")
    return found


def accuracies(training: Written, held_out: Written, seed: int) -> list[float]:
    """Of each layer, the fraction of held-out characters that a two-layer probe trained on it names right."""
    layers = zip(training.states_LPD, held_out.states_LPD, strict=True)
    return [
        _accuracy(_train(seen_PD, training.characters_P2, seed), unseen_PD, held_out.characters_P2)
        for seen_PD, unseen_PD in layers
    ]


def _train(states_PD: Tensor, characters_P2: Tensor, seed: int) -> nn.Module:
    width = states_PD.shape[-1]
    classes = 2 + len(CHARACTERS)
    torch.manual_seed(seed)
    probe = nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2 * classes)
    )
    loader = DataLoader(TensorDataset(states_PD, characters_P2), BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(probe.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for state_BD, character_B2 in loader:
            logits_BC2 = probe(state_BD.float()).unflatten(-1, (classes, 2))
            torch.autograd.backward(functional.cross_entropy(logits_BC2, character_B2))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return probe


@torch.inference_mode()
def _accuracy(probe: nn.Module, states_PD: Tensor, characters_P2: Tensor) -> float:
    """Blank slots do not count: a patch with one character is one character to be named."""
    said_P2 = probe(states_PD.float()).unflatten(-1, (-1, 2)).argmax(1)
    is_written_P2 = characters_P2 != BLANK
    right: float = (said_P2 == characters_P2)[is_written_P2].float().mean().item()
    return right
