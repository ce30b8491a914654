import pytest
import torch

from atr.micro.drawing import SIZE, WHOLE_IMAGE, Region, Sample
from atr.micro.lessons import draw_lesson
from atr.micro.model import build_processor
from atr.micro.targets import BLANK, IGNORE, OTHER, TURN_TOKENS, Collator
from atr.micro.vocabulary import VOCABULARY


@pytest.fixture(scope="module")
def processor():
    return build_processor(VOCABULARY, SIZE)


def draw(index):
    return draw_lesson(index, seed=0, reading=False, transcribe=0.5)


def lessons(count):
    return [draw(index) for index in range(count)]


def pair(lessons):
    """Images with their lessons, as a dataset gives them."""
    return [(torch.tensor(bytearray(each.image.tobytes())).view(168, 168, 3), each) for each in lessons]


def test_only_answers_are_labels(processor):
    batch = Collator(processor.tokenizer, SIZE, TURN_TOKENS)(pair(lessons(6)))
    for lesson, text, labels in zip(lessons(6), batch["text"], batch["labels"], strict=True):
        learned = processor.tokenizer.convert_ids_to_tokens(labels[labels != IGNORE])
        assert "".join(learned) == "".join(answer.replace(" ", "") + "</s>" for _, answer in lesson.turns)
        assert (text[labels != IGNORE] == labels[labels != IGNORE]).all()


def test_digits_of_a_patch_are_those_of_its_question_so_far(processor):
    """On a grid of 12 patches of 14 pixels: a value above its label, and one behind its key."""
    chart, page = ("jan", "jan"), ("code", "code")
    written = (
        ("4", 50, 20, chart), ("7", 60, 20, chart), ("j", 45, 160, chart), ("n", 61, 160, chart),
        ("c", 3, 90, page), (":", 30, 90, page),
        ("1", 37, 90, page), ("2", 44, 90, page), ("3", 58, 90, page),
    )  # fmt: skip
    lesson = Sample(lessons(1)[0].image, (), written)
    digits = Collator(processor.tokenizer, SIZE, 8)(pair([lesson]))["digits"][0]
    told = {patch: row.tolist() for patch, row in enumerate(digits) if row[0] != IGNORE}
    assert told == {
        12 + 3: [5, 0, 0, 0], 12 + 4: [5, 8, 0, 0], 11 * 12 + 3: [5, 8, 0, 0], 11 * 12 + 4: [5, 8, 0, 0],
        72: [0, 0, 0, 0], 74: [2, 0, 0, 0], 75: [2, 3, 0, 0], 76: [2, 3, 4, 0],
    }  # fmt: skip


def test_characters_of_a_patch_are_the_first_two_from_the_left(processor):
    name, city = ("name", "apple"), ("city", "city")
    written = (("b", 10, 3, name), ("a", 2, 3, name), ("c", 13, 3, name), (":", 20, 20, city))
    lesson = Sample(lessons(1)[0].image, (("a", "1"),), written)
    found = Collator(processor.tokenizer, SIZE, 8).label_characters(lesson)
    assert found[0].tolist() == [2, 3]
    assert found[12 + 1].tolist() == [OTHER, BLANK]
    assert (found != BLANK).sum() == 3


def test_a_lesson_that_is_resized_keeps_its_characters_in_their_patches(processor):
    """At 252 pixels, 18 patches a side, a patch covers 28 / 3 pixels of the lesson."""
    written = (("a", 9, 9, ("name", "name")), ("b", 9.4, 20, ("name", "name")))
    regions = (Region(("digit", "7"), (84, 84, 168, 168)),)
    lesson = Sample(lessons(1)[0].image, (), written, regions)
    collate = Collator(processor.tokenizer, 252, 8)
    assert collate.label_characters(lesson).any(-1).nonzero()[:, 0].tolist() == [0, 2 * 18 + 1]
    named = (collate.label_names(lesson) == processor.tokenizer.convert_tokens_to_ids("7")).any(-1)
    rows, columns = named.view(18, 18).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max(), len(rows)) == (9, 17, 9, 17, 81)


def test_a_patch_has_the_names_of_the_content_in_front(processor):
    regions = (
        Region(("scene", "cat"), WHOLE_IMAGE),
        Region(("digit", "7"), (28, 28, 60, 60)),
    )
    written = (("a", 30, 30, ("name", "apple")),)
    lesson = Sample(lessons(1)[0].image, (("a", "1"),), written, regions)
    names = Collator(processor.tokenizer, SIZE, 8).label_names(lesson)
    found = [tuple(processor.tokenizer.convert_ids_to_tokens(pair)) for pair in names]
    assert found[2 * 12 + 2] == ("name", "apple")
    # A patch belongs to the region that contains its centre; the box ends before the fifth patch's.
    digit = {3 * 12 + 2, 2 * 12 + 3, 3 * 12 + 3}
    assert {patch for patch, pair in enumerate(found) if pair == ("digit", "7")} == digit
    assert found.count(("scene", "cat")) == 144 - 4
    blank = Sample(lesson.image, ())
    assert set(Collator(processor.tokenizer, SIZE, 8).label_names(blank).flatten().tolist()) == {
        processor.tokenizer.pad_token_id
    }
