"""Building blocks shared by selector and reconstructor, and how modules are saved and loaded."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, get_type_hints

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import safe_open
from safetensors.torch import load_model
from torch import Tensor, nn

from atr.core.finite import check_finite_weights
from atr.core.hub import pretrained_arguments
from atr.core.ragged import Grid, RaggedGrids
from atr.core.tokens import sine_positions, sine_positions_of_each
from atr.core.typed_json import value_of

_SMALLEST_VARIANCE = 1e-10
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_PLAIN_TOKENS = 512
"""Most tokens of an image whose attention matrix is held in memory where no gradient needs it."""
_MOST_TOKENS = 2**16
"""Limits memory: four times the tokens of an image of 2,048 x 2,048 pixels in patches of 16 x 16."""


class Block(nn.Module):
    """Pre-norm Transformer layer, as in CLIP; (B, N, D) to (B, N, D).

    The same function as `torch.nn.TransformerEncoderLayer`, which rounds differently and trains more slowly
    in bfloat16 on a CPU. Raises ValueError unless the heads divide the width.
    """

    def __init__(self, width: int, heads: int, ffn_ratio: float) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads: {heads} is not allowed, it must divide the feature width {width}")
        hidden = round(ffn_ratio * width)
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_feedforward = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BND: Tensor, grids: RaggedGrids | None = None) -> Tensor:
        """Self-attention, then the feed-forward net, each added to its input.

        With `grids`, x is (1, T, D): attention stays within each image, all else works on all tokens at once.
        """
        x_BND = x_BND + self._attend(self.norm_attention(x_BND), grids)
        x_BND = x_BND + self.feedforward(self.norm_feedforward(x_BND))
        return x_BND

    def _attend(self, x_BND: Tensor, grids: RaggedGrids | None) -> Tensor:
        parts = self.query_key_value(x_BND).unflatten(-1, (3, self.heads, -1))
        # Each (B, H, N, d) with H heads of d channels; one copy here saves one of each part in every product.
        query, key, value = parts.permute(2, 0, 3, 1, 4).contiguous().unbind()
        if grids is None:
            mixed = _attention(query, key, value)
        else:
            images = zip(*(grids.split(part, dim=2) for part in (query, key, value)), strict=True)
            mixed = torch.cat([_attention(*image) for image in images], dim=2)
        projected_BND: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return projected_BND


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention over (B, H, N, d)."""
    is_long = query.shape[2] > _PLAIN_TOKENS and not query.requires_grad
    if query.is_cuda or is_long:
        return F.scaled_dot_product_attention(query, key, value)
    # On a CPU the fused kernel's backward takes 1.6 times as long as three plain operations at these sizes.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    mixed: Tensor = scores.softmax(dim=-1) @ value
    return mixed


