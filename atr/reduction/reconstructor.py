"""The reconstructor R of the paper, section 3, which restores all features from the kept tokens."""

from torch import Tensor, nn

from atr.core.ragged import Grid, RaggedGrids
from atr.reduction.layers import TransformerHead


class FeatureReconstructor(nn.Module):
    """Transformer layers that map the standardised, masked sequence of all N tokens to restored features.

    Raises ValueError as TransformerHead does.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], layers: int, heads: int, ffn_ratio: float, position: str
    ) -> None:
        super().__init__()
        self.trunk = TransformerHead(width, width, grid, layers, heads, ffn_ratio, position)

    def forward(self, masked_BND: Tensor, grid: Grid | RaggedGrids | None = None) -> Tensor:
        """Restored features, standardised; `grid` and errors as in TransformerHead."""
        restored_BND: Tensor = self.trunk(masked_BND, grid)
        return restored_BND.float()
