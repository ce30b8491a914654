"""Has lmms-eval's own class and ours ask the same questions, and writes what each would give the model.

Run in lmms-eval's environment with a folder to work in; the model is a stand-in that records its input. Not a
test by itself: see test_prompts.py.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers as hf
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from atr.integrations.lmms_eval.arguments import Arguments
from atr.integrations.lmms_eval.conversations import make_inputs
from atr.integrations.lmms_eval.model import Atr
from atr.integrations.lmms_eval.prompts import prompt_of
from atr.integrations.lmms_eval.reduced_vlm import Decoding

QWEN = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}"
    "{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}{% if enable_thinking %}<think>\n{% endif %}"
)


def plain(image, begin=""):
    """A chat template of any other model."""
    return (
        begin + "{% for message in messages %}{{ message.role }}: {% if message.content is string %}"
        "{{ message.content }}{% else %}{% for item in message.content %}{% if item.type == 'image' %}"
        + image + "{% else %}{{ item.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant: "
    )  # fmt: skip


def tokenizer(*special, begins=False, **named):
    """Bytes, and the special tokens; `begins` is whether it adds a beginning token by itself."""
    words = ["<pad>", "<s>", "</s>", *special, *named.values()]
    alphabet = [*dict.fromkeys(words), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if begins:
        from tokenizers.processors import TemplateProcessing

        made.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named | {f"token_{number}": word for number, word in enumerate(special)},
        padding_side="left",
    )


def qwen(kind, images, videos):
    words = tokenizer("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                      "<|video_pad|>")  # fmt: skip
    return kind(images(), words, videos(), chat_template=QWEN)


def llava(kind, images, **options):
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1} | options
    return kind(images, tokenizer("<image>", begins=True), chat_template=plain("<image>\n"), **options)


CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
PINS = [[28, 28], [28, 56], [56, 28], [56, 56]]
MAKERS = {
    "llava": lambda: llava(hf.LlavaProcessor, hf.CLIPImageProcessor(**CROP), patch_size=7),
    "llava_next": lambda: llava(
        hf.LlavaNextProcessor, hf.LlavaNextImageProcessor(**CROP, image_grid_pinpoints=PINS), patch_size=7
    ),
    "qwen2_vl": lambda: qwen(hf.Qwen2VLProcessor, hf.Qwen2VLImageProcessor, hf.Qwen2VLVideoProcessor),
    "qwen2_5_vl": lambda: qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLImageProcessor, hf.Qwen2VLVideoProcessor),
    "qwen3_vl": lambda: qwen(
        hf.Qwen3VLProcessor,
        lambda: hf.Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 4096, "longest_edge": 65536}),
        hf.Qwen3VLVideoProcessor,
    ),
    "qwen3_5": lambda: MAKERS["qwen3_vl"](),
    "internvl": lambda: hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                  video_token="<video>"),
        hf.InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=4,
        chat_template=plain("<IMG_CONTEXT>\n"),
    ),
    "gemma3": lambda: hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer(boi_token="<start_of_image>", image_token="<image_soft_token>", eoi_token="<end_of_image>",
                  begins=True),
        chat_template=plain("<start_of_image>", "{{ bos_token }}"),
        image_seq_length=4,
    ),
    "mistral3": lambda: hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}),
        tokenizer("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", begins=True),
        patch_size=14,
        spatial_merge_size=2,
        chat_template=plain("[IMG]"),
    ),
    "glm4v": lambda: hf.Glm4vProcessor(
        hf.Glm4vImageProcessor(size={"shortest_edge": 3136, "longest_edge": 65536}),
        tokenizer("<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>"),
        hf.Glm4vVideoProcessor(),
        chat_template=plain("<|image|>"),
    ),
    "lfm2_vl": lambda: hf.Lfm2VlProcessor(
        hf.Lfm2VlImageProcessor(),
        tokenizer("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
        chat_template=plain("<image>"),
    ),
    "idefics3": lambda: hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
        tokenizer("<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
                  begins=True),
        image_seq_len=4,
        chat_template=plain("<image>", "{{ bos_token }}"),
    ),
}  # fmt: skip
CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "glm4v": "Glm4vMoeForConditionalGeneration",
}


class StandIn(torch.nn.Module):
    """In the place of a model: records the input and ends each answer at once."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, config):
        super().__init__()
        self.config, self.asked = config, []

    def generate(self, **given):
        self.asked.append(given)
        end = torch.full((len(given["input_ids"]), 1), 2)
        return torch.cat([given["input_ids"], end], 1)

    def tie_weights(self):
        pass


def picture(seed, width, height, mode="RGB"):
    generator = torch.Generator().manual_seed(seed)
    bands = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = torch.randint(0, 256, (height, width, bands), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.squeeze(-1).numpy(), mode)


DOCS = [
    ("What is this?", [picture(1, 97, 61)]),
    ("Compare <image 1> with the other.", [picture(2, 40, 90), picture(3, 150, 50, "L")]),
    ("Of what colour?\nAnswer briefly.", [picture(4, 33, 33, "RGBA")]),
]


TAGGED = ("What <image>is this?", DOCS[0][1])
"""The first question as some tasks write it, for classes that drop the tag."""


def documents(prompt):
    if prompt.model == "lfm2_5_vl":  # gives its processor the first image alone
        return [DOCS[0], DOCS[2]]
    if prompt.model == "huggingface":  # the processor below refuses transparency
        return DOCS[:2]
    return [TAGGED, *DOCS[1:]] if prompt.dropped else DOCS