class TransformerHead(nn.Module):
    """Fixed positions added to the input, Transformer layers, a norm and a linear head of `outputs` channels.

    The head's weight starts at zero, so that the untrained output is `bias` for all features. Raises
    ValueError for an unknown position, a grid without tokens or of too many, and heads that do not divide
    the width.
    """

    position_ND: Tensor

    def __init__(
        self,
        width: int,
        outputs: int,
        grid: tuple[int, int],
        layers: int,
        heads: int,
        ffn_ratio: float,
        position: str,
        bias: float = 0.0,
    ) -> None:
        super().__init__()
        if position not in ("none", "sine"):
            raise ValueError(f"position: {position!r} is unknown, allowed: none, sine")
        if min(grid) < 1 or grid[0] * grid[1] > _MOST_TOKENS:
            raise ValueError(f"grid: {tuple(grid)} is not allowed, allowed: 1 to {_MOST_TOKENS} tokens")
        self.width, self.grid, self.position = width, (grid[0], grid[1]), position
        self.blocks = nn.Sequential(*(Block(width, heads, ffn_ratio) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, bias)
        if position == "sine":
            self.register_buffer("position_ND", sine_positions(self.grid, width), persistent=False)

    def forward(self, x_BND: Tensor, grid: Grid | RaggedGrids | None = None) -> Tensor:
        """(B, N, D) to (B, N, outputs), or (1, T, D) to (1, T, outputs) for images with grids of their own.

        `grid` if it differs from the module's own. Raises ValueError if tokens or channels do not fit.
        """
        grid = self.grid if grid is None else grid
        grids = grid if isinstance(grid, RaggedGrids) else None
        x_BND = self._with_positions(x_BND, grid)
        for block in self.blocks:
            x_BND = block(x_BND, grids)
        outputs_BNO: Tensor = self.head(self.norm(x_BND))
        return outputs_BNO

    def _with_positions(self, x_BND: Tensor, grid: Grid | RaggedGrids) -> Tensor:
        tokens = sum(grid.tokens) if isinstance(grid, RaggedGrids) else grid[0] * grid[1]
        if x_BND.shape[1:] != (tokens, self.width):
            shape, allowed = tuple(x_BND.shape[1:]), (tokens, self.width)
            raise ValueError(f"features: {shape} tokens and channels do not fit, allowed: {allowed}")
        if self.position == "none":
            return x_BND
        return x_BND + self._positions(grid, x_BND.device)

    def _positions(self, grid: Grid | RaggedGrids, device: torch.device) -> Tensor:
        """Sine positions are a function of row and column, so that they exist for any grid."""
        if isinstance(grid, RaggedGrids):
            return sine_positions_of_each(grid.each, self.width, device)
        is_trained = tuple(grid) == self.grid
        return self.position_ND if is_trained else sine_positions(grid, self.width).to(device)


class Standardise(nn.Module):
    """Per-channel mean and standard deviation of an encoder's features, saved with the weights.

    Some channels of vision encoders are a hundred times as large as others; standardised, all have size one.
    """

    mean_D: Tensor
    deviation_D: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("deviation_D", torch.ones(width))

    def forward(self, features_BND: Tensor) -> Tensor:
        """Features with mean zero and standard deviation one in each channel."""
        return (features_BND - self.mean_D) / self.deviation_D

    def inverse(self, x_BND: Tensor) -> Tensor:
        """Standardised features in the encoder's units."""
        return x_BND * self.deviation_D + self.mean_D

    def measure(self, images: Iterable[Tensor]) -> None:
        """Measure mean and deviation of `images`, their features_ND; ValueError unless they are finite.

        One image is in memory at a time. Sums are float64, since cancellation would spoil float32.
        """
        count, total_D, square_D = 0, torch.zeros(()), torch.zeros(())
        for features_ND in images:
            features_ND = features_ND.double()
            count += len(features_ND)
            total_D = total_D + features_ND.sum(0)
            square_D = square_D + features_ND.square().sum(0)
        mean_D = total_D / count
        variance_D = square_D / count - mean_D.square()
        if not bool(variance_D.isfinite().all()):
            raise ValueError("the stored features are not finite: extract them again")
        self.mean_D.copy_(mean_D)
        # A constant channel must not be divided by zero.
        self.deviation_D.copy_(variance_D.clamp_min(_SMALLEST_VARIANCE).sqrt())

    @property
    def variance(self) -> Tensor:
        """Variance of the features averaged over channels, in the encoder's units squared; a scalar."""
        return self.deviation_D.square().mean()


class HubModule(nn.Module, PyTorchModelHubMixin):
    """A module saved as a folder of config.json and model.safetensors, rebuilt from that folder alone."""

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Self:  # type: ignore[override]
        """Load from a folder or hub id; raises ValueError naming it if a file is missing or does not fit.

        The configuration is checked against the shapes in the weights' header before anything is built.
        The weights must be finite and every deviation positive. A hub id may have a revision:
        `org/name@revision`.
        """
        folder = Path(name)
        missing = [file for file in (_CONFIG, _WEIGHTS) if not (folder / file).is_file()]
        if folder.is_dir() and missing:
            raise ValueError(f"{folder}: {missing[0]} is missing, this is no saved {cls.__name__}")
        try:
            return super().from_pretrained(**pretrained_arguments(str(name)) | kwargs)
        # The libraries below raise many types of errors; for the caller all mean that loading failed.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{name}: no {cls.__name__} could be loaded from it: {reason}") from error

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, force_download: bool, map_location: str = "cpu", **kwargs: Any
    ) -> Self:
        """Build from the content of config.json and load the weights; pickled weights are not read."""
        hub = {key: kwargs.pop(key) for key in ("revision", "cache_dir", "local_files_only", "token")}
        weights = Path(model_id, _WEIGHTS)
        if not weights.is_file():
            weights = Path(hf_hub_download(model_id, _WEIGHTS, force_download=force_download, **hub))
        _check_config(cls, kwargs, weights)
        module = cls(**kwargs)
        load_model(module, weights, device=map_location)
        module.check_usable(_WEIGHTS)
        return module.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """Save as the mixin does; raises ValueError before writing anything if the weights are not usable."""
        self.check_usable(type(self).__name__)
        super()._save_pretrained(save_directory)

    def check_usable(self, where: str) -> None:
        """Raise ValueError naming `where` and the tensor unless weights are finite, deviations positive."""
        check_finite_weights(self.state_dict(), where)
        for name, part in self.named_modules():
            if isinstance(part, Standardise) and not (part.deviation_D > 0).all():
                channels = int((part.deviation_D <= 0).sum())
                raise ValueError(
                    f"{where}: {name}.deviation_D is zero or negative in {channels} of "
                    f"{len(part.deviation_D)} channels, allowed: positive values"
                )


def _check_config(kind: type[HubModule], config: Mapping[str, Any], weights: Path) -> None:
    """Raise ValueError unless the arguments have their types and give the shapes of the weights."""
    hints = get_type_hints(kind.__init__)
    for key, value in config.items():
        value_of(hints.get(key, Any), value, f"{_CONFIG}: {key}")
    with safe_open(weights, framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    # On the meta device tensors of any size are free, but modules are not.
    if (layers := config.get("layers", 0)) > len(stored):
        raise ValueError(f"{_CONFIG}: layers: {layers}, though {_WEIGHTS} has {len(stored)} tensors in all")
    try:
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in kind(**config).state_dict().items()}
    except (RuntimeError, ValueError) as error:  # a size above the largest integer, or a refused value
        raise ValueError(f"{_CONFIG}: {error}") from error
    for key in sorted(expected.keys() | stored.keys()):
        if expected.get(key) != stored.get(key):
            raise ValueError(
                f"{key} is {stored.get(key, 'missing')} in {_WEIGHTS}, {_CONFIG} asks for "
                f"{expected.get(key, 'none')}"
            )
