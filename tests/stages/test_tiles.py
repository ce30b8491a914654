"""Every stage of both overlays in experiments/ in turn, on tiny random checkpoints in place of the hub's.

The images are those of the benchmarks' own schema, of which MMMU asks about several, and here about none too.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from atr import config
from atr.cli import overlay
from atr.core.answer_files import load_rows
from atr.core.files import read_json
from atr.vlm.families.llava_onevision import OnevisionImageProcessor

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image> {% else %}{{ item['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)
SIDE, PATCH, PINPOINTS, ASPECT = 28, 7, [[28, 28], [28, 56], [56, 28], [56, 56]], "anyres_max_2"
OVERLAYS = {"llava_next": "llava-next", "llava_onevision": "llava-onevision"}
TOWERS = {  # as wide as the overlay's heads ask for; of OneVision's 27 layers the model has all but the last
    "llava_next": {"hidden_size": 64, "num_hidden_layers": 24, "num_attention_heads": 2},
    "llava_onevision": {"hidden_size": 72, "num_hidden_layers": 26, "num_attention_heads": 2},
}
SETTINGS = (
    "encoder=./tower", "vlm=./vlm", "prepare.repository=./hub", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "prepare.images=12", "prepare.questions=4", "extract.batch_size=4",
    "extract.shard_images=8", "extract.workers=0", "pretrain.epochs=1", "pretrain.batch_size=4",
    "pretrain.validation=0.25", "pretrain.collapse_after=1.0", "pretrain.mask_images=2", "distill.images=12",
    "distill.validation=0.25", "distill.max_new_tokens=3", "evaluate.keep=[0.2, 0.4]",
    "evaluate.max_new_tokens=3", "evaluate.bootstrap=20", "intrinsic.images=6", "intrinsic.batch_size=4",
    "intrinsic.pretrain_images=12", "intrinsic.epochs=1", "latency.batches=[1, 2]", "latency.seconds=0.001",
    "robustness.questions=1",
)  # fmt: skip
"""Of the machine and of the sizes; all else is as the overlay has it."""
KEEP = [0.2, 0.4]
PAPER = ("textvqa", "docvqa", "infovqa", "chartqa", "mmbench", "ai2d", "gqa", "mmmu", "mmstar", "scienceqa")
TEXT = PAPER[:5]
NO_IMAGE = {
    "id": "validation_Math_4", "question": "How much is 2 + 2?", "options": "[]", "answer": "4",
    "question_type": "open",
}  # fmt: skip


@pytest.fixture(scope="module", params=OVERLAYS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def project(family, hub, run_overlay, tmp_path_factory):
    """A project in which the whole pipeline has run under one of the overlays."""
    folder = tmp_path_factory.mktemp(family)
    for name, (_, _, rows) in hub.DATASETS.items():
        hub.write(folder / "hub", name, [*rows, NO_IMAGE] if name == "mmmu" else None)
    save_checkpoints(folder, family)
    run_overlay(folder, OVERLAYS[family], SETTINGS)
    return folder


@pytest.fixture(autouse=True)
def inside(project, monkeypatch):
    monkeypatch.chdir(project)


def reducers():
    return config.load("report").evaluate.names


def save_checkpoints(folder, family):
    """The model, and the tower alone, as the hub has both: OneVision's lacks the last layer."""
    torch.manual_seed(0)
    model, processor = {"llava_next": next_model, "llava_onevision": onevision_model}[family](tokenizer())
    own = tower_of(family)
    depth = own["num_hidden_layers"] + (family == "llava_onevision")
    model.save_pretrained(folder / "vlm")
    processor.save_pretrained(folder / "vlm")
    vision, kind, images = {
        "llava_next": (
            CLIPVisionConfig, CLIPVisionModel,
            CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        ),
        "llava_onevision": (
            SiglipVisionConfig, SiglipVisionModel,
            SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        ),
    }[family]  # fmt: skip
    tower = kind(vision(**own | {"num_hidden_layers": depth}))
    tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    tower.save_pretrained(folder / "tower")
    images.save_pretrained(folder / "tower")


def tower_of(family):
    return TOWERS[family] | {"intermediate_size": 48, "image_size": SIDE, "patch_size": PATCH}


def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", *"ABCD", "answer", "the", "is", "4"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"}, padding_side="left",
    )  # fmt: skip


