import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from atr.vlm.families.tiny import (
    TINY_TYPES,
    attention_kinds,
    load_config,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from atr.vlm.families.tiny_inputs import ROWS

LAYOUTS = [
    "llava_onevision", "ernie4_5_vl_moe", "gemma4", "paligemma", "internvl", "smolvlm", "mistral3", "lfm2_vl",
    "minicpmv4_6", "ovis2",
]  # fmt: skip
OTHERS = [pytest.param(name, marks=pytest.mark.exhaustive) for name in TINY_TYPES if name not in LAYOUTS]


@pytest.mark.parametrize("model_type", [*LAYOUTS, *OTHERS])
@torch.no_grad()
def test_a_copy_reads_its_images(model_type):
    model = tiny_model(tiny_config(model_type))
    inputs = tiny_inputs(model)
    assert sum(weight.numel() for weight in model.parameters()) < 200_000
    logits_BLV = model(**inputs).logits
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    moved_B = (model(**other).logits - logits_BLV).abs().amax((1, 2))
    has_image_B = torch.tensor([bool(row) for row in ROWS])
    assert (moved_B[has_image_B] > 0.05).all()
    assert (moved_B[~has_image_B] == 0).all()


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_rows_are_ragged_and_the_same_in_any_batch(model_type):
    model = tiny_model(tiny_config(model_type))
    inputs = tiny_inputs(model)
    lengths = inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    for row, images in enumerate(ROWS):
        alone = tiny_inputs(model, [images])
        for key in ("input_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
            assert (key in alone) == (key in inputs)
            if key in alone:
                assert torch.equal(inputs[key][row, -lengths[row] :], alone[key][0])
    right = tiny_inputs(model, padding="right")
    assert torch.equal(right["input_ids"][0, : lengths[0]], inputs["input_ids"][0, -lengths[0] :])


def test_special_tokens_lie_in_the_vocabulary_and_apart():
    config = tiny_config("qwen2_5_vl")
    numbers = [
        config.image_token_id, config.video_token_id, config.vision_start_token_id,
        config.vision_end_token_id, config.text_config.bos_token_id, config.text_config.eos_token_id,
    ]  # fmt: skip
    assert len(set(numbers)) == len(numbers)
    assert max(numbers) < config.text_config.vocab_size


def test_layers_of_every_kind_are_kept():
    assert set(tiny_config("qwen3_5").text_config.layer_types) == {"linear_attention", "full_attention"}
    assert set(tiny_config("gemma3").text_config.layer_types) == {"sliding_attention", "full_attention"}
    assert set(tiny_config("lfm2_vl").text_config.layer_types) == {"conv", "full_attention"}


def test_the_same_seed_draws_the_same_weights_in_any_attention():
    config = tiny_config("qwen3_vl")
    eager, sdpa = tiny_model(config), tiny_model(config, "sdpa", torch.bfloat16)
    assert eager.config._attn_implementation == "eager"
    assert sdpa.config._attn_implementation == "sdpa"
    for first, second in zip(eager.parameters(), sdpa.parameters(), strict=True):
        assert torch.equal(first.bfloat16(), second)
    assert not torch.equal(tiny_model(config, seed=1).lm_head.weight, eager.lm_head.weight)


def test_attention_is_of_the_kinds_that_the_model_supports():
    assert attention_kinds(tiny_config("qwen3_vl")) == ("eager", "sdpa")
    assert attention_kinds(tiny_config("got_ocr2")) == ("eager",)


def test_a_folder_is_shrunk_as_its_type_is(tmp_path):
    AutoConfig.for_model("internvl").save_pretrained(tmp_path)
    config = tiny_config(load_config(str(tmp_path)))
    assert config.to_dict() == tiny_config("internvl").to_dict()


def test_a_text_override_reaches_the_language_model():
    assert tiny_config("gemma4", use_bidirectional_attention="vision").text_config.use_bidirectional_attention


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_type", "neither a local folder nor a model type"),
        ("llama", "'llama' is no image-text-to-text model"),
    ],
)
def test_what_is_no_vision_language_model_is_refused_in_one_line(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        tiny_config(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_configuration_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="its configuration cannot be read") as caught:
        load_config(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_built_says_so_in_one_line():
    config = tiny_config("llava")
    config.text_config.hidden_size = -1
    with pytest.raises(ValueError, match="'llava' cannot be built") as caught:
        tiny_model(config)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="'llama' is no image-text-to-text model"):
        tiny_config(LlamaConfig())
