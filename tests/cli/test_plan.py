"""The plan's arithmetic against the paper's numbers, the real modules and the real loops."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaNextConfig, LlavaOnevisionConfig

from atr import config
from atr.cli import overlay, plan
from atr.cli.disk import Disks
from atr.config.presets import VLMS
from atr.config.pretrain import Pretrain
from atr.config.trainer import Trainer
from atr.features.datamodule import FeatureDataModule
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.vlm.variants import VARIANTS

ROOT = Path(__file__).parents[2]
ROOMY = Disks(Path("data"), Path(".dvc/cache"), True, 10**15, 10**15, True)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def planned(tmp_path):
    """The plan of an experiment with some more settings; None is the shipped parameters."""

    def planned(name=None, *settings):
        path = tmp_path / "params.yaml"
        path.write_text(Path("params.yaml").read_text())
        file = tmp_path / "nothing.yaml"
        file.write_text("{}")
        overlay.apply(f"experiments/{name}.yaml" if name else file, settings, path)
        return plan.load_plan(path)

    return planned


def autoencoder(pretrain, width, grid):
    return FeatureAutoencoder(width, grid, pretrain.layers, pretrain.heads, pretrain.ffn_ratio)


@pytest.mark.parametrize(("width", "layers", "ratio"), [(24, 1, 4.0), (36, 3, 2.6), (192, 2, 4.0)])
def test_parameters_are_those_of_the_modules(width, layers, ratio):
    pretrain = Pretrain(layers=layers, ffn_ratio=ratio)
    real = autoencoder(pretrain, width, (3, 4))
    size = plan.Autoencoder.of(pretrain, width)
    for module, count in (
        (real.selector, size.selector),
        (real.reconstructor, size.reconstructor),
        (real, size.parameters),
    ):
        assert count == sum(parameter.numel() for parameter in module.parameters())


def test_a_parameter_count_by_hand():
    """Width 4, F = 8, one layer: 64 + 64 weights, 36 + 8 biases and norms; the trunk's norm 8; the head."""
    size = plan.Autoencoder(width=4, layers=1, hidden=8)
    assert (size.selector, size.reconstructor) == (172 + 8 + 5, 172 + 8 + 20)
    assert size.parameters == 185 + 200 + 4


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts():
    pretrain = Pretrain(layers=2, heads=3, ffn_ratio=3.0)
    real, tokens = autoencoder(pretrain, 24, (4, 5)), 20
    size = plan.Autoencoder.of(pretrain, 24)
    features_BND = torch.randn(6, tokens, 24)
    with torch.no_grad():
        assert counted(lambda: real.selector(features_BND)) == 6 * size.forward_flops(tokens, 1)
        assert counted(lambda: real.reconstructor(features_BND)) == 6 * size.forward_flops(tokens, 24)
    step = counted(lambda: real(features_BND, 1.0)[0].square().sum().backward())
    assert step == size.training_flops(tokens, 6, 0)


def test_a_validation_image_is_restored_as_often_as_the_training_does():
    from atr.reduction.pretraining import VALIDATION_KEEP

    assert 1 + len(VALIDATION_KEEP) == plan.RESTORED
    size = plan.Autoencoder(24, 2, 96)
    expected = size.forward_flops(20, 1) + plan.RESTORED * size.forward_flops(20, 24)
    assert size.training_flops(20, 0, 1) == expected


@pytest.mark.parametrize(("images", "batch"), [(100, 8), (99, 10), (64, 64)])
def test_split_and_steps_are_those_of_the_data_module(planned, images, batch):
    costs = planned(None, f"prepare.images={images}", f"pretrain.batch_size={batch}", "pretrain.epochs=1")
    data = FeatureDataModule([torch.zeros(1)] * images, batch, costs.pretrain.validation, seed=0)
    assert costs.split == (len(data.training), len(data.validation))
    if batch <= costs.split[0]:
        assert costs.steps == len(data.train_dataloader())
    else:
        assert costs.steps == 0
        (warning,) = plan.warnings(costs, ROOMY)
        assert warning.startswith("pretrain.batch_size: 61 images")


