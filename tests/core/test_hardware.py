import pytest
import torch
from lightning.fabric import Fabric

from atr.config.trainer import Trainer
from atr.core.hardware import first_device, lightning_kwargs, precision_of, resolved


def machine(monkeypatch, cuda=None, mps=False, **instructions):
    """A machine of those parts; `cuda` says whether its GPU has bfloat16, None that there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **instructions})


@pytest.mark.parametrize(
    "parts, accelerator, precision",
    [
        ({}, "auto", "32-true"),
        ({"amx_bf16": False}, "cpu", "32-true"),
        ({"amx_bf16": True}, "auto", "bf16-mixed"),
        ({"avx512_bf16": True}, "cpu", "bf16-mixed"),
        ({"cuda": True}, "auto", "bf16-mixed"),
        ({"cuda": False}, "gpu", "16-mixed"),
        ({"cuda": True}, "cpu", "32-true"),
        ({"mps": True, "bf16": True}, "auto", "32-true"),
        ({}, "tpu", "bf16-mixed"),
    ],
)
def test_an_auto_precision_is_what_the_hardware_has_instructions_for(
    monkeypatch, parts, accelerator, precision
):
    machine(monkeypatch, **parts)
    assert precision_of(Trainer(accelerator=accelerator)) == precision


@pytest.mark.parametrize(
    ("parts", "accelerator", "device"),
    [
        ({}, "auto", "cpu"),
        ({"cuda": True}, "cpu", "cpu"),
        ({"cuda": True}, "auto", "cuda:0"),
        ({"cuda": True}, "gpu", "cuda:0"),
        ({"cuda": True}, "cuda", "cuda:0"),
        ({"mps": True}, "auto", "mps:0"),
        ({"mps": True}, "gpu", "mps:0"),
    ],
)
def test_the_first_device_is_the_one_that_lightning_would_take(monkeypatch, parts, accelerator, device):
    machine(monkeypatch, **parts)
    assert str(first_device(accelerator)) == device


def test_the_first_device_is_lightnings_own():
    assert first_device("auto") == Fabric(accelerator="auto", devices=1).device


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_an_accelerator_that_is_missing_is_refused(monkeypatch, accelerator):
    machine(monkeypatch)
    with pytest.raises(ValueError, match=rf"^trainer.accelerator: {accelerator} is missing .*: auto, cpu$"):
        first_device(accelerator)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", 64])
def test_a_precision_that_is_named_is_taken(monkeypatch, precision):
    machine(monkeypatch)
    assert precision_of(Trainer(precision=precision)) == precision


@pytest.mark.parametrize("precision", [16, "16-mixed"])
def test_mixed_float16_is_refused_on_a_cpu(monkeypatch, precision):
    """Lightning would take bfloat16 for it, and the records would say float16."""
    for accelerator, parts in (("cpu", {"cuda": True}), ("auto", {})):
        machine(monkeypatch, **parts)
        with pytest.raises(
            ValueError, match=f"trainer.precision: {precision} needs a GPU, allowed on a CPU:"
        ):
            precision_of(Trainer(accelerator=accelerator, precision=precision))
    machine(monkeypatch, cuda=True)
    assert precision_of(Trainer(precision=precision)) == precision


def test_the_rest_goes_to_lightning_as_it_is():
    trainer = Trainer(accelerator="cpu", devices=2, precision="32-true")
    assert lightning_kwargs(trainer) == trainer.kwargs()
    assert lightning_kwargs(Trainer(accelerator="cpu"))["precision"] in ("bf16-mixed", "32-true")


def test_this_torch_knows_the_instructions_by_their_names():
    assert {"amx_bf16", "avx512_bf16"} <= set(torch.cpu.get_capabilities()) or not any(
        name.startswith("avx") for name in torch.cpu.get_capabilities()
    )


@pytest.mark.parametrize(
    "precision, name", [(16, "16-mixed"), (32, "32-true"), (64, "64-true"), ("bf16-true", "bf16-true")]
)
def test_a_record_has_the_full_name_of_the_precision_and_no_place_of_the_device(monkeypatch, precision, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert resolved(precision, torch.device("cuda:3")) == {
        "precision": name, "device": "cuda", "processor": "NVIDIA H200",
    }  # fmt: skip
    assert resolved(precision, torch.device("cpu")).keys() == {"precision", "device", "processor"}
