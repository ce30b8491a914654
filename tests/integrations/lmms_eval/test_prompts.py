"""Each family is asked as by lmms-eval's own class for it, which is run in its own environment."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from atr.integrations.lmms_eval.arguments import Arguments
from atr.integrations.lmms_eval.prompts import BY_TYPE, GENERAL, HELPFUL, prompt_of

ROOT = Path(__file__).parents[3]
COMMAND = os.environ.get("ATR_LMMS_EVAL")
ASKED = (
    "llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "gemma3", "mistral3",
    "glm4v", "lfm2_vl", "idefics3",
)  # fmt: skip


def arguments(**changes):
    return Arguments.of({"pretrained": "hub/model", "selector": "hub/selector", "keep": 0.5} | changes)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    python, script = Path(COMMAND).with_name("python"), Path(__file__).with_name("both_ask.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, script, folder, *ASKED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "said.json").read_text())


def needs_lmms_eval(test):
    skipped = pytest.mark.skipif(
        COMMAND is None,
        reason="ATR_LMMS_EVAL is not set: the path of lmms-eval in an environment with atr[lmms-eval]",
    )
    return pytest.mark.exhaustive(skipped(test))


@needs_lmms_eval
@pytest.mark.parametrize("family", ASKED)
def test_token_ids_images_and_decoding_are_those_of_lmms_evals_own_class(said, family):
    asked = said[family]
    assert asked["differences"] == [[]] * len(asked["texts"])
    assert "What is this?" in asked["texts"][0]
    system = prompt_of(family, arguments()).system
    assert all((system or "") in text for text in asked["texts"])


@needs_lmms_eval
def test_a_task_uses_the_wording_that_it_has_for_lmms_evals_own_class(said):
    assert said["wordings"] == {"qwen3_vl": "Which? Reply with a letter.", "internvl": "Which? Answer."}


@needs_lmms_eval
def test_a_video_is_refused_by_name(said):
    assert said["video"] == "content: video is not supported, allowed: text, image"


def test_families_that_lmms_eval_has_no_class_for_are_asked_by_its_general_one():
    assert prompt_of("aya_vision", arguments()) == GENERAL
    assert prompt_of("qwen3_vl_moe", arguments()) == BY_TYPE["qwen3_vl"]


def test_the_users_values_take_the_place_of_the_tables():
    assert prompt_of("gemma3", arguments()).system == HELPFUL
    assert prompt_of("gemma3", arguments(system_prompt="Be brief.")).system == "Be brief."
    changed = prompt_of("qwen2_vl", arguments(min_pixels=784, max_pixels=7840))
    assert dict(changed.images) == {"min_pixels": 784, "max_pixels": 7840}
    assert (changed.rounding.low, changed.rounding.high) == (784, 7840)
    assert prompt_of("internvl", arguments(max_patches=4)).images["max_patches"] == 4
    assert not prompt_of("qwen3_5", arguments(enable_thinking=False)).template["enable_thinking"]


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("llava", {"max_pixels": 9}, "max_pixels: 9 is not allowed for llava.*for: qwen2_vl, qwen2_5_vl"),
        ("qwen3_vl", {"min_pixels": 9}, "min_pixels: 9 is not allowed for qwen3_vl"),
        ("gemma3", {"max_patches": 2}, "max_patches: 2 is not allowed for gemma3.*allowed for: internvl"),
        ("llava", {"enable_thinking": True}, "enable_thinking: True is not allowed for llava.*: qwen3_5"),
    ],
)  # fmt: skip
def test_a_value_that_the_family_has_not_is_refused_by_name(family, change, message):
    with pytest.raises(ValueError, match=message):
        prompt_of(family, arguments(**change))
