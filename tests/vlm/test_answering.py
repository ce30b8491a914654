import zlib
from types import SimpleNamespace

import pytest
import torch

from atr.config import Evaluate
from atr.reduction import Full, NoImage, Random
from atr.vlm.answering import Answerer
from atr.vlm.hosts import HOSTS
from atr.vlm.reduce import reduce
from atr.vlm.sources import StoredFeatures, WholeInputs

IMAGES = [["docs/0"], ["docs/1"], ["docs/0"], ["signs/0"]]
QUESTIONS = ["a", "b", "c", "a"]


class Stored(SimpleNamespace):
    """A store whose features are drawn from the image's name."""

    grid = (4, 4)
    names = ("docs/0", "docs/1", "signs/0")

    def index(self, image):
        return self.names.index(image)

    def __getitem__(self, position):
        generator = torch.Generator().manual_seed(zlib.crc32(self.names[position].encode()))
        return torch.randn(16, 24, generator=generator).bfloat16()


@pytest.fixture(params=["original", "contiguous"])
def answerer(request, model, processor):
    settings = Evaluate(positions=request.param, max_new_tokens=3)
    return Answerer(model, processor, StoredFeatures(model, processor, Stored()), settings)


def asked(*questions, images=1):
    return [SimpleNamespace(images=["docs/0"] * images, question=question) for question in questions]


