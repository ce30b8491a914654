"""Checks that the pixels of an input are those that the processor makes; if not, names the difference."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.finite import check_finite
from atr.vlm.families import family_of
from atr.vlm.views import configured_images

TOLERATED_LEVELS = 1.0
"""Root mean square difference of pixels, in levels of 255, that rounding in another library explains."""
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Names of Pillow's filters; all but the first are antialiased."""
_PRINTED = 16
"""Most values that a message prints."""
_PLAIN = ("nearest", "bilinear", "bicubic")
"""Filters of torch without antialiasing."""


def check_inputs(model: Any, processor: Any, inputs: Mapping[str, Any], images: Sequence[Any]) -> None:
    """Check your own preprocessing, in which a mistake can change the selection more than bfloat16 or JPEG.

    `images` are the input's images in RGB, as the processor takes them. Raises a one-line ValueError if sizes
    or pixels differ from those that the model's processor makes by more than rounding. It names the mean and
    standard deviation, the filter, the missing antialiasing, the missing crop or the channel order.
    """
    image_processor = configured_images(processor)
    own = image_processor(images, return_tensors="pt")
    name = type(image_processor).__name__
    for key in sorted(family_of(model).image_keys(model) & set(own)):
        if key not in inputs:
            raise ValueError(f"inputs: {key} is missing, which {name} makes")
        given, expected = torch.as_tensor(inputs[key]), torch.as_tensor(own[key])
        if given.shape != expected.shape:
            raise ValueError(f"inputs: {key} is {tuple(given.shape)}, {name} makes {tuple(expected.shape)}")
        if key != "pixel_values" and not torch.equal(given.cpu(), expected):
            raise ValueError(_unequal(key, given, expected, name))
    check_finite(torch.as_tensor(inputs["pixel_values"]), "inputs: pixel_values")
    mistakes = _mistakes(image_processor, inputs["pixel_values"], own["pixel_values"], images)
    if mistakes:
        raise ValueError(f"inputs: pixel_values are not those that {name} makes: {', '.join(mistakes)}")


def _unequal(key: str, given: Tensor, expected: Tensor, name: str) -> str:
    if expected.numel() > _PRINTED:
        count = int((given.cpu() != expected).sum())
        return f"inputs: {key} differs from what {name} makes in {count} of {expected.numel()} values"
    return f"inputs: {key} is {given.tolist()}, {name} makes {expected.tolist()}"


def _mistakes(processor: Any, given: Tensor, own: Tensor, images: Sequence[Any]) -> list[str]:
    """What differs from the processor: the variant of its preprocessing that explains the pixels best."""
    given, own = (_by_channel(processor, pixels) for pixels in (given.detach().float().cpu(), own))
    fit = _Fit(processor, given, own.to(given.dtype))
    if fit.error <= TOLERATED_LEVELS:
        return fit.normalised()
    variants = _variants(processor, own, images)
    fits = {name: _Fit(processor, given, pixels) for name, pixels in variants.items()}
    nearest = min(fits, key=lambda name: fits[name].error)
    if fits[nearest].error > fit.error / 2:
        return [f"they differ by {fit.error:.1f} of 255 levels"]
    return [nearest, *fits[nearest].normalised()]


def _by_channel(processor: Any, pixels: Tensor) -> Tensor:
    """Pixels with the channels in the third dimension from the end, wherever they belong in an image.

    Some processors give the flat patches of all images, channels first, or those of each, channels last.
    """
    channels = len(processor.image_mean)
    if pixels.ndim == 2:
        return pixels.reshape(len(pixels), channels, -1, processor.patch_size)
    return pixels.reshape(*pixels.shape[:2], -1, channels).movedim(-1, 1) if pixels.ndim == 3 else pixels