@pytest.mark.parametrize(
    ("devices", "nodes", "processes"), [(8, 1, 8), ("auto", 1, 1), (-1, 2, 1), ([0, 3], 2, 4)]
)
def test_each_device_takes_its_own_batch(planned, devices, nodes, processes):
    trainer = Trainer(devices=devices, num_nodes=nodes)
    costs = replace(planned("llava-next"), trainer=trainer)
    assert costs.processes == processes
    assert costs.steps == 40 * (95_000 // processes // 32)


@pytest.mark.parametrize("name", plan.BENCHMARK_QUESTIONS)
def test_questions_are_those_that_the_benchmark_says(name):
    first = (ROOT / f"atr/benchmarks/{name}.py").read_text().partition("\n")[0]
    count = re.findall(r": ([\d,]+) ", first)[-1]
    assert plan.BENCHMARK_QUESTIONS[name] == int(count.replace(",", ""))


def test_a_sample_of_questions_is_at_most_what_there_is(planned):
    costs = planned("llava-next", "prepare.questions=1000")
    assert costs.questions["mmmu"] == 900
    assert costs.questions["gqa"] == 1000
    assert costs.questions["mmbench"] == 4000
    assert costs.evaluation_images == sum(costs.questions.values()) - 1000 + 398


@pytest.mark.parametrize(
    "reducers", [["full", "none", "random"], ["full"], ["full", "divprune", "prumerge_adaptive"]]
)
def test_trials_are_those_of_the_evaluation_loop(planned, reducers):
    from atr.benchmarks.runner import trials_of

    costs = planned(None, f"evaluate.reducers=[{','.join(reducers)}]")
    asked = costs.evaluate
    assert set(costs.trials) == {*reducers, *asked.selectors, *asked.distilled}
    for reducer, trials in costs.trials.items():
        assert trials == len(trials_of(reducer, asked.keep, asked.random_seeds))


def test_prepared_images_are_not_larger_than_estimated(planned):
    from atr.micro import world

    images = 24
    costs = planned(None, f"prepare.images={images}")
    buffer = io.BytesIO()
    for index in range(images):
        sample = world.sample(costs.prepare.benchmarks[index % 6], "pretrain", index, 0)
        sample.image.save(buffer, format="png", compress_level=1)
    assert buffer.tell() <= costs.prepared_bytes <= 5 * buffer.tell()


def test_coco_holds_what_its_reader_says():
    from atr.datasets import training_images

    assert f"{plan.SOURCES['coco']:,} training images of COCO" in Path(training_images.__file__).read_text()


@pytest.mark.parametrize(
    ("name", "settings", "shown"),
    [
        (
            None,  # what trains and what is asked for is the project's to tune
            [
                "pretrain.epochs=6",
                "pretrain.batch_size=64",
                "distill.epochs=3",
                "prepare.images=8192",
                "prepare.questions=300",
                "robustness.questions=20",
                "robustness.keep=[0.3,0.5]",
            ],
            [
                "micro: 144 tokens of 192 channels an image",
                "micro: at most 144 tokens an image, 1 tile(s)",
                "8,192 to pretrain on (micro), at most 1,800 with questions",
                "453.0 MB for pretraining, at most 99.5 MB for evaluation",
                "7,782 images x 6 epochs, 726 steps: 64 images a step on 1 device(s)",
                "1,800: docs 300",
                "70,200: each question under 39 trials (full 1, none 1, random 18, selector 9, "
                "selector_adaptive 1, distilled 9)",
                "5,120 images x 3 epochs: micro answers the prompts",
                # 6 benchmarks, all tokens and two reducers at two kept fractions.
                f"robustness   at most {120 * 5 * 17:,} answers in float32, under 17 deployments",
            ],
        ),
        (
            "llava-next",
            [],
            [
                "576 tokens of 1,024 channels an image",
                "llava-next-7b: at most 2,880 tokens an image, 5 tile(s)",
                "118.0 GB for pretraining",
                "95,000 images x 40 epochs, 118,720 steps: 32 images a step on 1 device(s)",
                "40,062: textvqa 5,000",
                "1,562,418: each question under 39 trials (full 1, none 1, random 18, selector 9, ",
                "5,000 images x 1 epochs: llava-next-7b answers",
                # 10 benchmarks, MMBench's questions in up to four orders.
                f"robustness   at most {(9 * 5 + 4 * 5) * 5 * 17:,} answers",
            ],
        ),
        (
            "llava-onevision",
            [],
            [
                "729 tokens of 1,152 channels an image",
                "llava-onevision-7b: at most 26,973 tokens an image, 37 tile(s)",
                "168.0 GB for pretraining",
                "1,081,674: each question under 27 trials (full 1, none 1, random 12, selector 6, ",
                "costs 0.71 % at 26,973 tokens of the prefill it saves at 25 % kept, by FLOPs",
            ],
        ),
        (
            "qwen2.5-vl",
            [],
            [
                "qwen2.5-vl-7b: 391 tokens of 3,584 channels for an image of 640 x 480 pixels",
                "(min_pixels, max_pixels), 28 x 28 a token: 256 to 2,048 tokens",
                "qwen2.5-vl-7b: at most 2,048 tokens an image, 1 tile(s)",
                "costs 3.7 % at 391 tokens, 4.3 % at 2,048 tokens of the prefill it saves at 25 % kept",
                # 391 and 2,048 tokens of 3,584 channels in two bytes.
                "280.3 GB for pretraining, at most 424.0 GB for evaluation",
                "41,062: textvqa 5,000",
                "698,054: each question under 17 trials (full 1, none 1, random 4, divprune 2, selector 2, ",
            ],
        ),
        (
            "qwen3-vl",
            ["min_pixels=null", "max_pixels=null", "extract.layer=-2", "prepare.source=micro"],
            [
                # 168 x 168 pixels are enlarged to 65,536 or a little more.
                "qwen3-vl-8b: 64 tokens of 1,152 channels for an image of 168 x 168 pixels",
                "65,536 to 16,777,216 an image (min_pixels, max_pixels), 32 x 32 a token: 64 to ",
                "14.7 GB for pretraining",
            ],
        ),
    ],
)
def test_the_plan_of_what_is_shipped(planned, name, settings, shown):
    text = "\n".join(plan.lines(planned(name, *settings), ROOMY))
    assert [part for part in shown if part not in text] == []


def test_as_many_deployments_are_counted_as_there_are_():
    assert len(VARIANTS) + 1 == plan.DEPLOYMENTS


def test_the_shipped_parameters_give_no_warning(planned):
    assert list(plan.warnings(planned(), ROOMY)) == []


def test_an_unknown_encoder_is_said_to_be_unknown(planned):
    costs = planned(None, "encoder=some/tower", "vlm=some/model", "prepare.questions=300")
    text = "\n".join(plan.lines(costs, ROOMY))
    assert "some/tower: unknown tokens and width" in text
    assert "features  " not in text and "1,800: docs 300" in text
    assert "some/model: unknown tokens an image" in text
    size, pair = plan.warnings(costs, ROOMY)
    assert size.startswith("encoder: tokens and width of some/tower are unknown")
    assert pair.startswith("vlm: only stage distill, which loads it, can tell")


@pytest.mark.parametrize(
    "name, family, side",
    [("llava-next-7b", LlavaNextConfig, 336), ("llava-onevision-7b", LlavaOnevisionConfig, 384)],
)
def test_as_many_tiles_as_the_largest_grid_of_the_family_and_its_base(name, family, side):
    grids = family().image_grid_pinpoints
    assert VLMS[name].tiles == max((height // side) * (width // side) for height, width in grids) + 1


def test_the_model_of_the_paper_may_shrink_its_grid(planned):
    costs = planned("llava-onevision", "evaluate.interpolation=model")
    assert "at most 7,290 tokens an image, 37 tile(s)" in "\n".join(plan.lines(costs, ROOMY))


def test_what_a_stage_will_refuse_or_cannot_be_counted_is_a_warning(planned, tmp_path):
    for file in Path("data/micro/llava").iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())  # an encoder of the user's own
    own = [f"encoder={tmp_path}", f"vlm={tmp_path}", f"prepare.source={tmp_path}"]
    costs = planned("llava-next", *own, "pretrain.heads=5", "distill.heads=7")
    told = [warning.partition(":")[0] for warning in plan.warnings(costs, ROOMY)]
    assert told == ["pretrain.heads", "distill.heads", "vlm", "prepare.source", "prepare.benchmarks"]
    costs = planned("llava-next", "prepare.images=200000")
    assert next(plan.warnings(costs, ROOMY)).startswith("prepare.images: coco holds 117,266")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["evaluate.reducers=[full,uniform,hired,tome]"], "evaluate.reducers"),
        (["evaluate.reducers=[random]"], "evaluate.reducers"),
        (["evaluate.selectors=[selector,selector_mmr]"], "evaluate.selectors"),
        (["report.best=mmr"], "report.best"),
        (["pretrain.heads=5"], "pretrain.heads"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_plan(planned, settings, key):
    with pytest.raises(config.ConfigError, match=f"^{key}: "):
        planned("llava-next", *settings)


GB = 10**9


@pytest.mark.parametrize(
    ("linked", "one_disk", "data", "cache", "short"),
    [
        (True, True, 100 * GB, 100 * GB, []),
        (True, True, 99 * GB, 99 * GB, ["data and DVC's cache need 100.0 GB, 99.0 GB are free"]),
        (False, True, 199 * GB, 199 * GB, ["cannot be linked, need 200.0 GB, 199.0 GB are free"]),
        (False, True, 200 * GB, 200 * GB, []),
        (False, False, 100 * GB, 99 * GB, [".dvc/cache need 100.0 GB, 99.0 GB are free"]),
        (False, False, 99 * GB, 100 * GB, ["data need 100.0 GB, 99.0 GB are free"]),
        (False, False, GB, GB, ["data need 100.0 GB", ".dvc/cache need 100.0 GB"]),
        (True, False, GB, 100 * GB, []),  # symbolic links: the cache alone holds the bytes
    ],
)
def test_what_the_disk_does_not_hold_is_a_warning(linked, one_disk, data, cache, short):
    disks = Disks(Path("data"), Path(".dvc/cache"), linked, data, cache, one_disk)
    told = list(plan._short(100 * GB, disks))
    assert len(told) == len(short)
    assert all(part in warning for part, warning in zip(short, told, strict=True))


@pytest.mark.parametrize("layers, ratio, layer, is_costly", [
    (3, 4.0, "merged", True), (3, 0.25, "merged", False), (1, 4.0, "merged", False), (3, 4.0, -2, False),
])  # fmt: skip
def test_a_selection_that_costs_more_than_a_twentieth_of_what_it_saves_is_a_warning(
    planned, layers, ratio, layer, is_costly
):
    width = 3584 if layer == "merged" else 1280
    settings = [f"pretrain.{key}={value}" for key, value in (("layers", layers), ("ffn_ratio", ratio))]
    heads = [f"{stage}.heads={width // 128}" for stage in ("pretrain", "distill")]
    costs = planned("qwen2.5-vl", *settings, *heads, f"extract.layer={layer}")
    told = [warning for warning in plan.warnings(costs, ROOMY) if "selection costs" in warning]
    expected = (
        "pretrain.ffn_ratio, pretrain.layers: selection costs 10 % of the prefill it saves at 25 % kept, "
    )
    assert told == ([expected + "more than 5 %"] if is_costly else [])


def test_the_share_of_a_selection_by_hand(planned):
    """Qwen2.5-VL-7B: 6.53 billion weights; in each of 28 layers four FLOPs a channel and pair of tokens."""
    costs = planned("qwen2.5-vl")
    weights = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    pairs = (2048 * 2049 - 512 * 513) // 2
    saved = 2 * weights * (2048 - 512) + 28 * 4 * 3584 * pairs
    spent = 2048 * (3 * (8 * 3584**2 + 4 * 3584 * 896 + 4 * 2048 * 3584) + 2 * 3584)
    assert costs.selection_share(costs.pretrain, 2048) == pytest.approx(spent / saved)
    assert costs.selection_share(replace(costs.pretrain, ffn_ratio=4.0), 2048) > 2 * spent / saved


def test_tiles_are_selected_from_one_by_one(planned):
    costs = planned("llava-next")
    size = plan.Autoencoder.of(costs.pretrain, 1024)
    decoder = plan.decoder_of(costs.vlm.path)
    expected = 5 * size.forward_flops(576, 1) / plan.prefill_saved(decoder, 2880, 720)
    assert costs.selection_share(costs.pretrain, 576) == expected