def language(kind, size):
    return kind(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def next_model(words):
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = LlavaNextProcessor(
        images, words, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    settings = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**tower_of("llava_next")),
        text_config=language(LlamaConfig, len(words)), image_token_index=4, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(settings), processor


def onevision_model(words):
    images = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    processor = OnevisionImageProcessor(
        images, words, num_image_tokens=16, vision_feature_select_strategy="full", chat_template=TEMPLATE,
        vision_aspect_ratio=ASPECT,
    )  # fmt: skip
    settings = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tower_of("llava_onevision"), vision_use_head=False),
        text_config=language(Qwen2Config, len(words)), image_token_index=4, video_token_index=5,
        image_grid_pinpoints=PINPOINTS, vision_aspect_ratio=ASPECT,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(settings), processor


def results(project, reducer):
    folder = project / "experiments/evaluate" / reducer
    rows = [asdict(row) for row in load_rows(folder / "results.jsonl")]
    return rows, read_json(folder / "summary.json"), read_json(folder / "masks.json")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_parameter_but_sizes_is_the_overlays(family, tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    overlay.apply(ROOT / "experiments" / f"{OVERLAYS[family]}.yaml", path=tmp_path / "params.yaml")
    written = config.flat(tmp_path / "params.yaml")
    changed = {key for key, value in config.flat().items() if value != written[key]}
    assert changed <= {setting.partition("=")[0] for setting in SETTINGS}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_question_is_answered_by_every_reducer(project, family):
    full, summary, _ = results(project, "full")
    assert {row["benchmark"] for row in full} == set(PAPER)
    assert {len(row["images"]) for row in full if row["benchmark"] == "mmmu"} == {0, 1, 3}
    of = {row["id"]: row["tokens_full"] for row in full}
    trials = {"random": 2 * len(KEEP)} | dict.fromkeys(("selector", "distilled"), len(KEEP))
    assert set(reducers()) == {"full", "none", "selector_adaptive", *trials}
    for reducer in reducers():
        rows, own, masks = results(project, reducer)
        assert [row["status"] for row in rows] == ["answered"] * len(of) * trials.get(reducer, 1)
        assert {row["id"]: row["tokens_full"] for row in rows} == of
        assert own["tokens_full"] == summary["tokens_full"] == sum(of.values()) / len(of)
        assert own["parameters"]["evaluate"]["positions"] == "original"
        assert masks["grid"] == [4, 4]
        assert {image.partition("/")[0] for image in masks["masks"]} == set(TEXT)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_kept_is_the_asked_fraction_of_each_image(project, family):
    for reducer in ("random", "selector"):
        for row in results(project, reducer)[0]:
            images = len(row["images"])
            # 18 x 24 pixels fit one tile, beside the one of the whole image; of 4 rows no pair is cut off.
            size = 16 if family == "llava_onevision" and images > 1 else 32
            assert row["tokens_full"] == images * size
            assert row["tokens"] == images * int(row["keep"] * size + 0.5)
            assert row["tokens_fed"] == row["tokens"] + images * (4 if size == 32 else 1)  # newlines


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_means_of_visual_tokens_are_told_by_benchmark_and_kept_fraction(project):
    rows, summary, _ = results(project, "selector")
    for score in summary["scores"]:
        if "benchmark" in score:
            asked = [
                row for row in rows if (row["benchmark"], row["keep"]) == (score["benchmark"], score["keep"])
            ]
            assert score["tokens"] == pytest.approx(sum(row["tokens"] for row in asked) / len(asked))
            assert score["tokens_full"] == pytest.approx(
                sum(row["tokens_full"] for row in asked) / len(asked)
            )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_result_file_is_there_and_the_report_shows_them(project):
    experiments = project / "experiments"
    for result in (
        "pretrain/metrics",
        "distill/metrics",
        "reconstructor/metrics",
        "intrinsic/selector/metrics",
        "latency/selector/metrics",
        "latency/prefill/metrics",
        "robustness/selector/metrics",
    ):
        assert read_json(experiments / f"{result}.json")
    for weights in ("pretrain/selector", "distill/selector"):
        assert (experiments / weights / "model.safetensors").is_file()
    page = (experiments / "report/report.html").read_text()
    assert "./vlm" in page and all(name in page for name in PAPER)
    assert all(name in page for name in reducers())
    for name in TEXT:
        assert (experiments / f"report/figures/pages-{name}.png").is_file()
