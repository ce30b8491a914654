"""Whether the pixels of an input are those that the processor makes, and if not, what was done."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.finite import check_finite
from atr.vlm.families import family_of

TOLERATED = 1.0
"""Levels, of 255, that pixels may differ by (root mean square): another library's rounding does."""
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Names of Pillow's filters, which pass over no pixel but for the first."""
_PLAIN = ("nearest", "bilinear", "bicubic")
"""The filters that torch has without antialias."""


def check_inputs(model: Any, processor: Any, inputs: Mapping[str, Any], images: Sequence[Any]) -> None:
    """Check preprocessing of one's own: a slip in it can change a selection more than bfloat16 or JPEG do.

    `images` are those that the input shows, in RGB and as the processor takes them. Raises ValueError, one
    line, where the sizes or the pixels are others than the model's own processor makes; it says of a mean and
    deviation, a filter, a missing antialias, cropping and the order of channels which ones were used. Pixels
    that differ by a rounding pass.
    """
    own = processor.image_processor(images, return_tensors="pt")
    name = type(processor.image_processor).__name__
    for key in sorted(family_of(model).image_keys & set(own)):
        if key not in inputs:
            raise ValueError(f"inputs: {key} is missing, which {name} makes")
        found, wanted = torch.as_tensor(inputs[key]), torch.as_tensor(own[key])
        if found.shape != wanted.shape:
            raise ValueError(f"inputs: {key} is {tuple(found.shape)}, {name} makes {tuple(wanted.shape)}")
        if key != "pixel_values" and not torch.equal(found.cpu(), wanted):
            raise ValueError(f"inputs: {key} is {found.tolist()}, {name} makes {wanted.tolist()}")
    check_finite(torch.as_tensor(inputs["pixel_values"]), "inputs: pixel_values")
    if findings := _findings(processor.image_processor, inputs["pixel_values"], own["pixel_values"], images):
        raise ValueError(f"inputs: pixel_values are not those that {name} makes: {', '.join(findings)}")


def _findings(processor: Any, given: Tensor, own: Tensor, images: Sequence[Any]) -> list[str]:
    """What was done otherwise than by the processor: by the way of making pixels that fits them best."""
    given = given.detach().float().cpu()
    fit = _Fit(processor, given, own.to(given.dtype))
    if fit.error <= TOLERATED:
        return fit.normalised()
    fits = {name: _Fit(processor, given, made) for name, made in _variants(processor, own, images).items()}
    nearest = min(fits, key=lambda name: fits[name].error)
    if fits[nearest].error > fit.error / 2:
        return [f"they differ by {fit.error:.1f} of 255 levels"]
    return [nearest, *fits[nearest].normalised()]


class _Fit:
    """Pixels as a linear function, of each channel its own, of those that were made in some way."""

    def __init__(self, processor: Any, given: Tensor, made: Tensor) -> None:
        self.mean_C, self.std_C = _normalisation(processor)
        given_CP, made_CP = (pixels.movedim(-3, 0).flatten(1) for pixels in (given, made))
        centred_CP = made_CP - made_CP.mean(1, keepdim=True)
        variance_C = centred_CP.square().mean(1)
        slope_C = (centred_CP * given_CP).mean(1) / variance_C
        # One colour, or something else altogether, is not to be explained by a mean and a deviation.
        explains_C = (variance_C > 1e-6) & (slope_C > 0)
        self.slope_C = slope_C.where(explains_C, 1.0)
        self.offset_C = (given_CP.mean(1) - slope_C * made_CP.mean(1)).where(explains_C, 0.0)
        explained_CP = (given_CP - self.offset_C[:, None]) / self.slope_C[:, None]
        # What a filter overshoots, 8 bits cut off.
        levels_CP, made_levels_CP = (self._levels(pixels).clamp(0, 255) for pixels in (explained_CP, made_CP))
        self.error = float((levels_CP - made_levels_CP).square().mean().sqrt())

    def normalised(self) -> list[str]:
        """Mean and deviation that were used, where they are not the processor's."""
        std_C = self.std_C / self.slope_C
        mean_C = self.mean_C - self.offset_C * std_C
        if torch.allclose(std_C, self.std_C, rtol=0.02) and torch.allclose(mean_C, self.mean_C, atol=0.01):
            return []
        used, wanted = ((mean_C, std_C), (self.mean_C, self.std_C))
        return [f"normalised by mean and deviation {_numbers(*used)}, not {_numbers(*wanted)}"]

    def _levels(self, pixels_CP: Tensor) -> Tensor:
        return (pixels_CP * self.std_C[:, None] + self.mean_C[:, None]) * 255


def _numbers(*values: Tensor) -> str:
    return " and ".join(str([round(number, 3) for number in value.tolist()]) for value in values)


def _normalisation(processor: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, of pixels that lie between 0 and 1."""
    scale = processor.rescale_factor * 255 if processor.do_rescale else 255.0
    mean, std = (
        (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    )
    return torch.tensor(mean) / scale, torch.tensor(std) / scale


def _variants(processor: Any, own: Tensor, images: Sequence[Any]) -> dict[str, Tensor]:
    """Slips in preprocessing, by name, and the pixels that each makes; those of other sizes are left out."""

    def make(processor: Any, **changes: Any) -> Tensor:
        made: Tensor = processor(images, return_tensors="pt", **changes)["pixel_values"]
        return made

    height, width = own.shape[-2:]
    made = {"channels in the order blue, green, red": own.flip(-3)}
    for mode in _PLAIN:
        made[f"resized by {mode} without antialias"] = make(_without_antialias(processor, mode))
    for number in _FILTERS.keys() - {processor.resample}:
        made[f"resized by {_FILTERS[number]}"] = make(processor, resample=number)
    if getattr(processor, "do_center_crop", False) and own.ndim == 4:
        whole = {"height": height, "width": width}
        made["the whole image squeezed, not cropped"] = make(processor, size=whole, do_center_crop=False)
    return {name: pixels for name, pixels in made.items() if pixels.shape == own.shape}


def _without_antialias(processor: Any, mode: str) -> Any:
    """The same image processor, but for the pixels that are passed over when images are made smaller."""
    resize: Callable[..., Any] = processor.resize

    def resize_plainly(image: Any, *args: Any, **kwargs: Any) -> Any:
        made = resize(image, *args, **kwargs)
        pixels = torch.as_tensor(
            image
        ).float()  # of one image, or of several that torchvision resizes at once
        pixels_BCHW = pixels.reshape(-1, *pixels.shape[-3:])
        pixels = F.interpolate(pixels_BCHW, made.shape[-2:], mode=mode).clamp(0, 255).round()
        pixels = pixels.reshape(made.shape)
        return pixels if isinstance(made, Tensor) else pixels.numpy().astype(made.dtype)

    other = copy(processor)
    other.resize = resize_plainly
    return other
