import re
import zlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import BloomConfig, CLIPImageProcessorPil, LlavaImageProcessorPil, MistralConfig

from atr.config import Evaluate, VlmPreset
from atr.core import catalog
from atr.core.fingerprint import fingerprint
from atr.features.encoder import Encoder
from atr.features.preprocess import describe_preprocessing
from atr.reduction import EncoderOutput, FeatureSelector, Full, NoImage, SelectorReducer
from atr.reduction.peers.fastv import FastV
from atr.reduction.peers.pyramiddrop import PyramidDrop
from atr.reduction.peers.random import Random
from atr.reduction.registry import build_reducer
from atr.vlm.checkpoint import load_vlm
from atr.vlm.families import Tiling, tower
from atr.vlm.families.tower import encode_tiles, project
from atr.vlm.generation import Generator
from atr.vlm.in_llm import prune_layers
from atr.vlm.inputs import FeatureInputs, ImageInputs
from atr.vlm.prefix import split_prompts
from atr.vlm.reduce import prepare, reduce

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
def generator(request, model, processor):
    settings = Evaluate(positions=request.param, max_new_tokens=3)
    return Generator(
        model, processor, FeatureInputs(model, processor, Stored(), lambda: Pictures("llava")), settings
    )


def pose(*questions, images=1):
    return [SimpleNamespace(images=["docs/0"] * images, question=question) for question in questions]


