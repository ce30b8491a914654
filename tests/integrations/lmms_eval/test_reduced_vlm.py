import json
import shutil

import pytest
import torch
from PIL import Image

from atr import FeatureSelector
from atr.core.tokens import budget
from atr.integrations.lmms_eval.arguments import Arguments
from atr.integrations.lmms_eval.reduced_vlm import Decoding, ReducedVlm

FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
SHORT = Decoding(max_new_tokens=6)


def picture(seed, size=(28, 28)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def conversation(text, *images):
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


CONVERSATIONS = [
    conversation("a b c", picture(1, (40, 30))),
    conversation("d e", picture(2), picture(3, (28, 80))),
    conversation("f g h i"),
]


def fresh():
    """Copies of the conversations, as transformers modifies its arguments."""
    return [
        conversation(turn[0]["content"][-1]["text"], *(i["image"] for i in turn[0]["content"][:-1]))
        for turn in CONVERSATIONS
    ]


@pytest.fixture
def untouched(model, processor, family):
    """Answer ids and prompt length of the unreduced model, for inputs made by the processor."""

    def generate(conversation, **options):
        *images, text = conversation[0]["content"]
        images = [item["image"] for item in images]
        prompt = "<image> " * len(images) + text["text"]
        nested = [images] if family == "llava_onevision" else images
        inputs = processor(text=[prompt], images=nested if images else None, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, **options)
        return ids[0, inputs["input_ids"].shape[1] :], inputs["input_ids"].shape[1]

    return generate


@FAMILIES
def test_with_all_tokens_batched_answers_equal_the_models_single_ones(make_vlm, untouched, processor):
    answers = make_vlm(keep=1.0).answer(fresh(), SHORT)
    for answer, conversation in zip(answers, fresh(), strict=True):
        ids, read = untouched(conversation)
        assert answer.text == processor.decode(ids, skip_special_tokens=True).strip()
        assert (answer.input_tokens, answer.output_tokens) == (read, len(ids))


@FAMILIES
@pytest.mark.parametrize("keep", [0.5, 3])
def test_kept_counts_are_exact_and_belong_to_their_question(make_vlm, keep):
    vlm = make_vlm(keep=keep)
    full = make_vlm(keep=1.0).answer(fresh(), SHORT)
    for answer, whole, images in zip(vlm.answer(fresh(), SHORT), full, (1, 2, 0), strict=True):
        assert len(answer.kept) == images
        assert [image.of for image in answer.kept] == [image.of for image in whole.kept]
        assert [image.tokens for image in answer.kept] == [budget(keep, image.of) for image in answer.kept]
        assert whole.input_tokens - answer.input_tokens == sum(
            image.of - image.tokens for image in answer.kept
        )


@FAMILIES
def test_input_tokens_are_the_length_of_the_language_models_sequence(make_vlm, model):
    lengths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    (answer,) = make_vlm(keep=0.3).answer(fresh()[1:2], SHORT)
    hook.remove()
    assert lengths[0] == answer.input_tokens
    assert len(lengths) == answer.output_tokens


def test_the_answer_depends_on_the_selector(make_vlm, selector):
    vlm = make_vlm(keep=2)
    (first,) = vlm.answer(fresh()[:1], SHORT)
    with torch.no_grad():
        selector.trunk.head.weight.neg_()
    (second,) = vlm.answer(fresh()[:1], SHORT)
    assert not torch.equal(first.kept[0].indices_K, second.kept[0].indices_K)


def test_an_answer_is_counted_up_to_its_end_token(make_vlm, untouched, model):
    ids, _ = untouched(fresh()[0])
    model.generation_config.eos_token_id = [2, int(ids[3])]  # a token that it generates before the limit
    (ended, *_) = make_vlm().answer(fresh(), SHORT)
    assert ended.output_tokens == ids.tolist().index(int(ids[3])) + 1


def test_beams_and_sampling_equal_the_models(make_vlm, untouched, processor):
    vlm = make_vlm()
    (beams,) = vlm.answer(fresh()[1:2], Decoding(max_new_tokens=6, num_beams=3))
    ids, _ = untouched(fresh()[1], num_beams=3)
    assert beams.text == processor.decode(ids, skip_special_tokens=True).strip()
    torch.manual_seed(0)
    warm = Decoding(max_new_tokens=12, temperature=50.0, top_p=1.0)
    texts = {vlm.answer(fresh()[1:2], warm)[0].text for _ in range(3)}
    assert len(texts) > 1


def test_a_placeholder_typed_in_a_question_is_refused(make_vlm):
    with pytest.raises(ValueError, match="image"):
        make_vlm(keep=0.5).answer([conversation("a <image> b", picture(1))], SHORT)


@pytest.fixture
def folders(make_model, processor, selector, tmp_path):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    selector.save_pretrained(tmp_path / "selector")
    return {"pretrained": str(tmp_path / "llava"), "selector": str(tmp_path / "selector")}


def load(folders, **arguments):
    return ReducedVlm.load(Arguments.of(folders | {"keep": 0.5} | arguments), torch.device("cpu"))


@pytest.mark.parametrize("dtype, expected", [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_weights_have_the_dtype_of_the_checkpoint_or_the_given_one(folders, selector, dtype, expected):
    vlm = load(folders, dtype=dtype)
    assert vlm.model.dtype == expected
    assert not vlm.model.training and not vlm.selector.training
    assert torch.equal(vlm.selector.trunk.head.weight, selector.trunk.head.weight)
    (answer,) = vlm.answer(fresh()[:1], SHORT)
    assert [image.tokens for image in answer.kept] == [8]


def test_a_selector_of_another_layer_is_refused_before_the_weights_are_read(folders, tmp_path):
    (tmp_path / "llava/model.safetensors").unlink()
    other = FeatureSelector(24, (4, 4), layers=1, heads=2, encoder="tiny/tower", layer=-1)
    other.save_pretrained(tmp_path / "selector")
    with pytest.raises(ValueError, match=r"layer -1 of encoder tiny/tower.*llava reads layer -2"):
        load(folders)


def test_positions_that_the_family_lacks_are_refused_before_the_weights_are_read(folders, tmp_path):
    path = tmp_path / "llava/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"text_config": {"model_type": "bloom"}}))
    (tmp_path / "llava/model.safetensors").unlink()
    with pytest.raises(ValueError, match="original is not supported by bloom, allowed: contiguous"):
        load(folders)


def test_empty_folders_are_named(folders, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no FeatureSelector could be loaded"):
        load(folders | {"selector": "hub/nowhere"})
    shutil.rmtree(tmp_path / "llava")
    with pytest.raises(ValueError, match=r"pretrained: .*llava' is not a model"):
        load(folders)
