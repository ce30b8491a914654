import copy
import math

import lightning
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from atr import config
from atr.datasets import micro
from atr.vlm.micro import build_model, build_processor
from atr.vlm.training import (
    BLANK,
    IGNORE,
    OTHER,
    TURN_TOKENS,
    Collator,
    LessonDataset,
    MicroTraining,
    answer_loss,
    train,
)


def recipe(**changes):
    values = {
        "width": 64,
        "layers": 1,
        "text_layers": 1,
        "steps": 4,
        "epochs": 2,
        "batch_size": 2,
        "warmup_steps": 1,
        "workers": 0,
    }
    return config.Micro(**{**values, "compile": False, "reading": 0.5, **changes})


@pytest.fixture(scope="module")
def processor():
    return build_processor((*micro.QUESTIONS, *micro.ANSWERS), micro.SIZE)


def new_module(processor, examine=lambda model, benchmark: 0.5, **changes):
    torch.manual_seed(0)
    return MicroTraining(
        build_model(processor, micro.SIZE, width=64, layers=1, text_layers=1).train(),
        recipe(**changes),
        examine,
    )


@pytest.fixture
def module(processor):
    return new_module(processor).eval()


def draw(index):
    return micro.lesson(index, seed=0, reading=False, transcribe=0.5)


def lessons(count):
    return [draw(index) for index in range(count)]


def test_logits_are_those_of_the_untouched_model(module, processor):
    batch = Collator(processor.tokenizer, micro.SIZE, TURN_TOKENS)(lessons(4))
    ids = torch.cat(
        [torch.full((4, 1), 1), torch.full((4, 144), module.model.config.image_token_id), batch["text"]], 1
    )
    pixels = batch["images"].permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        whole = module.model(input_ids=ids, pixel_values=pixels).logits[:, 144:-1]
        image = module.model.model.multi_modal_projector(module.features(batch["images"]))
        parts = module.answer_logits(image, batch["text"])
    torch.testing.assert_close(parts, whole)


def test_only_answers_are_learned(processor):
    batch = Collator(processor.tokenizer, micro.SIZE, TURN_TOKENS)(lessons(6))
    for lesson, text, labels in zip(lessons(6), batch["text"], batch["labels"], strict=True):
        learned = processor.tokenizer.convert_ids_to_tokens(labels[labels != IGNORE])
        assert "".join(learned) == "".join(answer.replace(" ", "") + "</s>" for _, answer in lesson.turns)
        assert (text[labels != IGNORE] == labels[labels != IGNORE]).all()


def test_characters_of_a_patch_are_the_first_two_from_the_left(processor):
    name, city = ("name", "apple"), ("city", "city")
    written = (("b", 10, 3, name), ("a", 2, 3, name), ("c", 13, 3, name), (":", 20, 20, city))
    lesson = micro.Sample(lessons(1)[0].image, (("a", "1"),), written)
    found = Collator(processor.tokenizer, micro.SIZE, 8)._characters(lesson)
    assert found[0].tolist() == [2, 3]
    assert found[12 + 1].tolist() == [OTHER, BLANK]
    assert (found != BLANK).sum() == 3


def test_names_of_a_patch_are_those_of_what_lies_in_front(processor):
    regions = (
        micro.Region(("scene", "cat"), micro.WHOLE),
        micro.Region(("digit", "7"), (28, 28, 60, 60)),
    )
    written = (("a", 30, 30, ("name", "apple")),)
    lesson = micro.Sample(lessons(1)[0].image, (("a", "1"),), written, regions)
    names = Collator(processor.tokenizer, micro.SIZE, 8)._names(lesson)
    found = [tuple(processor.tokenizer.convert_ids_to_tokens(pair)) for pair in names]
    assert found[2 * 12 + 2] == ("name", "apple")
    # A patch shows what its centre lies in: the box ends at 60, before the centre of the fifth patch.
    digit = {3 * 12 + 2, 2 * 12 + 3, 3 * 12 + 3}
    assert {patch for patch, pair in enumerate(found) if pair == ("digit", "7")} == digit
    assert found.count(("scene", "cat")) == 144 - 4
    blank = micro.Sample(lesson.image, ())
    assert set(Collator(processor.tokenizer, micro.SIZE, 8)._names(blank).flatten().tolist()) == {
        processor.tokenizer.pad_token_id
    }


def test_long_answers_do_not_drown_short_ones():
    """Two samples with losses 0 and log 2 weigh the same, whatever their lengths."""
    logits = torch.zeros(2, 5, 2)
    logits[0, :, 1] = 100.0
    labels = torch.tensor([[1, 1, 1, 1, 1], [1, IGNORE, IGNORE, IGNORE, IGNORE]])
    assert answer_loss(logits, labels).item() == pytest.approx(math.log(2) / 2)


def test_learning_rate_rises_stays_and_falls():
    module = MicroTraining.__new__(MicroTraining)
    lightning.LightningModule.__init__(module)
    module.recipe = recipe(steps=100, epochs=1, warmup_steps=10, constant=0.6)
    rates = [module._rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:61] == [1.0] * 52
    assert rates[80] == pytest.approx(0.5) and rates[99] == pytest.approx(0.025)
    assert module._rate(100) == 0.02


def fit(module, processor, checkpoint):
    seen = []

    def watched(index, reading, transcribe):
        seen.append(index)
        return draw(index)

    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    train(module, watched, processor, checkpoint, DummyLogger(), options)
    return seen


def test_only_tower_and_projector_learn_in_the_reading_phase(processor, tmp_path):
    module = new_module(processor, steps=2, epochs=1, reading=0.999)
    llava = module.model.model
    layers, *learning = llava.language_model.layers, llava.vision_tower, llava.multi_modal_projector
    before = [copy.deepcopy(part.state_dict()) for part in (layers, *learning)]
    fit(module, processor, tmp_path / "last.ckpt")
    unlike = [
        any(not torch.equal(old[name], new) for name, new in part.state_dict().items())
        for old, part in zip(before, (layers, *learning), strict=True)
    ]
    assert unlike == [False, True, True]


def test_a_resumed_training_is_the_unbroken_one(processor, tmp_path):
    def interrupted(model, benchmark):
        assert not model.training and benchmark in config.BENCHMARKS
        raise RuntimeError("power cut")

    broken = new_module(processor, interrupted)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(broken, processor, tmp_path / "a.ckpt")
    resumed, unbroken = new_module(processor), new_module(processor)
    assert fit(resumed, processor, tmp_path / "a.ckpt") == [4, 5, 6, 7]
    assert fit(unbroken, processor, tmp_path / "b.ckpt") == list(range(8))
    assert resumed.seconds > torch.load(tmp_path / "a.ckpt", weights_only=False)["seconds"] > 0
    for name, weight in unbroken.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0)


def test_reading_comes_first_and_fewer_pages_are_transcribed_later():
    asked = LessonDataset(
        lambda index, **asked_for: asked_for, recipe(steps=10, batch_size=2, epochs=1, reading=0.3)
    )
    assert len(asked) == 20
    assert [asked[index]["reading"] for index in range(20)] == [True] * 6 + [False] * 14
    assert [asked[index]["transcribe"] for index in range(20)] == [0.3] * 10 + [0.15] * 10