class _Fit:
    """The linear fit, per channel, of given pixels to the processor's; `error` in levels of 255."""

    def __init__(self, processor: Any, given: Tensor, made: Tensor) -> None:
        self.mean_C, self.std_C = _normalisation(processor)
        given_CP, made_CP = (pixels.movedim(-3, 0).flatten(1) for pixels in (given, made))
        centred_CP = made_CP - made_CP.mean(1, keepdim=True)
        variance_C = centred_CP.square().mean(1)
        slope_C = (centred_CP * given_CP).mean(1) / variance_C
        # Another mean and deviation cannot explain a single colour or another image.
        explains_C = (variance_C > 1e-6) & (slope_C > 0)
        self.slope_C = slope_C.where(explains_C, 1.0)
        self.offset_C = (given_CP.mean(1) - slope_C * made_CP.mean(1)).where(explains_C, 0.0)
        explained_CP = (given_CP - self.offset_C[:, None]) / self.slope_C[:, None]
        # Filters overshoot; 8 bits clip the values.
        levels_CP, made_levels_CP = (self._levels(pixels).clamp(0, 255) for pixels in (explained_CP, made_CP))
        self.error = float((levels_CP - made_levels_CP).square().mean().sqrt())

    def normalised(self) -> list[str]:
        """The mean and deviation that were used, in words; empty if they are the processor's."""
        std_C = self.std_C / self.slope_C
        mean_C = self.mean_C - self.offset_C * std_C
        if torch.allclose(std_C, self.std_C, rtol=0.02) and torch.allclose(mean_C, self.mean_C, atol=0.01):
            return []
        own = _numbers(self.mean_C, self.std_C)
        return [f"normalised by mean and deviation {_numbers(mean_C, std_C)}, not {own}"]

    def _levels(self, pixels_CP: Tensor) -> Tensor:
        return (pixels_CP * self.std_C[:, None] + self.mean_C[:, None]) * 255


def _numbers(*values: Tensor) -> str:
    return " and ".join(str([round(number, 3) for number in value.tolist()]) for value in values)


def _normalisation(processor: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel for pixels between 0 and 1."""
    scale = processor.rescale_factor * 255 if processor.do_rescale else 255.0
    mean, std = (
        (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    )
    return torch.tensor(mean) / scale, torch.tensor(std) / scale


def _variants(processor: Any, own: Tensor, images: Sequence[Any]) -> dict[str, Tensor]:
    """The pixels that each mistake in preprocessing makes, by its name, if they have the size of `own`."""

    def preprocess(processor: Any, **changes: Any) -> Tensor:
        pixels: Tensor = processor(images, return_tensors="pt", **changes)["pixel_values"]
        return _by_channel(processor, pixels)

    height, width = own.shape[-2:]
    variants = {"channels in the order blue, green, red": own.flip(-3)}
    for mode in _PLAIN:
        variants[f"resized by {mode} without antialias"] = preprocess(_without_antialias(processor, mode))
    for number in _FILTERS.keys() - {processor.resample}:
        variants[f"resized by {_FILTERS[number]}"] = preprocess(processor, resample=number)
    if getattr(processor, "do_center_crop", False) and own.ndim == 4:
        whole = {"height": height, "width": width}
        squeezed = preprocess(processor, size=whole, do_center_crop=False)
        variants["the whole image squeezed, not cropped"] = squeezed
    return {name: pixels for name, pixels in variants.items() if pixels.shape == own.shape}


def _without_antialias(processor: Any, mode: str) -> Any:
    """A copy of the image processor that resizes with torch's filter `mode` without antialiasing."""
    resize: Callable[..., Any] = processor.resize

    def resize_plainly(image: Any, *args: Any, **kwargs: Any) -> Any:
        resized = resize(image, *args, **kwargs)
        # One image, or several that torchvision's processors resize at once.
        pixels = torch.as_tensor(image).float()
        pixels_BCHW = pixels.reshape(-1, *pixels.shape[-3:])
        pixels = F.interpolate(pixels_BCHW, resized.shape[-2:], mode=mode).clamp(0, 255).round()
        pixels = pixels.reshape(resized.shape)
        return pixels if isinstance(resized, Tensor) else pixels.numpy().astype(resized.dtype)

    other = copy(processor)
    other.resize = resize_plainly
    return other
