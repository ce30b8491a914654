import pytest
from PIL import Image

from atr.integrations.lmms_eval.arguments import Arguments
from atr.integrations.lmms_eval.conversations import finish_answer, make_inputs
from atr.integrations.lmms_eval.prompts import Prompt, prompt_of


def prompt(family):
    return prompt_of(family, Arguments("hub/model", "hub/selector", 0.5))


class Recorder:
    """In the place of a processor: keeps what it is given."""

    image_token = "[IMG]"

    class tokenizer:
        bos_token = "<s>"

    def __call__(self, **given):
        self.given = given
        return {}

    def apply_chat_template(self, conversation, tokenize, add_generation_prompt, **options):
        assert not tokenize and add_generation_prompt
        self.options = options
        turns = [
            f"{turn['role']}: {[item.get('text', '#') for item in turn['content']]}" for turn in conversation
        ]
        return "<s>" + " ".join(turns)


@pytest.fixture
def ask():
    def ask(prompt, *conversations):
        recorder = Recorder()
        make_inputs(recorder, prompt, conversations)
        return recorder.given

    return ask


def turn(text, *images):
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


IMAGE = Image.new("RGB", (30, 20), (10, 200, 30))


def test_the_system_turn_comes_first_and_images_before_the_text(ask):
    given = ask(prompt("gemma3"), turn("a <image>b <image 2>", IMAGE), turn("c"))
    system = "system: ['You are a helpful assistant.']"
    assert given["text"] == [f"<s>{system} user: ['#', 'a b ']", f"<s>{system} user: ['c']"]
    assert [len(images) for images in given["images"]] == [1, 0]
    assert given["add_special_tokens"] is False and given["padding"] and given["return_tensors"] == "pt"


def test_without_images_the_processor_is_given_none(ask):
    given = ask(prompt("llava"), turn("a"))
    assert given["images"] is None
    assert "add_special_tokens" not in given and given["text"] == ["<s>user: ['a']"]


def test_numbered_tags_stay_where_lmms_evals_class_leaves_them(ask):
    assert ask(prompt("qwen2_vl"), turn("<image>a <image 1>"))["text"][0].endswith("user: ['a <image 1>']")
    assert ask(prompt("llava"), turn("a <image>"))["text"] == ["<s>user: ['a <image>']"]


def test_images_are_resized_and_compressed_before_the_processor(ask):
    (image,) = ask(prompt("qwen3_vl"), turn("a", IMAGE))["images"][0]
    assert image.size == (96, 64) and image.getpixel((3, 3)) == (10, 200, 30)
    (image,) = ask(prompt("glm4v"), turn("a", IMAGE))["images"][0]
    assert image.size == (30, 20) and image.format == "JPEG"
    pixels = {"shortest_edge": 3136, "longest_edge": 602112}
    assert ask(prompt("qwen2_vl"), turn("a", IMAGE))["images_kwargs"] == {"size": pixels}
    given = ask(prompt("internvl"), turn("a", IMAGE))
    assert given["images"] == [[IMAGE]] and given["images_kwargs"] == {"min_patches": 1, "max_patches": 12}


def test_mistral_numbers_several_images_and_uses_the_template_for_none(ask):
    given = ask(prompt("mistral3"), turn("a", IMAGE), turn("b", IMAGE, IMAGE), turn("c"))
    assert given["text"] == [
        "<s>[INST][IMG]\na[/INST]",
        "<s>[INST]Image 1: [IMG]\nImage 2: [IMG]\n\nb[/INST]",
        "<s>user: ['c']",
    ]


@pytest.mark.parametrize(
    "family, text, until, expected",
    [
        ("llava", " a\n\nb ", ("\n\n",), "a\n\nb"),
        ("qwen2_vl", " a\n\nb", ("\n\n",), "a"),
        ("qwen2_vl", "a. b", ".", "a"),
        ("gemma3", "a\n\nb. c", ("\n\n", "."), "a\n\nb"),
        ("qwen3_5", "so </think> b", (), "b"),
        ("qwen3_5", "so", (), ""),
        ("mistral3", "so </think> b", (), "b"),
        ("mistral3", "so", (), "so"),
    ],
)
def test_an_answer_ends_where_lmms_evals_class_ends_it(family, text, until, expected):
    assert finish_answer(text, prompt(family), until) == expected


def test_thinking_that_is_switched_off_is_not_looked_for():
    silent = Prompt("qwen3_5", template={"enable_thinking": False})
    assert finish_answer("so", silent, ()) == "so"