def by_reduce(generator, names, question, reducer, keep, monkeypatch):
    """The library's way: the processor's own input, the tower's features replaced by the stored ones."""
    model, processor, store = generator.model, generator.processor, generator.source.features
    features = torch.stack([store[store.index(name)] for name in names])
    encoded = EncoderOutput(features.float(), store.grid, projected_BND=project(model, features))
    monkeypatch.setattr(tower, "encode_tiles", lambda model, inputs, tiling, needs: encoded)
    turn = {
        "role": "user",
        "content": [{"type": "image"}] * len(names) + [{"type": "text", "text": question}],
    }
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    picture = torch.zeros(28, 28, 3, dtype=torch.uint8).numpy()
    inputs = processor(text=[text], images=[picture] * len(names), return_tensors="pt")
    shorter = reduce(model, inputs, reducer, keep, generator.settings.positions)
    ids = model.generate(**shorter, do_sample=False, max_new_tokens=3)[0, shorter["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True).strip()


class Spread:
    needs = frozenset()

    def __call__(self, encoded, budget):
        kept = torch.linspace(0, encoded.tokens - 1, budget).round().long()
        return kept.repeat(len(encoded.features_BND), 1)


@pytest.mark.parametrize("keep, tokens", [(0.1, 2), (0.5, 8), (0.9, 14), (1.0, 16)])
def test_stored_features_answer_as_the_library_does_image_by_image(generator, monkeypatch, keep, tokens):
    batch = generator.prepare(IMAGES, QUESTIONS)
    answers = generator.answer(batch, Spread(), keep)
    alone = [
        by_reduce(generator, *pair, Spread(), keep, monkeypatch)
        for pair in zip(IMAGES, QUESTIONS, strict=True)
    ]
    assert answers == [(answer, tokens, tokens, 16) for answer in alone]


def test_several_stored_images_stand_in_the_order_of_the_prompt(generator, monkeypatch):
    images = [["docs/1", "docs/0"], ["docs/0", "docs/0"]]
    answers = generator.answer(generator.prepare(images, ["a", "b"]), Spread(), 0.5)
    alone = [
        by_reduce(generator, *pair, Spread(), 0.5, monkeypatch) for pair in zip(images, "ab", strict=True)
    ]
    assert answers == [(answer, 16, 16, 32) for answer in alone]


def test_the_language_model_sees_the_shorter_sequence(generator, monkeypatch):
    batch, seen = generator.prepare(IMAGES, QUESTIONS), []
    generate = type(generator.model).generate
    monkeypatch.setattr(
        type(generator.model),
        "generate",
        lambda self, **inputs: seen.append(inputs) or generate(self, **inputs),
    )
    generator.answer(batch, Random(0), 0.25)
    [inputs] = seen
    assert inputs["input_ids"].shape == (4, 1 + 4 + 1)
    assert [len(kept) for kept in inputs["mm_encoder_outputs"]["image"].pooler_output] == [4, 4, 4, 4]
    assert ("position_ids" in inputs) == (generator.settings.positions == "original")


def test_without_image_the_prompt_has_no_placeholder(generator, monkeypatch):
    batch = generator.prepare(IMAGES, QUESTIONS)
    assert batch.blind["input_ids"].tolist() == [[1, 5], [1, 6], [1, 7], [1, 5]]
    texts = generator.model.generate(batch.blind["input_ids"], do_sample=False, max_new_tokens=3)[:, 2:]
    expected = generator.processor.batch_decode(texts, skip_special_tokens=True)
    assert generator.answer(batch, NoImage(), 0.0) == [(text.strip(), 0, 0, 16) for text in expected]


def test_projection_is_shared_and_features_are_read_once_an_image(generator, monkeypatch):
    reads, projected, read = [], [], Stored.__getitem__
    monkeypatch.setattr(Stored, "__getitem__", lambda self, i: reads.append(i) or read(self, i))
    projector = generator.model.model.multi_modal_projector
    projector.register_forward_hook(lambda module, given, made: projected.append(len(made)))
    batch = generator.prepare(IMAGES, QUESTIONS)
    for keep in (0.1, 0.5, 0.9):
        generator.answer(batch, Random(0), keep)
    assert (reads, projected) == ([0, 1, 2], [3])


def test_batches_hold_prompts_of_one_length_and_every_question_once(generator):
    questions = ["a", "a b", "c", "d e f", "g h", "i", "j"]
    posed = [SimpleNamespace(images=[f"docs/{n}"], question=text) for n, text in enumerate(questions)]
    batches = generator.batches(posed, tokens=2 * (16 + 3))
    assert batches == [[0, 2], [5, 6], [1, 4], [3]]
    for batch in batches:
        made = generator.prepare([["docs/0"]] * len(batch), [questions[index] for index in batch])
        assert made.whole.inputs["attention_mask"].all() and made.blind["attention_mask"].all()
    assert generator.batches(posed, tokens=3 * (16 + 2)) == [[0, 2, 5], [6], [1, 4], [3]]
    mixed = [
        *pose("a", images=2),
        *pose("b"),
        *pose("c", images=0),
        *pose("d", images=2),
    ]
    assert generator.batches(mixed, tokens=50) == [[2], [1], [0, 3]]


def test_an_answer_does_not_depend_on_its_batch(generator):
    images, questions = IMAGES * 4, QUESTIONS * 4
    together = generator.answer(generator.prepare(images, questions), Random(1), 0.5)
    alone = [
        generator.answer(generator.prepare([image], [question]), Random(1), 0.5)[0]
        for image, question in zip(images, questions, strict=True)
    ]
    assert together == alone


def test_masks_are_what_is_kept_of_each_image(generator):
    masks = generator.masks(dict.fromkeys(["docs/0", "signs/0"], "a"), Random(2), 0.5)
    alone = generator.masks(dict.fromkeys(["signs/0"], "a"), Random(2), 0.5)
    assert (masks["grid"], masks["keep"]) == ([4, 4], 0.5)
    assert list(masks["masks"]) == ["docs/0", "signs/0"]
    assert masks["masks"]["signs/0"] == alone["masks"]["signs/0"] == sorted(set(alone["masks"]["signs/0"]))
    assert generator.masks({"docs/0": "a"}, Full(), 1.0)["masks"] == {"docs/0": list(range(16))}
    assert generator.masks({"docs/0": "a"}, NoImage(), 0.0)["masks"] == {"docs/0": []}


@torch.inference_mode()
def test_fields_that_the_store_lacks_are_computed_from_the_images(generator):
    needs = {"grid", "attention_BN", "keys_BND", "pixels_BCHW", "encode", "projected_BND"}
    encoded = generator.prepare([["docs/1"], ["docs/0"]], ["a", "b"], needs).whole.encoded.whole
    model, pictures = generator.model, Pictures("llava")
    inputs = generator.processor.image_processor(
        [pictures.image("docs/1"), pictures.image("docs/0")], return_tensors="pt"
    )
    looked = encode_tiles(model, inputs, Tiling.of_one_grid((1, 1), (4, 4)), needs)
    for name in ("attention_BN", "keys_BND", "pixels_BCHW"):
        assert torch.equal(getattr(encoded, name), getattr(looked, name))
    assert torch.equal(encoded.encode(encoded.pixels_BCHW), looked.features_BND)
    stored = torch.stack([Stored()[1], Stored()[0]])
    assert torch.equal(encoded.features_BND, stored)
    assert torch.equal(encoded.projected_BND, project(model, stored))


def test_no_image_is_opened_for_what_the_store_has(generator):
    opened = []
    source = FeatureInputs(generator.model, generator.processor, Stored(), lambda: opened.append(1))
    source.prepare([["docs/0"]], ["a"], {"grid", "projected_BND", "text_BD"})
    assert not opened


def test_a_sequence_of_more_tokens_than_kept_fails_an_assertion(generator, monkeypatch):
    batch = generator.prepare(IMAGES, QUESTIONS)
    monkeypatch.setattr("atr.vlm.reduce.shorten", lambda model, inputs, *rest: inputs)
    with pytest.raises(AssertionError, match="the model is fed the kept tokens"):
        generator.answer(batch, Random(0), 0.5)


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
        return Image.fromarray(
            torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy()
        )


TEXTS = ["a", "b c d", "e", "f g"]


@pytest.fixture
def make_seeing(model, processor, family):
    def make(interpolation="model", **settings):
        source = ImageInputs(model, processor, Pictures(family), interpolation)
        return Generator(model, processor, source, Evaluate(max_new_tokens=4, **settings))

    return make


def untouched(generator, names, question):
    """What the model itself answers to its processor's input, and how many visual tokens that has."""
    model, processor = generator.model, generator.processor
    turn = {
        "role": "user",
        "content": [{"type": "image"}] * len(names) + [{"type": "text", "text": question}],
    }
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    images = [generator.source.images.image(name) for name in names]
    nested = [images] if model.config.model_type == "llava_onevision" else images
    inputs = processor(text=[text], images=nested if images else None, return_tensors="pt")
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


# (visual tokens, newlines) by hand, of tiles of 4 x 4 tokens: the whole image, and the rows of the grid of
# tiles that its margins leave; OneVision shrinks more than 1.1 ** 2 * 32 of their tokens to 32 or fewer.
COUNTS = {
    "llava": dict.fromkeys(SIZES, (16, 0)),
    "llava_next": {
        "wide": (16 + 4 * 12, 4), "tall": (16 + 12 * 4, 12),
        "small": (16 + 4 * 4, 4), "large": (16 + 12 * 8, 12),
    },
    "llava_onevision": {
        "wide": (16 + 3 * 9, 3), "tall": (16 + 9 * 3, 9), "small": (16 + 4 * 4, 4), "large": (16 + 6 * 4, 6),
    },
}  # fmt: skip


def counts(family, names):
    """(visual tokens, newlines) of each image; OneVision shows several of one question whole alone."""
    alone = family == "llava_onevision" and len(names) > 1
    return [(16, 1) if alone else COUNTS[family][name] for name in names]


@FAMILIES
@QUESTION_IMAGES
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_all_tokens_answer_as_the_untouched_model_does(make_seeing, family, images, positions):
    generator = make_seeing(positions=positions)
    replies = generator.answer(generator.prepare(images, TEXTS), Full(), 1.0)
    for reply, names, text in zip(replies, images, TEXTS, strict=True):
        answer, fed = untouched(generator, names, text)
        visual = sum(of for of, _ in counts(family, names))
        assert reply == (answer, visual, fed, visual)
        assert fed == visual + sum(newlines for _, newlines in counts(family, names))


@FAMILIES
@QUESTION_IMAGES
@pytest.mark.parametrize("policy", [{}, {"budget": "tile", "newline": "follow"}, {"positions": "contiguous"}])
def test_a_batch_answers_as_its_questions_alone(make_seeing, family, images, policy):
    generator = make_seeing(**policy)
    for reducer in (Spread(), Random(1), SelectorReducer(selector())):
        together = generator.answer(generator.prepare(images, TEXTS), reducer, 0.3)
        alone = [
            generator.answer(generator.prepare([names], [text]), reducer, 0.3)[0]
            for names, text in zip(images, TEXTS, strict=True)
        ]
        assert together == alone
        of = [[of for of, _ in counts(family, names)] for names in images]
        # The nearest number of each image, halves up.
        assert [(kept, full) for _, kept, _, full in together] == [
            (sum(int(0.3 * size + 0.5) for size in sizes), sum(sizes)) for sizes in of
        ]
        newlines = [sum(count for _, count in counts(family, names)) for names in images]
        for (_, kept, fed, _), most in zip(together, newlines, strict=True):
            assert kept <= fed <= kept + most and (fed == kept + most or "newline" in policy)


@FAMILIES
@pytest.mark.parametrize("per", ["image", "tile"])
def test_an_image_keeps_the_same_random_tokens_alone_and_in_a_batch(make_model, processor, family, per):
    model = make_model(dtype=torch.bfloat16)

    def nudge(tower, given, seen):
        """As kernels do, whose rounding depends on how much they are given."""
        seen.hidden_states = [
            states if states is None else states + states * len(states) / 128 for states in seen.hidden_states
        ]

    model.model.vision_tower.register_forward_hook(nudge)
    generator = Generator(
        model, processor, ImageInputs(model, processor, Pictures(family)), Evaluate(budget=per)
    )
    names = ["wide", "tall", "small", "large"]
    for seed in range(3):
        together = generator.masks(dict.fromkeys(names, "a"), Random(seed), 0.4)["masks"]
        alone = [generator.masks({name: "a"}, Random(seed), 0.4)["masks"][name] for name in names]
        assert list(together.values()) == alone
        assert len(set(map(tuple, alone))) == 4, "each image has a draw of its own"


@FAMILIES
def test_every_reducer_serves_the_model_or_is_refused_before_any_answer(make_seeing, family, tmp_path):
    selector().save_pretrained(tmp_path)
    generator, refused = make_seeing(), []
    for name in catalog.reducers():
        try:
            reducer = generator.reducer(name, 0, tmp_path)
        except ValueError as error:
            assert re.match(f"reducer {name} cannot serve {family}, .* allowed: .*full, .*mmr", str(error))
            refused.append(name)
            continue
        keep = None if name.endswith("_adaptive") else {"full": 1.0, "none": 0.0}.get(name, 0.75)
        batch = generator.prepare([["wide"], ["large"]], ["a", "b"], reducer.needs)
        assert len(generator.answer(batch, reducer, keep)) == 2
    one_tile = [name for name in catalog.reducers() if catalog.reducer_traits(name).one_tile]
    assert refused == ([] if family == "llava" else one_tile)


def selector(layer=None):
    torch.manual_seed(1)
    made = FeatureSelector(24, (4, 4), layers=1, heads=2, layer=layer)
    torch.nn.init.normal_(made.trunk.head.weight)
    return made


@FAMILIES
def test_images_are_encoded_once_for_all_budgets_and_seeds(make_seeing, monkeypatch):
    generator, encoded = make_seeing(), []
    encode = tower.encode_tiles
    monkeypatch.setattr(tower, "encode_tiles", lambda *given: encoded.append(given) or encode(*given))
    batch = generator.prepare([["wide"], ["tall"]], ["a", "b"])
    for keep, seed in ((0.2, 0), (0.2, 1), (0.7, 0)):
        generator.answer(batch, Random(seed), keep)
    assert (len(encoded), generator.source.images.reads) == (1, ["wide", "tall"])


@FAMILIES
def test_without_image_every_reducer_is_given_the_question_alone(make_seeing):
    generator = make_seeing()
    batch = generator.prepare([[], []], ["a", "b c d"])
    expected = [(untouched(generator, [], text)[0], 0, 0, 0) for text in ("a", "b c d")]
    assert generator.answer(batch, Full(), 1.0) == generator.answer(batch, Random(0), 0.3) == expected
    seen = generator.prepare([["wide"], ["tall"]], ["a", "b c d"])
    blind = generator.answer(seen, NoImage(), 0.0)
    assert [reply[:3] for reply in blind] == [reply[:3] for reply in expected]


@pytest.mark.parametrize("family", ["llava_onevision"])
def test_without_interpolation_there_are_all_tokens_to_choose_from(make_seeing):
    generator = make_seeing("off")
    batch = generator.prepare([["wide"], ["large"]], ["a", "b"])
    assert [reply[1:] for reply in generator.answer(batch, Full(), 1.0)] == [(64, 68, 64), (112, 124, 112)]
    assert [reply[1:] for reply in generator.answer(batch, Random(0), 0.5)] == [(32, 36, 64), (56, 68, 112)]


@FAMILIES
def test_pictures_show_what_is_kept_of_the_whole_image(make_seeing, family):
    generator = make_seeing()
    masks = generator.masks(dict.fromkeys(["wide", "small"], "a"), SelectorReducer(selector()), 0.5)
    assert (masks["grid"], masks["keep"], list(masks["masks"])) == ([4, 4], 0.5, ["wide", "small"])
    # The best half over all tiles, counted in the order of the features before they are packed.
    whole = generator.source.prepare([["small"]], ["a"])
    scores_N = selector().rank(whole.encoded.whole.features_BND, (4, 4)).flatten()
    best = scores_N.topk(len(scores_N) // 2).indices
    assert masks["masks"]["small"] == sorted(index for index in best.tolist() if index < 16)
    assert generator.masks(dict.fromkeys(["wide"], "a"), Full(), 1.0)["masks"] == {"wide": list(range(16))}
    assert generator.masks(dict.fromkeys(["wide"], "a"), NoImage(), 0.0)["masks"] == {"wide": []}


# Of the model's three layers: a mean over them, and the fraction that each drop leaves to give it.
BETWEEN_LAYERS = pytest.mark.parametrize(
    "inside, mean, keep, read",
    [(FastV(), 2.25 / 3, 0.25, (1, 1, 0.25)), (PyramidDrop(), 1.75 / 3, 0.5, (1, 0.5, 0.25))],
    ids=["fastv", "pyramiddrop"],
)


@torch.inference_mode()
def by_prune_layers(generator, names, question, inside, keep):
    """The library's way, one question at a time: its answer, what is kept of its images at last, what is fed.

    That is the mean over the layers of the columns that they are given in the prefill, less the text.
    """
    model, processor, settings = generator.model, generator.processor, generator.settings
    turn = {
        "role": "user",
        "content": [{"type": "image"}] * len(names) + [{"type": "text", "text": question}],
    }
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    images = [generator.source.images.image(name) for name in names]
    nested = [images] if model.config.model_type == "llava_onevision" else images
    prepared = prepare(model, processor(text=[text], images=nested, return_tensors="pt"))
    layout = settings.positions, settings.budget, settings.newline
    columns, layers = [], model.model.language_model.layers
    hooks = [
        layer.register_forward_hook(lambda _, given, __: columns.append(given[0].shape[1]))
        for layer in layers
    ]
    with prune_layers(prepared, inside, keep, *layout) as pruning:
        ids = model.generate(**pruning.inputs, do_sample=False, max_new_tokens=4)
    for hook in hooks:
        hook.remove()
    answer = processor.decode(ids[0, pruning.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    written = int((pruning.inputs["input_ids"] != model.config.image_token_id).sum())
    fed = sum(columns[: len(layers)]) / len(layers) - written
    return answer.strip(), [kept.indices_K.tolist() for kept in pruning.kept[2]], fed


@FAMILIES
@QUESTION_IMAGES
@BETWEEN_LAYERS
@pytest.mark.parametrize("policy", [{}, {"budget": "tile", "newline": "follow", "positions": "contiguous"}])
def test_between_layers_a_budget_is_a_mean_over_them(
    make_seeing, family, images, inside, mean, keep, read, policy
):
    generator = make_seeing(**policy)
    replies = generator.answer(generator.prepare(images, TEXTS), inside, mean)
    for reply, names, text in zip(replies, images, TEXTS, strict=True):
        sizes = [of for of, _ in counts(family, names)]
        tokens = sum(int(part * size + 0.5) for size in sizes for part in read) / 3
        answer, _, fed = by_prune_layers(generator, names, text, inside, keep)
        assert reply[0] == answer and reply[3] == sum(sizes)
        assert abs(reply[1] - tokens) <= 0.5 and abs(reply[2] - fed) <= 0.5 + 1e-9


@FAMILIES
@BETWEEN_LAYERS
def test_pictures_show_what_the_last_layer_reads(make_seeing, family, inside, mean, keep, read):
    generator, questions = make_seeing(), {"wide": "a", "small": "b c d", "tall": "e"}
    masks = generator.masks(questions, inside, mean)
    assert (masks["grid"], masks["keep"], list(masks["masks"])) == ([4, 4], mean, list(questions))
    for name, text in questions.items():
        _, [kept], _ = by_prune_layers(generator, [name], text, inside, keep)
        assert masks["masks"][name] == [index for index in kept if index < 16]


def test_unreachable_budgets_are_named_before_any_answer(generator):
    keeps = [0.9, 0.37, 0.38, 0.68, 0.69]
    assert generator.reachable("fastv", keeps) == [0.9, 0.69]
    assert generator.reachable("pyramiddrop", keeps) == [0.9, 0.38, 0.68, 0.69]
    assert generator.reachable("random", keeps) == keeps
    assert generator.reducer("pyramiddrop", 0, "unused") == PyramidDrop()
    with pytest.raises(ValueError, match=r"keep: 0\.6 .* FastV in 3 layers, allowed: 0\.688 and more"):
        generator.reachable("fastv", [0.2, 0.6])
    batch = generator.prepare(IMAGES, QUESTIONS)
    with pytest.raises(ValueError, match=r"keep: 0\.3 is out of reach of PyramidDrop"):
        generator.answer(batch, PyramidDrop(), 0.3)


@BETWEEN_LAYERS
def test_stored_features_are_dropped_between_layers_image_by_image(generator, inside, mean, keep, read):
    """An image that two questions show is ranked for each of them."""
    together = generator.answer(generator.prepare(IMAGES, QUESTIONS), inside, mean)
    alone = [
        generator.answer(generator.prepare([names], [text]), inside, mean)[0]
        for names, text in zip(IMAGES, QUESTIONS, strict=True)
    ]
    assert together == alone
    tokens = round(sum(16 * part for part in read) / 3)
    assert {reply[1:] for reply in together} == {(tokens, tokens, 16)}


MANY = {
    "one image": [["wide"], ["tall"], ["wide"], ["wide"], ["large"], ["tall"]],
    "two images": [["wide", "small"], ["tall", "tall"], ["wide", "small"], ["small", "wide"]] * 2,
}


@FAMILIES
@pytest.mark.parametrize("images", MANY.values(), ids=MANY)
@pytest.mark.parametrize("policy", [{}, {"positions": "contiguous", "newline": "follow", "budget": "tile"}])
def test_questions_that_share_an_image_are_answered_as_alone(make_seeing, images, policy, monkeypatch):
    shared, separate = make_seeing(**policy), make_seeing(share_prefix=False, **policy)
    texts, splits = ["a", "b c d", "e", "f g", "a h", "i", "j k", "l"][: len(images)], []
    monkeypatch.setattr(
        "atr.vlm.generation.split_prompts", lambda *given: splits.append(split_prompts(*given)) or splits[-1]
    )
    for reducer, keep in ((Full(), 1.0), (Random(0), 0.3), (build_reducer("cdpruner_text"), 0.3)):
        batch = shared.prepare(images, texts, reducer.needs)
        together = shared.answer(batch, reducer, keep)
        assert separate.answer(batch, reducer, keep) == together
        assert together == [
            separate.answer(separate.prepare([names], [text], reducer.needs), reducer, keep)[0]
            for names, text in zip(images, texts, strict=True)
        ]
    # A reducer that reads the question keeps other tokens for each, so that nothing is shared.
    assert [len(split.prefixes["input_ids"]) for split in splits] == [3, 3]


@FAMILIES
def test_an_image_is_read_and_encoded_once_for_all_questions_of_a_batch(make_seeing, monkeypatch):
    generator, encoded = make_seeing(), []
    encode = tower.encode_tiles
    monkeypatch.setattr(tower, "encode_tiles", lambda *given: encoded.append(given[2]) or encode(*given))
    batch = generator.prepare([["wide"], ["tall"], ["wide"]], ["a", "b c", "d"])
    assert generator.source.images.reads == ["wide", "tall"]
    assert [len(tiling.tiles) for tiling in encoded] == [2] and batch.whole.image_of == [0, 1, 0]


def test_a_model_whose_cache_cannot_be_shared_answers_by_its_own_generate(
    make_model, processor, monkeypatch, capsys
):
    text = MistralConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.3,
    )  # fmt: skip
    loaded = make_model(text_config=text), processor
    monkeypatch.setattr("atr.vlm.generation.load_vlm", lambda *args, **kwargs: loaded)
    monkeypatch.setattr("atr.vlm.generation.version_of", lambda *args: {})
    vlm, inputs = VlmPreset("tiny", "tiny/mistral", None, False), (lambda: Pictures("llava"), lambda: 1 / 0)
    generator = Generator.load(vlm, 32, torch.device("cpu"), *inputs, Evaluate(max_new_tokens=4))
    assert capsys.readouterr().err == (
        "tiny/mistral: each prompt reads its images anew: the cache of mistral has layers of type "
        "DynamicSlidingWindowLayer\n"
    )
    texts = ["a", "b c d", "e"]
    replies = generator.answer(generator.prepare([["x"]] * 3, texts), Full(), 1.0)
    assert [reply[0] for reply in replies] == [untouched(generator, ["x"], text)[0] for text in texts]
    assert generator.batches(pose(*texts), tokens=50) == [[0, 2], [1]]


@FAMILIES
def test_a_placeholder_in_a_question_is_refused(make_seeing):
    generator = make_seeing()
    for names in ([], ["wide"]):
        with pytest.raises(ValueError, match=r"placeholder|<image> tokens"):
            generator.prepare([names], ["a <image> b"])


@FAMILIES
def test_a_batch_may_mix_lengths_but_not_numbers_of_images(make_seeing):
    mixed = [
        *pose("a", "b c d", "e f"),
        *pose("g", images=2),
        *pose("h", images=0),
        *pose("i", images=2),
    ]
    generator, unshared = make_seeing(), make_seeing(share_prefix=False)
    one_image = generator.source.count_tokens(["wide"])["wide"]
    assert unshared.batches(mixed, tokens=2 * (2 * one_image + 2)) == [[4], [0, 2, 1], [3, 5]]
    assert generator.batches(mixed, tokens=2 * (2 * one_image + 2)) == [[4], [0, 1, 2], [3, 5]]


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "family, stored, source",
    [
        ("llava", True, FeatureInputs),
        ("llava", False, ImageInputs),
        ("llava_next", True, ImageInputs),
        ("llava_onevision", True, ImageInputs),
    ],
)
def test_only_the_source_that_the_model_needs_is_opened(checkpoint, processor, family, stored, source):
    described = {"preprocess": describe_preprocessing(processor.image_processor), "resolved": {}}
    store = Stored(manifest={"layer": -2, "grid": [4, 4], "width": 24, **described})
    opened = {FeatureInputs: lambda: store, ImageInputs: lambda: Pictures(family)}
    opened |= {other: lambda: 1 / 0 for other in opened if other is not source}
    vlm = VlmPreset("tiny", checkpoint, None, stored)
    generator = Generator.load(
        vlm, 32, torch.device("cpu"), opened[ImageInputs], opened[FeatureInputs], Evaluate(max_new_tokens=2)
    )
    assert type(generator.source) is source
    generator.answer(
        generator.prepare([["docs/0" if source is FeatureInputs else "wide"]], ["a"]), Full(), 1.0
    )


def test_unsupported_positions_are_refused_before_inputs_are_opened(make_model, processor, monkeypatch):
    text = BloomConfig(vocab_size=31, hidden_size=32, n_layer=1, n_head=4, pad_token_id=0)
    loaded = make_model(text_config=text), processor
    monkeypatch.setattr("atr.vlm.generation.load_vlm", lambda *args, **kwargs: loaded)
    opened, vlm = (lambda: 1 / 0, lambda: 1 / 0), VlmPreset("tiny", "tiny/bloom", None, True)
    with pytest.raises(ValueError, match="original is not supported by bloom, allowed: contiguous"):
        Generator.load(vlm, 32, torch.device("cpu"), *opened, Evaluate())
    with pytest.raises(ZeroDivisionError):
        Generator.load(vlm, 32, torch.device("cpu"), *opened, Evaluate(positions="contiguous"))


@FAMILIES
def test_a_selector_of_other_features_is_refused_before_any_answer(make_seeing, family, tmp_path):
    reads = {"llava": -2, "llava_next": -2, "llava_onevision": -1}[family]
    for layer in (reads, 1):
        selector(layer).save_pretrained(tmp_path / str(layer))
    assert make_seeing().reducer("selector", 0, tmp_path / str(reads)).selector.layer == reads
    with pytest.raises(ValueError, match=f"trained on layer 1 .* reads layer {reads}"):
        make_seeing().reducer("selector", 0, tmp_path / "1")


SQUARE = {"height": 28, "width": 28}
OTHERS = {
    "squashes": CLIPImageProcessorPil(size=SQUARE, do_center_crop=False),
    "pads": LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE, do_pad=True),
    "another mean": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE, image_mean=[0.5] * 3),
    "another filter": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE, resample=2),
    "crops less": CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size=SQUARE),
}


