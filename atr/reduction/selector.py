"""The selector S of the paper, section 3, which scores tokens, and the reducer built from it."""

from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import ModelCard
from torch import Tensor

from atr.core.fingerprint import check_fingerprint
from atr.core.finite import check_finite
from atr.core.ragged import Grid, RaggedGrids
from atr.core.tokens import top_k_BK
from atr.core.tower_layer import TowerLayer, check_layer
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
    """Transformer layers and a linear head from features_BND of a frozen encoder to keep logits_BN.

    A token is kept if its logit is positive (the mode of the Gumbel-softmax mask), or if it is one of the K
    highest. `encoder`, `layer`, `keep` (p of Eq. 7) and `record` describe the training and do not change the
    output. `layer` is an index into the tower's `hidden_states`, or "merged" for the tokens as a language
    model is fed them. Raises ValueError as TransformerHead does, and for another layer or a malformed
    fingerprint in the record.
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
        record: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.layer, self.keep = encoder, layer, keep
        self.record = dict(record or {})
        check_layer(layer)
        check_fingerprint(self.record.get("fingerprint"))
        self.standardise = Standardise(width)
        self.trunk = TransformerHead(width, 1, grid, layers, heads, ffn_ratio, position, bias=initial_bias)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens in training; of a typical image if `is_ragged`."""
        return self.trunk.grid

    @property
    def is_ragged(self) -> bool:
        """Whether it was trained on images with grids of their own, and so serves any grid."""
        return bool(self.record.get("ragged"))

    @property
    def is_taught(self) -> bool:
        """Whether it was distilled from a language model instead of trained with a reconstructor."""
        return "taught_by" in self.record

    def note(self, **facts: Any) -> None:
        """Add to the record, which is saved in config.json and shown in the model card.

        The card shows `data`, `images`, `seed`, the encoder's `fingerprint`, the `positions` of kept tokens
        in distillation and evaluation, a dict of `scores`, and whether the training was `ragged`.
        """
        self.record |= facts
        assert isinstance(self._hub_mixin_config, dict)
        self._hub_mixin_config = self._hub_mixin_config | {"record": self.record}

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md that is saved and pushed with the weights, made from config.json."""
        assert isinstance(self._hub_mixin_config, dict)
        fields = selector_card.fields(self._hub_mixin_config, self.record)
        return super().generate_model_card(*args, **fields | kwargs)

    def forward(self, features_BND: Tensor, grid: Grid | RaggedGrids | None = None) -> Tensor:
        """Keep logits, float32 (B, N); `grid` if it differs from the one in training.

        With RaggedGrids, features and logits of all images follow one another, (1, T, D) and (1, T). Raises
        ValueError if tokens or channels do not fit.
        """
        logits_BN1: Tensor = self.trunk(self.standardise(features_BND), grid)
        return logits_BN1.squeeze(-1).float()

    @torch.no_grad()
    def select(self, features_BND: Tensor, k: int, grid: tuple[int, int] | None = None) -> Tensor:
        """Indices of the k highest logits in raster order, the paper's inference; keep_BK.

        Raises ValueError unless 0 <= k <= N.
        """
        return top_k_BK(self.rank(features_BND, grid), k).to(features_BND.device)

    @torch.no_grad()
    def rank(self, features_BND: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Keep logits (B, N), computed in the selector's precision and on its device.

        Raises ValueError naming the images whose logits are not finite.
        """
        mean_D = self.standardise.mean_D
        logits_BN: Tensor = self(features_BND.to(mean_D.device, mean_D.dtype), grid)
        check_finite(logits_BN, f"{type(self).__name__}: scores")
        return logits_BN


class SelectorReducer:
    """The top K of a trained selector as a reducer; scores are reused for all budgets of an output."""

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})
    threshold: ClassVar[float | None] = 0.0
    """The selector's own mask keeps the tokens of positive logit."""

    def __init__(self, selector: FeatureSelector) -> None:
        self.selector = selector
        self._scored: WeakKeyDictionary[EncoderOutput, Tensor] = WeakKeyDictionary()

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` highest logits of each image."""
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """The keep logits; scores_BN."""
        if encoded not in self._scored:
            logits_BN = self.selector.rank(encoded.features_BND, encoded.grid)
            self._scored[encoded] = logits_BN.to(encoded.features_BND.device)
        return self._scored[encoded]
