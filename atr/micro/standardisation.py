"""Standardisation of a frozen tower's features: measured on a store, then folded into the trained model."""

from copy import deepcopy

import torch
from transformers import LlavaForConditionalGeneration

from atr.features.store import FeatureStore
from atr.reduction.layers import Standardise

STATISTICS_IMAGES = 512
"""Minimum number of images for the statistics of each channel; all of a smaller store."""


def measure_standardisation(store: FeatureStore) -> Standardise:
    """Mean and standard deviation of each channel of the stored features."""
    standardise, step = Standardise(store.width), max(1, len(store) // STATISTICS_IMAGES)
    standardise.measure(store[position] for position in range(0, len(store), step))
    return standardise


@torch.no_grad()
def fold_standardisation(
    model: LlavaForConditionalGeneration, standardise: Standardise, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """Copy a model trained on standardised features into one, in `dtype`, that takes raw features.

    The first layer of its projector absorbs the mean and the standard deviation.
    """
    copy = deepcopy(model)
    linear = copy.model.multi_modal_projector.linear_1
    linear.weight.div_(standardise.deviation_D)
    # The bias cancels the mean as transformed by the weights rounded to `dtype`.
    linear.bias.sub_(linear.weight.to(dtype).float() @ standardise.mean_D)
    return copy.to(dtype)
