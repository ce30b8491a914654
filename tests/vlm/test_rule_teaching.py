"""Families of the rule as teachers and students: packed passes with weights against the model's own."""

import pytest
import torch
from PIL import Image

from atr.config import Distill, Evaluate
from atr.reduction import FeatureSelector
from atr.vlm import weighted_attention
from atr.vlm.checkpoint import load_vlm
from atr.vlm.distillation import Distillation, check_teacher
from atr.vlm.families.tiny import tiny_config, tiny_model
from atr.vlm.generation import Generator
from atr.vlm.inputs import ImageInputs
from atr.vlm.prompted import PromptReader
from atr.vlm.reduce import shorten
from atr.vlm.teacher import answer
from atr.vlm.weighted_attention import log_probabilities

SIZES = {"wide": (44, 28), "tall": (20, 60), "small": (17, 17)}
BATCH = [("wide", ["w10 w11", "w12"]), ("tall", ["w13 w14 w15"]), ("small", ["w16", "w17", "w18 w19"])]
TYPES = ["qwen2_5_vl", "qwen3_vl", "internvl", pytest.param("smolvlm", marks=pytest.mark.exhaustive)]


class Pictures:
    def image(self, name):
        width, height = SIZES[name]
        generator = torch.Generator().manual_seed(len(name) + width)
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module", params=TYPES)
def model_type(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(checkpoints, model_type, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # a package that SmolVLM's processor needs for videos alone
        patch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
        folder = checkpoints.write(tmp_path_factory.mktemp(model_type), model_type)
        return load_vlm(str(folder), torch.float32)


@pytest.fixture
def reader(loaded):
    model, processor = loaded
    source = ImageInputs(model, processor, Pictures())
    return PromptReader(Generator(model, processor, source, Evaluate(max_new_tokens=3)))


def test_the_teachers_answers_are_those_of_the_untouched_model(reader):
    model, processor = reader.generator.model, reader.generator.processor
    for (name, prompts), answers in zip(BATCH, answer(reader, BATCH), strict=True):
        for prompt, ids_A in zip(prompts, answers.ids, strict=True):
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            inputs = processor(images=[Pictures().image(name)], text=[text], return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=3)[
                0, inputs["input_ids"].shape[1] :
            ]
            assert ids.tolist() == ids_A.tolist()
        assert torch.equal(answers.log_probabilities_AV.argmax(1), torch.cat(answers.ids))


def own_log_probabilities(reader, name, prompt, ids_A, kept_K, positions):
    """The tokens' log probabilities behind one prompt that was shortened to `kept_K`."""
    prepared = reader.generator.source.prepare([[name]], [prompt])
    longer = dict(prepared.inputs)
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in longer:
            more = {"input_ids": ids_A[:-1], "attention_mask": torch.ones_like(ids_A[:-1])}
            added = more.get(key, torch.zeros_like(ids_A[:-1]))
            longer[key] = torch.cat([longer[key], added[None]], 1)
    shorter = shorten(reader.generator.model, longer, prepared.tokens, [kept_K], positions)
    return reader.generator.model(**shorter).logits[0, -len(ids_A) :].log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("dropped", ["none", "not read", "of no weight"])
def test_each_prompt_reads_what_it_would_alone(reader, positions, dropped, monkeypatch):
    """Weight 1 for all tokens is the model's own pass; weight 0 is that of a shortened prompt."""
    monkeypatch.setattr(weighted_attention, "DROPPED_WEIGHT", 1e-12)
    answers, prompted = answer(reader, BATCH), reader.read(BATCH)
    stay = [
        torch.arange(length) % 3 == 1 if dropped != "none" else torch.ones(length).bool()
        for length in prompted.prepared.layout.lengths
    ]
    sequences = [
        prompted.sequence(row, answers[row], stay_P.float(), stay_P | (dropped == "of no weight"), positions)
        for row, stay_P in enumerate(stay)
    ]
    expected = [
        own_log_probabilities(reader, name, prompt, ids_A, stay[row].nonzero()[:, 0], positions)
        for row, (name, prompts) in enumerate(BATCH)
        for prompt, ids_A in zip(prompts, answers[row].ids, strict=True)
    ]
    actual = log_probabilities(reader.generator.model, sequences)
    torch.testing.assert_close(actual, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_every_weight_gets_a_gradient(reader):
    answers, prompted = answer(reader, BATCH[:1]), reader.read(BATCH[:1])
    (size,) = prompted.prepared.layout.lengths
    weights = (torch.arange(size) % 2).float().requires_grad_()
    sequence = prompted.sequence(0, answers[0], weights, torch.ones(size).bool(), "original")
    log_probabilities(reader.generator.model, [sequence]).exp().square().sum().backward()
    assert (weights.grad != 0).all()


def test_a_selector_learns_from_merged_tokens_of_images_with_grids_of_their_own(reader):
    model = reader.generator.model
    selector = FeatureSelector(32, (4, 4), layers=1, heads=2, encoder="tiny", layer="merged")
    module = Distillation(selector, reader.generator, Distill(), seed=0)
    module.answers = {
        name: answers for (name, _), answers in zip(BATCH, answer(module.reader, BATCH), strict=True)
    }
    scores = module._scores(module.reader.read(BATCH))
    assert list(map(len, scores)) == module.reader.read(BATCH).prepared.layout.sizes
    noise = torch.Generator().manual_seed(0)
    [(divergence, _)] = module._compare(BATCH, [lambda scores_P: module._sample(scores_P, noise)])
    divergence.backward()
    assert divergence > 0 and all(weight.grad is None for weight in model.parameters())
    assert selector.trunk.head.weight.grad.abs().max() > 0


REFUSED = {
    "gemma3": "gemma3 cannot teach: the cache of gemma3_text has layers of type DynamicSlidingWindowLayer",
    "paligemma": "paligemma cannot teach: paligemma lets the tokens of a prefix see later ones",
    "qwen3_5": "qwen3_5 cannot teach: the cache of qwen3_5_text has layers of type LinearAttentionLayer",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_teach_is_refused_by_name(name):
    with torch.device("meta"):
        model = tiny_model(tiny_config(name))
    with pytest.raises(ValueError, match=f"^distill: {REFUSED[name]}.*; allowed: causal attention") as error:
        check_teacher(model)
    assert "\n" not in str(error.value)
