"""Section `trainer`: how the stages that compute use the machine."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from atr.config.errors import refusal
from atr.config.fields import PROCESSES, STRICT, are_distinct

_DEVICES = f"auto, -1 for all, a count >= 1, or a list of distinct indices >= 0, below {PROCESSES}"


def _check_devices(devices: object) -> object:
    if isinstance(devices, list):
        valid = all(type(index) is int and 0 <= index < PROCESSES for index in devices) and are_distinct(
            devices
        )
    else:
        valid = devices == "auto" or (type(devices) is int and (devices == -1 or 1 <= devices < PROCESSES))
    if not valid:
        raise refusal(devices, _DEVICES)
    return devices


# No bf16-true or 16-true: small weight updates vanish in such weights. Frozen models are kept in the lower
# precision under bf16-mixed and 16-mixed anyway.
Precision = Literal["auto", "bf16-mixed", "16-mixed", "32-true", "64-true", 16, 32, 64]
# No FSDP or DeepSpeed: they shard the weights, so a process could save only a part of the selector. No spawn,
# fork or notebook variants: they train in child processes and leave the parent at step 0. No other variants
# of ddp: they bring nothing, as every parameter is used, and Fabric, which stage evaluate uses, lacks some.
Strategy = Literal["auto", "ddp"]
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]


@dataclass(frozen=True, config=STRICT)
class Trainer:
    """Arguments of `lightning.Trainer`, handed on unchanged except for an auto precision."""

    accelerator: Accelerator = "auto"
    """Lightning's name of the hardware; auto takes the best available."""
    devices: Annotated[Literal["auto"] | int | list[int], BeforeValidator(_check_devices)] = "auto"
    """Number of processes, or indices of devices; auto takes all GPUs, or one process on a CPU. Batch sizes
    are per device; the default of 1 in params.yaml keeps the number of steps the same on every machine."""
    strategy: Strategy = "auto"
    """Lightning's name of the strategy for several devices."""
    precision: Precision = "auto"
    """Lightning's name of the precision, or auto: bf16-mixed on machines with instructions for it (a CPU
    without them is ten times slower in it than in float32), else 16-mixed on CUDA and 32-true elsewhere."""
    num_nodes: Annotated[int, Field(ge=1, le=PROCESSES)] = 1
    """Number of machines."""

    def kwargs(self) -> dict[str, Any]:
        """The fields by name; `atr.core.hardware.lightning_kwargs` makes Lightning's arguments of them."""
        return asdict(self)
