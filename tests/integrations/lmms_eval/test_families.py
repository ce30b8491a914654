"""Families of the rule in lmms-eval's model, from tiny checkpoints with processors of their own classes."""

import pytest
import torch
from PIL import Image

from atr import FeatureSelector
from atr.core.tokens import budget
from atr.integrations.lmms_eval.arguments import Arguments
from atr.integrations.lmms_eval.conversations import make_inputs
from atr.integrations.lmms_eval.reduced_vlm import Decoding, ReducedVlm

TYPES = ("qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "smolvlm")
SMALL = {"qwen2_5_vl": {"min_pixels": 256, "max_pixels": 1536}}
SHORT = Decoding(max_new_tokens=4)


def turn(text, *sizes):
    content = [{"type": "image", "image": picture(*size)} for size in sizes]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def picture(width, height):
    generator = torch.Generator().manual_seed(width * height)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


CONVERSATIONS = [turn("w10 w11", (44, 28)), turn("w12", (20, 60), (17, 17)), turn("w13 w14 w15")]


@pytest.fixture(scope="module", params=TYPES)
def folders(request, checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = checkpoints.write(folder / "model", request.param)
    width = checkpoints.tiny_config(request.param).get_text_config().hidden_size
    torch.manual_seed(1)
    selector = FeatureSelector(width, (4, 4), layers=1, heads=1, encoder="tiny/tower", layer="merged")
    torch.nn.init.normal_(selector.trunk.head.weight)
    selector.save_pretrained(folder / "selector")
    return {"pretrained": str(model), "selector": str(folder / "selector"), **SMALL.get(request.param, {})}


@pytest.fixture(scope="module")
def load(folders):
    def load(**arguments):
        return ReducedVlm.load(Arguments.of(folders | {"keep": 1.0} | arguments), torch.device("cpu"))

    with pytest.MonkeyPatch.context() as patch:  # a package that SmolVLM's processor needs for videos alone
        patch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
        yield load


@pytest.fixture(scope="module")
def full(load):
    return load()


def test_with_all_tokens_batched_answers_equal_the_untouched_models(full):
    answers = full.answer(CONVERSATIONS, SHORT)
    for answer, conversation in zip(answers, CONVERSATIONS, strict=True):
        inputs = make_inputs(full.processor, full.prompt, [conversation])
        ids = full.model.generate(**inputs, **SHORT.as_generate())[0, inputs["input_ids"].shape[1] :]
        assert answer.text == full.processor.decode(ids, skip_special_tokens=True).strip()
        assert answer.input_tokens == int(inputs["attention_mask"].sum())
        assert all(image.tokens == image.of for image in answer.kept)


def test_kept_counts_are_exact_and_belong_to_their_question(load, full):
    whole = full.answer(CONVERSATIONS, SHORT)
    reduced = load(keep=0.5).answer(CONVERSATIONS, SHORT)
    for answer, other, images in zip(reduced, whole, (1, 2, 0), strict=True):
        assert [image.of for image in answer.kept] == [image.of for image in other.kept]
        assert [image.tokens for image in answer.kept] == [budget(0.5, image.of) for image in answer.kept]
        assert len(answer.kept) == images
        dropped = sum(image.of - image.tokens for image in answer.kept)
        assert other.input_tokens - answer.input_tokens == dropped


def test_bounds_hold_where_the_selector_chooses_the_count(load):
    (answer, *_) = load(keep="adaptive", bounds="0.25:0.5").answer(CONVERSATIONS[:1], SHORT)
    (image,) = answer.kept
    assert budget(0.25, image.of) <= image.tokens <= budget(0.5, image.of)


def test_a_selector_of_another_width_is_refused(load, tmp_path):
    other = FeatureSelector(20, (4, 4), layers=1, heads=1, encoder="tiny/tower", layer="merged")
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"merged of encoder tiny/tower, features of width 20; .* has width"):
        load(selector=str(tmp_path))
