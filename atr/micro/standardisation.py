"""Standardised features of a frozen tower: measured on a store, and folded into the trained model."""

from copy import deepcopy

import torch
from transformers import LlavaForConditionalGeneration

from atr.features.store import FeatureStore
from atr.reduction.layers import Standardise

STATISTICS_IMAGES = 512
"""Images of a store, evenly spaced, that give the mean and deviation of each channel."""


def measure_standardisation(store: FeatureStore) -> Standardise:
    """Mean and deviation of each channel of the stored features."""
    standardise, step = Standardise(store.width), max(1, len(store) // STATISTICS_IMAGES)
    standardise.measure(store[position] for position in range(0, len(store), step))
    return standardise


@torch.no_grad()
def fold_standardisation(
    model: LlavaForConditionalGeneration, standardise: Standardise, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """A copy in `dtype` that takes raw features, of a model trained on standardised features.

    The projector's first layer absorbs the mean and deviation.
    """
    copy = deepcopy(model)
    linear = copy.model.multi_modal_projector.linear_1
    linear.weight.div_(standardise.deviation_D)
    # The bias must cancel the mean as the rounded weights transform it.
    linear.bias.sub_(linear.weight.to(dtype).float() @ standardise.mean_D)
    return copy.to(dtype)
