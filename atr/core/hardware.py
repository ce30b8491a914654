"""Resolves an `auto` precision, and describes the hardware for the records of results."""

import platform
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from atr.config.trainer import Trainer

BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
"""Names in `torch.cpu.get_capabilities()`, on x86 and on Arm."""

_FULL_NAMES = {16: "16-mixed", 32: "32-true", 64: "64-true"}


def precision_of(trainer: "Trainer") -> int | str:
    """Lightning's name of the precision; auto takes the fastest that the hardware has instructions for.

    A CPU without bfloat16 instructions emulates them ten times slower than float32. Raises ValueError for
    16-mixed on a CPU, where Lightning would silently use bfloat16.
    """
    if trainer.precision in (16, "16-mixed") and _is_cpu(trainer.accelerator):
        allowed = "auto, bf16-mixed, 32-true, 64-true"
        raise ValueError(f"trainer.precision: {trainer.precision} needs a GPU, allowed on a CPU: {allowed}")
    if trainer.precision != "auto":
        return trainer.precision
    if trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if trainer.accelerator == "tpu":
        return "bf16-mixed"
    if trainer.accelerator != "cpu" and torch.backends.mps.is_available():
        return "32-true"
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS) else "32-true"


def _is_cpu(accelerator: str) -> bool:
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator == "cpu" or (accelerator == "auto" and not has_gpu)


def first_device(accelerator: str) -> torch.device:
    """The device of a stage that runs in one process, the one that Lightning would take.

    Lightning, whose import takes seconds, is asked for TPUs alone. Raises ValueError for an accelerator that
    this machine lacks.
    """
    if accelerator == "tpu" or (accelerator == "auto" and find_spec("torch_xla")):
        from lightning.fabric import Fabric

        return Fabric(accelerator=accelerator, devices=1).device
    present = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available(), "cpu": True}
    allowed = {"auto": ("mps", "cuda", "cpu"), "gpu": ("mps", "cuda")}.get(accelerator, (accelerator,))
    for kind in allowed:
        if present[kind]:
            return torch.device(kind) if kind == "cpu" else torch.device(kind, 0)
    here = ", ".join(["auto", *(kind for kind in present if present[kind])])
    raise ValueError(f"trainer.accelerator: {accelerator} is missing from this machine, allowed: {here}")


def lightning_kwargs(trainer: "Trainer") -> dict[str, Any]:
    """The keyword arguments of `lightning.Trainer` and of `lightning.Fabric` on this machine."""
    return trainer.kwargs() | {"precision": precision_of(trainer)}


def resolved(precision: int | str, device: torch.device) -> dict[str, Any]:
    """Precision, device and processor: results depend on them, and parameters may leave them open."""
    name = _FULL_NAMES.get(precision, str(precision)) if isinstance(precision, int) else precision
    return {"precision": name, "device": device.type, "processor": _processor(device)}


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return platform.machine()
