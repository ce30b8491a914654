"""Probes each layer of a frozen tower for the characters in its patches, to choose the layer to read.

Shapes: L layers, P patches of text, D width of the tower, C classes of characters.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from atr.features.encoder import Encoder
from atr.micro.drawing import Sample
from atr.micro.targets import BLANK, CHARACTERS, Collator

HIDDEN = 256
"""Channels of the probe's hidden layer."""
EPOCHS, BATCH, RATE = 12, 512, 2e-3


@dataclass(frozen=True)
class TextPatches:
    """The patches of some lessons that contain characters."""

    states_LPD: Tensor
    """bfloat16, as in a feature store; index 0 is layer 1 of the tower."""
    characters_P2: Tensor
    """Classes of the first and second character, BLANK if there is no second."""


@torch.inference_mode()
def collect_text_patches(
    encoder: Encoder, lessons: Sequence[Sample], collate: Collator, batch_size: int = 16
) -> TextPatches:
    """The patches with characters of `lessons`, at all layers that `encoder` runs.

    Raises ValueError if there are none.
    """
    states, characters = [], []
    for start in range(0, len(lessons), batch_size):
        batch = [lessons[index] for index in range(start, min(start + batch_size, len(lessons)))]
        characters_BN2 = torch.stack([collate.label_characters(lesson) for lesson in batch])
        has_text_BN = (characters_BN2 != BLANK).any(-1)
        layers = encoder.states(encoder.preprocess([lesson.image for lesson in batch]))
        states.append(torch.stack([state_BND[has_text_BN].bfloat16() for state_BND in layers]))
        characters.append(characters_BN2[has_text_BN])
    patches = TextPatches(torch.cat(states, dim=1), torch.cat(characters))
    if not len(patches.characters_P2):
        raise ValueError(f"no text in {len(lessons)} lessons: use more")
    return patches


def measure_accuracies(training: TextPatches, held_out: TextPatches, seed: int) -> list[float]:
    """For each layer, the fraction of held-out characters that a two-layer probe predicts correctly."""
    layers = zip(training.states_LPD, held_out.states_LPD, strict=True)
    return [
        _measure_accuracy(_train(seen_PD, training.characters_P2, seed), unseen_PD, held_out.characters_P2)
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
def _measure_accuracy(probe: nn.Module, states_PD: Tensor, characters_P2: Tensor) -> float:
    """Fraction of characters predicted correctly; blanks do not count."""
    predicted_P2 = probe(states_PD.float()).unflatten(-1, (-1, 2)).argmax(1)
    has_character_P2 = characters_P2 != BLANK
    accuracy: float = (predicted_P2 == characters_P2)[has_character_P2].float().mean().item()
    return accuracy
