"""Every stage in turn as the paper's experiments run them, on tiny random checkpoints in place of the hub's.

The images are those of the benchmarks' own schema, of which MMMU asks about several, and here about none too.
"""

import json
import re
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
from atr.files import read_json
from atr.stages import distill, evaluate, extract, prepare, pretrain, report
from atr.vlm.checkpoint import OnevisionImageProcessor

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image> {% else %}{{ item['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)
SIDE, PATCH, PINPOINTS, ASPECT = 28, 7, [[28, 28], [28, 56], [56, 28], [56, 56]], "anyres_max_2"
TOWER = {
    "hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
NAMES = {  # encoder, model and depth of the tower, of which the model has all that it reads
    "llava_next": ("clip-vit-large-patch14-336", "llava-next-7b", 3),
    "llava_onevision": ("siglip-so400m-patch14-384", "llava-onevision-7b", 4),
}
CHANGES = {
    "source": "coco", "images": 12, "questions": 4, "benchmarks": "[textvqa, ai2d, mmmu]",
    "accelerator": "cpu", "precision": "32-true", "shard_images": 8, "epochs": 1, "batch_size": 4,
    "mask_images": 2, "collapse_after": 1.0, "validation": 0.25, "heads": 2,
    "random_seeds": 2, "max_new_tokens": 3, "bootstrap": 20, "newline": "follow", "budget": "tile",
}  # fmt: skip
KEEP = [0.2, 0.4]
REDUCERS = ("full", "none", "random", "selector", "distilled")
NO_IMAGE = {
    "id": "validation_Math_4", "question": "How much is 2 + 2?", "options": "[]", "answer": "4",
    "question_type": "open",
}  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def project(family, hub, tmp_path_factory):
    """A project in which the whole pipeline has run."""
    folder = tmp_path_factory.mktemp(family)
    for name in ("coco", "textvqa", "ai2d"):
        hub.write(folder / "hub", name)
    hub.write(folder / "hub", "mmmu", [*hub.DATASETS["mmmu"][2], NO_IMAGE])
    encoder, vlm, depth = NAMES[family]
    save_checkpoints(folder, family, depth)
    with pytest.MonkeyPatch.context() as patch:
        towers = {encoder: config.EncoderPreset(encoder, str(folder / "tower"), layer=2 if depth == 3 else 3)}
        patch.setattr(config, "ENCODERS", config.ENCODERS | towers)
        preset = config.VlmPreset(vlm, str(folder / "vlm"), encoder, stored=config.VLMS[vlm].stored)
        patch.setattr(config, "VLMS", config.VLMS | {vlm: preset})
        patch.chdir(folder)
        Path("params.yaml").write_text(parameters(encoder))
        prepare.main(config.load("prepare"))
        extract.main(config.load("extract"), "pretrain")
        pretrain.main(config.load("pretrain"))
        distill.main(config.load("distill"))
        for reducer in REDUCERS:
            evaluate.main(config.load("evaluate"), reducer)
        report.main(config.load("report"))
    return folder


def parameters(encoder):
    text, micro = (ROOT / "params.yaml").read_text().split("\nmicro:")
    for key, value in (CHANGES | {"repository": "hub"}).items():
        text, count = re.subn(rf"^( +{key}: ).*$", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert count, key
    text = re.sub(r"^  keep: \[.*\]$", f"  keep: {KEEP}", text, flags=re.MULTILINE)
    text = text.replace("encoder: micro", f"encoder: {encoder}").replace(
        "repository: hub", "repository: ./hub"
    )
    return f"{text}\nmicro:{micro}"


def save_checkpoints(folder, family, depth):
    """The model, and the tower alone, as the hub has both: OneVision's lacks the last layer."""
    torch.manual_seed(0)
    model, processor = {"llava_next": next_model, "llava_onevision": onevision_model}[family](tokenizer())
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
    tower = kind(vision(**TOWER, num_hidden_layers=depth))
    tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    tower.save_pretrained(folder / "tower")
    images.save_pretrained(folder / "tower")


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
        vision_config=CLIPVisionConfig(**TOWER, num_hidden_layers=3, initializer_range=0.3),
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
        vision_config=SiglipVisionConfig(**TOWER, num_hidden_layers=3, vision_use_head=False),
        text_config=language(Qwen2Config, len(words)), image_token_index=4, video_token_index=5,
        image_grid_pinpoints=PINPOINTS, vision_aspect_ratio=ASPECT,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(settings), processor


def results(project, reducer):
    folder = project / "experiments/evaluate" / reducer
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return rows, read_json(folder / "summary.json"), read_json(folder / "masks.json")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_question_is_answered_by_every_reducer(project, family):
    full, summary, _ = results(project, "full")
    assert {row["benchmark"] for row in full} == {"textvqa", "ai2d", "mmmu"}
    assert {len(row["images"]) for row in full if row["benchmark"] == "mmmu"} == {0, 1, 3}
    of = {row["id"]: row["tokens_full"] for row in full}
    trials = {"full": 1, "none": 1, "random": 2 * len(KEEP)} | dict.fromkeys(
        ("selector", "distilled"), len(KEEP)
    )
    for reducer in REDUCERS:
        rows, own, masks = results(project, reducer)
        assert [row["status"] for row in rows] == ["answered"] * len(of) * trials[reducer]
        assert {row["id"]: row["tokens_full"] for row in rows} == of
        assert own["tokens_full"] == summary["tokens_full"] == sum(of.values()) / len(of)
        assert (own["vlm"], own["parameters"]["evaluate"]["newline"]) == (NAMES[family][1], "follow")
        assert masks["grid"] == [4, 4] and len(masks["masks"]) == 3


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
def test_the_report_shows_the_results(project, family):
    page = (project / "experiments/report/report.html").read_text()
    assert NAMES[family][1] in page and all(name in page for name in ("textvqa", "ai2d", "mmmu"))
    assert (project / "experiments/report/figures/pages-textvqa.png").is_file()
