from typing import get_args

import pytest

from atr import config
from atr.config.trainer import Accelerator, Strategy, Trainer


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("trainer.devices", 0, "auto"),
        ("trainer.devices", -2, "auto"),
        ("trainer.devices", True, "auto"),
        ("trainer.devices", "all", "auto"),
        ("trainer.devices", [], "indices"),
        ("trainer.devices", [0, 0], "distinct"),
        ("trainer.num_nodes", 0, "1 <= num_nodes"),
        ("trainer.accelerator", "quantum", "cuda"),
        ("trainer.strategy", "ddp_spawn", "auto, ddp"),
        ("trainer.strategy", "fsdp", "auto, ddp"),
        ("trainer.strategy", "ddp_find_unused_parameters_false", "auto, ddp"),
        ("trainer.strategy", "deepspeed_stage_2", "auto, ddp"),
        ("trainer.precision", "int8", "bf16-mixed"),
        ("trainer.precision", "bf16-true", "bf16-mixed"),
        ("trainer.precision", "16-true", "bf16-mixed"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize(
    "values",
    [
        {"devices": -1, "num_nodes": 1},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Trainer, values)


@pytest.mark.parametrize("devices", ["auto", -1, 1, 8, [0, 3]])
def test_the_trainer_section_is_handed_on_as_it_is(write, devices):
    trainer = config.load("extract", write(trainer__devices=devices, trainer__precision=32)).trainer
    assert trainer.kwargs() == {
        "accelerator": "auto",
        "devices": devices,
        "strategy": "auto",
        "precision": 32,
        "num_nodes": 1,
    }


def test_lightning_knows_the_names_and_takes_one_process_on_a_cpu():
    from lightning.pytorch import Trainer as LightningTrainer
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    from atr.core.hardware import lightning_kwargs

    accelerators, strategies = set(get_args(Accelerator)), set(get_args(Strategy))
    assert strategies - {"auto"} <= set(StrategyRegistry.available_strategies())
    assert accelerators - {"auto", "gpu"} == set(AcceleratorRegistry.available_accelerators())
    kwargs = lightning_kwargs(Trainer(accelerator="cpu"))
    assert LightningTrainer(**kwargs, logger=False, enable_checkpointing=False).world_size == 1
