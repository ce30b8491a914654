"""Selector, reconstructor and the vector that replaces dropped tokens between them: the paper, section 3."""

import torch
from torch import Tensor, nn

from atr.core.ragged import Grid, RaggedGrids
from atr.core.tokens import gumbel_mask_BN, replace_dropped
from atr.core.tower_layer import TowerLayer
from atr.reduction.layers import HubModule
from atr.reduction.reconstructor import FeatureReconstructor
from atr.reduction.selector import FeatureSelector


class FeatureAutoencoder(HubModule, library_name="atr", paper_url="https://arxiv.org/abs/2503.16660"):
    """R(S(F)): drops tokens by a sampled mask and restores all; takes the arguments of FeatureSelector.

    The shared vector E_masked is in standardised units and starts at zero, the mean feature.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        layers: int = 3,
        heads: int = 3,
        ffn_ratio: float = 4.0,
        position: str = "sine",
        initial_bias: float = 2.0,
        encoder: str | None = None,
        layer: TowerLayer | None = None,
        keep: float | None = None,
    ) -> None:
        super().__init__()
        shape = (width, grid, layers, heads, ffn_ratio, position)
        self.selector = FeatureSelector(*shape, initial_bias, encoder, layer, keep)
        self.reconstructor = FeatureReconstructor(*shape)
        self.masked_D = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        features_BND: Tensor,
        temperature: float,
        generator: torch.Generator | None = None,
        grid: Grid | RaggedGrids | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Restored features (B, N, D), and the sampled mask (B, N) from which they were restored.

        `grid` as in `FeatureSelector.forward`, here and in `restore`.
        """
        mask_BN = gumbel_mask_BN(self.selector(features_BND, grid), temperature, generator)
        return self.restore(features_BND, mask_BN, grid), mask_BN

    def restore(
        self, features_BND: Tensor, mask_BN: Tensor, grid: Grid | RaggedGrids | None = None
    ) -> Tensor:
        """Features restored from the tokens with mask 1, in the encoder's units; float32 (B, N, D)."""
        standardise = self.selector.standardise
        masked_BND = replace_dropped(standardise(features_BND), mask_BN, self.masked_D)
        return standardise.inverse(self.reconstructor(masked_BND, grid))