class Extracted(Stored):
    """What an encoder of one's own folder stores of the pictures."""

    names = ("wide", "tall", "small")

    def __init__(self, path):
        encoder = Encoder.load(path, -2)
        manifest = {"layer": -2, "grid": [4, 4], "width": 24, "encoder": path, "resolved": {}}
        manifest["fingerprint"] = fingerprint(encoder.tower)
        super().__init__(manifest=manifest | {"preprocess": describe_preprocessing(encoder.image_processor)})
        images = [Pictures("llava_next").image(name) for name in self.names]
        with torch.inference_mode():
            self.features = encoder(encoder.preprocess(images))

    def __getitem__(self, position):
        return self.features[position]


@pytest.fixture
def stored(model, processor, tmp_path):
    """The features of the model's tower, as a folder of its own beside that processor."""
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    processor.image_processor.save_pretrained(tmp_path / "tower")
    return Extracted(str(tmp_path / "tower"))


def answers_of_full(folder, store):
    """Of the generator, and of the model itself on its processor's own inputs; and the generator's source."""
    settings, names = Evaluate(max_new_tokens=8), [[name] for name in store.names]
    sources = (lambda: Pictures("llava_next")), (lambda: store)
    generator = Generator.load(
        VlmPreset("tiny", str(folder), None), 32, torch.device("cpu"), *sources, settings
    )
    answers = generator.answer(generator.prepare(names, ["a b"] * 3), Full(), 1.0)
    model, processor = load_vlm(str(folder), torch.float32)
    expected = []
    for [name] in names:
        image = Pictures("llava_next").image(name)
        inputs = processor(images=[image], text=["<image> a b"], return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        expected.append(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
    return [answer for answer, *_ in answers], expected, generator.source


@pytest.mark.parametrize("other", OTHERS)
def test_features_of_other_preprocessing_are_not_used(model, processor, stored, tmp_path, other, capsys):
    processor.image_processor = OTHERS[other]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answers, expected, source = answers_of_full(tmp_path, stored)
    assert answers == expected and len(set(answers)) > 1
    assert isinstance(source, ImageInputs)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stored" in line]
    assert line.startswith(
        f"{tmp_path}: the stored features are not used: their images and the model's differ in "
    )


def test_features_of_the_same_preprocessing_are_used(model, processor, stored, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answers, expected, source = answers_of_full(tmp_path, stored)
    assert answers == expected and len(set(answers)) > 1
    assert isinstance(source, FeatureInputs)
    assert "stored" not in capsys.readouterr().err


def test_a_store_without_a_record_of_preprocessing_is_not_used(model, processor, stored, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stored.manifest["preprocess"] = None
    assert isinstance(answers_of_full(tmp_path, stored)[2], ImageInputs)
    assert "their manifest does not say how images were preprocessed" in capsys.readouterr().err
