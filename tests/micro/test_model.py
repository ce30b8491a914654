from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from atr import config
from atr.micro import world
from atr.micro.model import answers, build_model, build_processor

ROOT = Path(__file__).parents[2]
VOCABULARY = (*world.QUESTIONS, *world.ANSWERS)


@pytest.fixture(scope="module")
def processor():
    return build_processor(VOCABULARY, world.SIZE)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return build_model(processor, world.SIZE, width=64, layers=1).eval()


def test_attention_starts_as_trained_attention_looks(processor):
    """Like attends to like in every head, each in its own way, and what is found is taken away."""
    model = build_model(processor, world.SIZE, width=128, layers=2)
    for layer in model.model.vision_tower.encoder.layers:
        own = layer.self_attn
        heads = [own.q_proj.weight[rows].T @ own.k_proj.weight[rows] for rows in (slice(64), slice(64, 128))]
        assert not torch.allclose(*heads)
        through = own.out_proj.weight @ own.v_proj.weight
        for product, sign in ((heads[0], 1), (heads[1], 1), (through, -1)):
            others = product[~torch.eye(128, dtype=torch.bool)]
            assert sign * product.diagonal().mean() > 0.3 and others.mean().abs() < 0.01


@pytest.mark.parametrize("answer", ["407", "kettle", "9", "0"])
def test_answers_survive_the_tokenizer(processor, answer):
    ids = processor.tokenizer(answer).input_ids
    assert (
        processor.tokenizer.decode([*ids, processor.tokenizer.eos_token_id], skip_special_tokens=True)
        == answer
    )


def test_every_word_is_one_token_and_every_digit_too(processor):
    tokenizer = processor.tokenizer
    for word in VOCABULARY:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
        assert tokenizer.unk_token_id not in tokenizer(word).input_ids
    assert len(tokenizer("9021", add_special_tokens=False).input_ids) == 4


def test_prompt_is_start_image_question(processor):
    image = world.sample("docs", "train", 0, 0).image
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "price"}]}]
    inputs = processor(images=[image], text=[processor.apply_chat_template(chat)], return_tensors="pt")
    start, *visual, question = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert (start, set(visual), len(visual), question) == ("<s>", {"<image>"}, 144, "price")


def test_pixels_reach_the_tower_unchanged_but_for_their_scale(processor):
    image = world.sample("signs", "train", 0, 0).image
    pixels = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"][0]
    expected = torch.from_numpy(np.asarray(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected)


def test_saved_and_loaded_it_answers_the_same(model, processor, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    samples = [world.sample("docs", "train", index, 0) for index in range(5)]
    images, questions = [s.image for s in samples], [s.turns[0][0] for s in samples]
    said = answers(model, processor, images, questions, batch_size=2)
    assert len(said) == 5
    assert answers(loaded, AutoProcessor.from_pretrained(tmp_path), images, questions) == said


def test_the_shipped_towers_class_token_is_known_to_be_untrained(model):
    """Else the peers that rank by its attention would rank by noise."""
    shipped = AutoConfig.from_pretrained(ROOT / config.VLMS["micro"].path).vision_config
    assert shipped.untrained_class_token and model.config.vision_config.untrained_class_token
