"""Which tokens are worth keeping: the selector S of the paper, section 3, and the reducer made of it."""

from typing import Any, ClassVar

import torch
from huggingface_hub import ModelCard
from torch import Tensor

from atr.core.fingerprint import check_fingerprint
from atr.core.finite import check_finite
from atr.core.tokens import top_k_BK
from atr.reduction import selector_card
from atr.reduction.base import EncoderOutput
from atr.reduction.layers import HubModule, Standardise, TransformerHead


class FeatureSelector(
    HubModule,
    library_name="atr",
    license="apache-2.0",
    paper_url="https://arxiv.org/abs/2503.16660",
    model_card_template=selector_card.TEMPLATE,
):
    """Three Transformer layers and a linear layer: features_BND of a frozen encoder to keep logits_BN.

    A token is kept where its logit is positive (the mode of the Gumbel-softmax mask), or among the top K.
    `encoder`, `layer`, `keep` (p of Eq. 7) and `record` say what it was trained on and change nothing here.
    Raises ValueError for heads that do not divide the width, an unknown position, a grid without tokens or of
    too many, and a record whose fingerprint is none.
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
        layer: int | None = None,
        keep: float | None = None,
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.layer, self.keep = encoder, layer, keep
        self.record = dict(record or {})
        check_fingerprint(self.record.get("fingerprint"))
        self.standardise = Standardise(width)
        self.trunk = TransformerHead(width, 1, grid, layers, heads, ffn_ratio, position, bias=initial_bias)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens it was trained on."""
        return self.trunk.grid

    @property
    def is_taught(self) -> bool:
        """Whether it learned from a language model's answers instead of a reconstructor."""
        return "taught_by" in self.record

    def note(self, **facts: Any) -> None:
        """Add to the record, and so to the config.json and the model card that are saved.

        The card shows `data`, `images`, `seed`, the encoder's `fingerprint`, the `positions` that kept tokens
        had when it was taught and evaluated, and a dict of `scores`.
        """
        self.record |= facts
        assert isinstance(self._hub_mixin_config, dict)
        self._hub_mixin_config = self._hub_mixin_config | {"record": self.record}

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md that is saved and pushed with the weights, from what config.json says."""
        assert isinstance(self._hub_mixin_config, dict)
        fields = selector_card.fields(self._hub_mixin_config, self.record)
        return super().generate_model_card(*args, **fields | kwargs)

    def forward(self, features_BND: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Keep logits, float32 (B, N); `grid` where it is not the one trained on.

        Raises ValueError if tokens or channels do not fit.
        """
        logits_BN1: Tensor = self.trunk(self.standardise(features_BND), grid)
        return logits_BN1.squeeze(-1).float()

    @torch.no_grad()
    def select(self, features_BND: Tensor, k: int, grid: tuple[int, int] | None = None) -> Tensor:
        """Indices of the k tokens with the highest logits, in raster order: the paper's inference; keep_BK.

        Raises ValueError unless 0 <= k <= N.
        """
        return top_k_BK(self.rank(features_BND, grid), k).to(features_BND.device)

    @torch.no_grad()
    def rank(self, features_BND: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Keep logits (B, N) of features of any precision and device, computed in the selector's own.

        Raises ValueError naming the images whose logits are not finite: they would rank nothing.
        """
        mean_D = self.standardise.mean_D
        logits_BN: Tensor = self(features_BND.to(mean_D.device, mean_D.dtype), grid)
        check_finite(logits_BN, f"{type(self).__name__}: scores")
        return logits_BN


class SelectorReducer:
    """The top K of a trained selector as a reducer; the scores of one batch serve all its budgets."""

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    threshold: ClassVar[float | None] = 0.0
    """The selector's own mask keeps the tokens of positive logit."""

    def __init__(self, selector: FeatureSelector) -> None:
        self.selector = selector
        self._scored: tuple[EncoderOutput, Tensor] | None = None

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` highest logits of each image."""
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """The keep logits; scores_BN."""
        if self._scored is None or self._scored[0] is not encoded:
            logits_BN = self.selector.rank(encoded.features_BND, encoded.grid)
            self._scored = encoded, logits_BN.to(encoded.features_BND.device)
        return self._scored[1]