def by_reduce(answerer, names, question, reducer, keep, monkeypatch):
    """The library's way: the processor's own input, the tower's features replaced by the stored ones."""
    model, processor, store = answerer.model, answerer.processor, answerer.source.features
    features = torch.stack([store[store.index(name)] for name in names])
    encoded = SimpleNamespace(features_BND=features.float(), grid=store.grid, tokens=16)
    monkeypatch.setattr("atr.vlm.reduce.encode", lambda model, inputs, tiling: encoded)
    turn = {"role": "user", "content": [{"type": "image"}] * len(names) + [{"type": "text", "text": question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    picture = torch.zeros(28, 28, 3, dtype=torch.uint8).numpy()
    inputs = processor(text=[text], images=[picture] * len(names), return_tensors="pt")
    shorter = reduce(model, inputs, reducer, keep, answerer.settings.positions)
    ids = model.generate(**shorter, do_sample=False, max_new_tokens=3)[0, shorter["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True).strip()


class Spread:
    needs = frozenset()

    def __call__(self, encoded, budget):
        kept = torch.linspace(0, encoded.tokens - 1, budget).round().long()
        return kept.repeat(len(encoded.features_BND), 1)


@pytest.mark.parametrize("keep, tokens", [(0.1, 2), (0.5, 8), (0.9, 14), (1.0, 16)])
def test_stored_features_answer_as_the_library_does_image_by_image(answerer, monkeypatch, keep, tokens):
    batch = answerer.prepare(IMAGES, QUESTIONS)
    answers = answerer.answer(batch, Spread(), keep)
    alone = [
        by_reduce(answerer, *pair, Spread(), keep, monkeypatch)
        for pair in zip(IMAGES, QUESTIONS, strict=True)
    ]
    assert answers == [(answer, tokens, 16) for answer in alone]


def test_several_stored_images_stand_in_the_order_of_the_prompt(answerer, monkeypatch):
    images = [["docs/1", "docs/0"], ["docs/0", "docs/0"]]
    answers = answerer.answer(answerer.prepare(images, ["a", "b"]), Spread(), 0.5)
    alone = [by_reduce(answerer, *pair, Spread(), 0.5, monkeypatch) for pair in zip(images, "ab", strict=True)]
    assert answers == [(answer, 16, 32) for answer in alone]


def test_the_language_model_sees_the_shorter_sequence(answerer, monkeypatch):
    batch, seen = answerer.prepare(IMAGES, QUESTIONS), []
    generate = type(answerer.model).generate
    monkeypatch.setattr(
        type(answerer.model),
        "generate",
        lambda self, **inputs: seen.append(inputs) or generate(self, **inputs),
    )
    answerer.answer(batch, Random(0), 0.25)
    [inputs] = seen
    assert inputs["input_ids"].shape == (4, 1 + 4 + 1)
    assert [len(kept) for kept in inputs["mm_encoder_outputs"]["image"].pooler_output] == [4, 4, 4, 4]
    assert ("position_ids" in inputs) == (answerer.settings.positions == "original")


def test_without_image_the_prompt_has_no_placeholder(answerer, monkeypatch):
    batch = answerer.prepare(IMAGES, QUESTIONS)
    assert batch.blind["input_ids"].tolist() == [[1, 5], [1, 6], [1, 7], [1, 5]]
    texts = answerer.model.generate(batch.blind["input_ids"], do_sample=False, max_new_tokens=3)[:, 2:]
    expected = answerer.processor.batch_decode(texts, skip_special_tokens=True)
    assert answerer.answer(batch, NoImage(), 0.0) == [(text.strip(), 0, 16) for text in expected]


def test_projection_is_shared_and_features_are_read_once_an_image(answerer, monkeypatch):
    reads, projected = [], []
    read, pack = Stored.__getitem__, type(HOSTS["llava"]).pack
    monkeypatch.setattr(Stored, "__getitem__", lambda self, i: reads.append(i) or read(self, i))
    monkeypatch.setattr(
        type(HOSTS["llava"]), "pack", lambda self, *given: projected.append(given) or pack(self, *given)
    )
    batch = answerer.prepare(IMAGES, QUESTIONS)
    for keep in (0.1, 0.5, 0.9):
        answerer.answer(batch, Random(0), keep)
    assert (reads, len(projected)) == ([0, 1, 2], 1)


def test_batches_hold_prompts_of_one_length_and_every_question_once(answerer):
    questions = ["a", "a b", "c", "d e f", "g h", "i", "j"]
    batches = answerer.batches(asked(*questions), size=2)
    assert batches == [[0, 2], [5, 6], [1, 4], [3]]
    for batch in batches:
        made = answerer.prepare([["docs/0"]] * len(batch), [questions[index] for index in batch])
        assert made.whole.inputs["attention_mask"].all() and made.blind["attention_mask"].all()
    mixed = [*asked("a", images=2), *asked("b"), *asked("c", images=0), *asked("d", images=2)]
    assert answerer.batches(mixed, size=2) == [[2], [1], [0, 3]]


def test_an_answer_does_not_depend_on_its_batch(answerer):
    images, questions = IMAGES * 4, QUESTIONS * 4
    together = answerer.answer(answerer.prepare(images, questions), Random(1), 0.5)
    alone = [
        answerer.answer(answerer.prepare([image], [question]), Random(1), 0.5)[0]
        for image, question in zip(images, questions, strict=True)
    ]
    assert together == alone


def test_masks_are_what_is_kept_of_each_image(answerer):
    masks = answerer.masks(["docs/0", "signs/0"], Random(2), 0.5)
    alone = answerer.masks(["signs/0"], Random(2), 0.5)
    assert (masks["grid"], masks["keep"]) == ([4, 4], 0.5)
    assert list(masks["masks"]) == ["docs/0", "signs/0"]
    assert masks["masks"]["signs/0"] == alone["masks"]["signs/0"] == sorted(set(alone["masks"]["signs/0"]))
    assert answerer.masks(["docs/0"], Full(), 1.0)["masks"] == {"docs/0": list(range(16))}
    assert answerer.masks(["docs/0"], NoImage(), 0.0)["masks"] == {"docs/0": []}


def test_a_sequence_that_kept_more_than_asked_is_our_error(answerer, monkeypatch):
    batch = answerer.prepare(IMAGES, QUESTIONS)
    monkeypatch.setattr("atr.vlm.reduce.shorten", lambda model, inputs, *rest: inputs)
    with pytest.raises(AssertionError, match="fed is what was kept"):
        answerer.answer(batch, Random(0), 0.5)


FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
SIZES = {"wide": (30, 84), "tall": (80, 25), "small": (20, 20), "large": (84, 60)}
"""Height and width in pixels of images that are cut into one to six tiles."""


class Pictures:
    """Images of noise that depends on their name; of those sizes, or square for a family without tiles."""

    def __init__(self, family):
        self.family, self.reads = family, []

    def image(self, name):
        self.reads.append(name)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        size = (28, 28) if self.family == "llava" else SIZES[name]
        return Image.fromarray(torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture
def make_seeing(model, processor, family):
    def make(interpolation="model", **settings):
        source = WholeInputs(model, processor, Pictures(family), interpolation)
        return Answerer(model, processor, source, Evaluate(max_new_tokens=4, **settings))

    return make


def untouched(answerer, names, question):
    """What the model itself answers to its processor's input, and how many visual tokens that has."""
    model, processor = answerer.model, answerer.processor
    turn = {"role": "user", "content": [{"type": "image"}] * len(names) + [{"type": "text", "text": question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    images = [answerer.source.images.image(name) for name in names]
    nested = [images] if model.config.model_type == "llava_onevision" else images
    inputs = processor(text=[text], images=nested or None, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True).strip(), int((inputs["input_ids"] == 4).sum())


QUESTION_IMAGES = pytest.mark.parametrize(
    "images",
    [
        [["wide"], ["tall"], ["small"], ["large"]],
        [["wide", "small"], ["large", "tall"], ["tall", "tall"], ["small", "wide"]],
    ],
    ids=["one image", "two images"],
)


@FAMILIES
@QUESTION_IMAGES
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_all_tokens_answer_as_the_untouched_model_does(make_seeing, family, images, positions):
    answerer, questions = make_seeing(positions=positions), ["a", "b c d", "e", "f g"]
    replies = answerer.answer(answerer.prepare(images, questions), Full(), 1.0)
    for reply, *question in zip(replies, images, questions, strict=True):
        answer, fed = untouched(answerer, *question)
        assert reply[0] == answer
        # Newlines are fed beside the visual tokens, and are none.
        assert reply[1] == reply[2] == fed - newlines(family, question[0])


def newlines(family, names):
    """Row ends by hand: the rows left of a grid of 4 x 4 tokens a tile; one image in a sample of OneVision's."""
    rows = {"llava": {}, "llava_next": {"wide": 4, "tall": 12, "small": 4, "large": 8}}
    if family == "llava_onevision" and len(names) > 1:
        return len(names)
    return sum(rows[family].get(name, 0) for name in names) if family in rows else None
