"""The tokens of images as a language model of transformers takes them, in place of pixels.

Shapes: P packed and K kept tokens of an image, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


class TokenList(list[Tensor]):
    """Tokens (K, D) of each image.

    Half of the families join a list, the others call `to` of one tensor. A tensor could not say where an
    image ends, so that beam search would give rows the wrong image, or fail.
    """

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """All tokens in one tensor, as `Tensor.to` converts it."""
        return torch.cat(self).to(*args, **kwargs)

    def reshape(self, *shape: int) -> Tensor:
        """All tokens in one tensor of another shape."""
        return torch.cat(self).reshape(*shape)

    @property
    def shape(self) -> torch.Size:
        """That of all tokens in one tensor."""
        return torch.Size((sum(map(len, self)), self[0].shape[-1] if self else 0))

    def numel(self) -> int:
        """Number of all values."""
        return sum(tokens_KD.numel() for tokens_KD in self)


@dataclass
class VisualOutput(BaseModelOutputWithPooling):  # type: ignore[misc]  # untyped there
    """Encoder output that stays a TokenList when `generate` repeats its images for beams or samples."""

    deepstack_features: list[TokenList] | None = None
    visual_indicator_features: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        is_tokens = name == "pooler_output" and isinstance(value, list)
        super().__setattr__(name, TokenList(value) if is_tokens else value)


@dataclass(frozen=True)
class ImageTokens:
    """Packed tokens (P, D) of each image.

    `levels` are further features of the same tokens, (P, D) per image, which the language model adds in its
    first layers (the deep stack of Qwen3-VL); `carried` are fields of the encoder's output that it reads
    unchanged.
    """

    images: Sequence[Tensor]
    levels: Sequence[Sequence[Tensor]] = ()
    carried: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def of(self, images: Sequence[int]) -> "ImageTokens":
        """The tokens of some images, in the given order; an image may occur more than once."""
        levels = [[level[image] for image in images] for level in self.levels]
        return ImageTokens([self.images[image] for image in images], levels, self.carried)

    def keep(self, kept: Sequence[Tensor]) -> dict[str, VisualOutput]:
        """The tokens `kept` (K,) of each image as `mm_encoder_outputs` of `forward` and `generate`."""
        levels = [TokenList(_keep(level, kept)) for level in self.levels]
        output = VisualOutput(
            pooler_output=TokenList(_keep(self.images, kept)),
            deepstack_features=levels or None,
            **self.carried,
        )
        return {"image": output}


def _keep(images: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
    """The kept rows of each image; the image itself if all are kept, without a copy."""
    return [
        tokens_PD if len(keep_K) == len(tokens_PD) else tokens_PD[keep_K.to(tokens_PD.device)]
        for tokens_PD, keep_K in zip(images, kept, strict=True)
    ]


def fresh(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """New objects around the same tensors: `generate` repeats the images for beams in place."""
    return {modality: type(output)(**_copies(output)) for modality, output in outputs.items()}


def _copies(output: Any) -> dict[str, Any]:
    return {name: type(value)(value) if isinstance(value, list) else value for name, value in output.items()}
