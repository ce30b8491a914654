"""DivPrune: max-min diversity."""

from dataclasses import dataclass, field

from torch import Tensor

from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.greedy import CachedOrder
from atr.reduction.marginal_relevance import max_min_order_BK
from atr.reduction.similarity import check_space, exact_cosines_BNN, needs_of_space, space_BND

NEEDS = ("projected_BND",)


@dataclass(frozen=True)
class DivPrune:
    """Max-min diversity of the tokens (Alvar et al., CVPR 2025): `max_min_order_BK`.

    `on` is the space of the cosines: the projector's outputs, as in the paper, or the encoder's features.
    Raises ValueError for an unknown space. Deviation: the release selects some of several equal tokens twice;
    here they are selected last.
    """

    on: str = "projected"
    _orders: CachedOrder = field(default_factory=CachedOrder, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_space(self.on)

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the space."""
        return needs_of_space(self.on)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        return self._orders.keep_BK(encoded, budget, self._order_BK)

    def _order_BK(self, encoded: EncoderOutput, k: int) -> Tensor:
        return max_min_order_BK(exact_cosines_BNN(space_BND(encoded, self.on)), k)


def build(seed: int = 0) -> Reducer:
    """DivPrune with its defaults."""
    return DivPrune()