def messages(doc):
    text, images = doc
    content = [*({"type": "image", "url": image} for image in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def accept_audios(kind):
    """The general class names a keyword that transformers 5 refuses; no request here has sound or video."""
    call = kind.__call__
    kind.__call__ = lambda self, audios=None, videos=None, **given: call(self, **given)


def theirs(family, folder):
    """The inputs and options that lmms-eval's class gives `generate`."""
    config = hf.AutoConfig.from_pretrained(folder)
    stand_in = StandIn(config)
    for name in (CLASSES.get(family), "AutoModel", "AutoModelForImageTextToText"):
        if name:
            getattr(hf, name).from_pretrained = classmethod(lambda cls, *_, **__: stand_in)
    prompt = prompt_of(family, Arguments(str(folder), "none", 1.0))
    kind = get_model(prompt.model)
    if prompt.model == "huggingface":
        accept_audios(type(hf.AutoProcessor.from_pretrained(folder)))
    device = {} if prompt.model in ("lfm2_5_vl", "llava_hf") else {"device_map": "cpu"}
    asker = kind(pretrained=str(folder), device="cpu", **device)
    docs = documents(prompt)
    asker.task_dict = {"task": {"test": docs}}
    requests = []
    for number, (text, _) in enumerate(docs):
        options = {"max_new_tokens": 7} if number else {}
        if kind.is_simple:
            arguments = (text, options, lambda doc: doc[1], number, "task", "test")
        else:
            arguments = (text, messages, options, number, "task", "test")
        requests.append(Instance("generate_until", arguments, number, {"task": "task", "doc_id": number,
                                                                       "repeats": 1}))  # fmt: skip
    asker.generate_until(requests)
    return stand_in.asked


def ours(family, folder, number):
    arguments = Arguments(str(folder), "none", 1.0)
    prompt = prompt_of(family, arguments)
    conversation = ChatMessages(messages=messages(documents(prompt)[number])).to_hf_messages()
    inputs = make_inputs(hf.AutoProcessor.from_pretrained(folder), prompt, [conversation])
    options = {"max_new_tokens": 7} if number else {}
    return inputs, Decoding.of(prompt.decoding, options).as_generate()


def question(inputs):
    """Ids without padding, and images, of the only row."""
    ids = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
    images = {key: value for key, value in inputs.items() if torch.is_tensor(value) and key in IMAGES}
    return ids, images


IMAGES = ("pixel_values", "image_grid_thw", "image_sizes", "spatial_shapes", "pixel_attention_mask")


def differences(given, own):
    (ids, images), (own_ids, own_images) = question(given), question(own[0])
    found = [] if ids == own_ids else ["input_ids"]
    found += sorted(set(images) ^ set(own_images))
    for key in set(images) & set(own_images):
        expected = own_images[key].to(images[key].dtype)
        if expected.shape != images[key].shape or not torch.equal(expected, images[key]):
            found.append(key)
    compared = ("temperature", "top_p") if given["do_sample"] else ()
    for key in ("max_new_tokens", "do_sample", "repetition_penalty", *compared):
        if given.get(key) != own[1].get(key):
            found.append(f"{key}: {given.get(key)} {own[1].get(key)}")
    return found


class Task:
    """One of lmms-eval's with a wording for Qwen3-VL's class, which was chosen for a model without one."""

    def __init__(self):
        wordings = {
            "default": {"end": "Answer."},
            "qwen3_vl": {"end": "Reply with a letter."},
            "end": "Answer.",
        }
        self.config = SimpleNamespace(lmms_eval_specific_kwargs=wordings)
        self.lmms_eval_specific_kwargs = wordings

    def messages(self, doc):
        text = f"{doc[0]} {self.lmms_eval_specific_kwargs['end']}"
        video = [{"type": "video", "url": "a.mp4"}] if "film" in text else []
        return [{"role": "user", "content": [*video, {"type": "text", "text": text}]}]


def conversation(family, text):
    """The text that our class asks of a task, or the error's."""
    asker = Atr.__new__(Atr)
    asker.vlm = SimpleNamespace(prompt=prompt_of(family, Arguments("none", "none", 1.0)))
    asker.task_dict = {"task": {"test": [(text, [])]}}
    try:
        (turn,) = asker._conversation(text, Task().messages, {}, 0, "task", "test")
    except ValueError as error:
        return str(error)
    return turn["content"][0]["text"]


def main(folder, families):
    said = {
        "wordings": {family: conversation(family, "Which?") for family in ("qwen3_vl", "internvl")},
        "video": conversation("qwen3_vl", "Of the film?"),
    }
    for family in families:
        path = folder / family
        processor = MAKERS[family]()
        processor.save_pretrained(path)
        hf.CONFIG_MAPPING[family]().save_pretrained(path)
        asked = theirs(family, path)
        read = processor.tokenizer.decode
        by_text = {read(question(given)[0]): given for given in asked}
        assert len(by_text) == len(asked) >= 2
        said[family] = {"differences": [], "texts": []}
        for number in range(len(asked)):
            own = ours(family, path, number)
            text = read(question(own[0])[0])
            said[family]["texts"].append(re.sub(r"(<[^<>]*>|\[IMG\])\1+", r"\1..", text))
            given = by_text.get(text)
            said[family]["differences"].append(
                differences(given, own) if given else ["prompt", *sorted(by_text)]
            )
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(MAKERS))
