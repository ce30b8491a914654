import pytest
import torch

from atr import config
from atr.micro import world
from atr.micro.curriculum import BLANK, IGNORE, OTHER, TURN_TOKENS, Collator, LessonDataset, StoredLessons
from atr.micro.model import build_processor


@pytest.fixture(scope="module")
def processor():
    return build_processor((*world.QUESTIONS, *world.ANSWERS), world.SIZE)


def recipe(**changes):
    return config.Micro(**{"steps": 10, "batch_size": 2, "epochs": 1, "workers": 0, **changes})


def draw(index):
    return world.lesson(index, seed=0, reading=False, transcribe=0.5)


def lessons(count):
    return [draw(index) for index in range(count)]


def shown(lessons):
    """As the dataset shows them."""
    return [(torch.tensor(bytearray(each.image.tobytes())).view(168, 168, 3), each) for each in lessons]


class Store:
    """Features of five images, which are but their numbers."""

    def __len__(self):
        return 5

    def __getitem__(self, position):
        return torch.full((1, 1), position)


def test_only_answers_are_learned(processor):
    batch = Collator(processor.tokenizer, world.SIZE, TURN_TOKENS)(shown(lessons(6)))
    for lesson, text, labels in zip(lessons(6), batch["text"], batch["labels"], strict=True):
        learned = processor.tokenizer.convert_ids_to_tokens(labels[labels != IGNORE])
        assert "".join(learned) == "".join(answer.replace(" ", "") + "</s>" for _, answer in lesson.turns)
        assert (text[labels != IGNORE] == labels[labels != IGNORE]).all()


def test_a_patch_tells_the_digits_under_its_name_up_to_its_own(processor):
    """On a grid of 12 patches of 14 pixels: a value above its label, and one behind its key."""
    chart, page = ("jan", "jan"), ("code", "code")
    written = (
        ("4", 50, 20, chart), ("7", 60, 20, chart), ("j", 45, 160, chart), ("n", 61, 160, chart),
        ("c", 3, 90, page), (":", 30, 90, page),
        ("1", 37, 90, page), ("2", 44, 90, page), ("3", 58, 90, page),
    )  # fmt: skip
    lesson = world.Sample(lessons(1)[0].image, (), written)
    digits = Collator(processor.tokenizer, world.SIZE, 8)(shown([lesson]))["digits"][0]
    told = {patch: row.tolist() for patch, row in enumerate(digits) if row[0] != IGNORE}
    assert told == {
        12 + 3: [5, 0, 0, 0], 12 + 4: [5, 8, 0, 0], 11 * 12 + 3: [5, 8, 0, 0], 11 * 12 + 4: [5, 8, 0, 0],
        72: [0, 0, 0, 0], 74: [2, 0, 0, 0], 75: [2, 3, 0, 0], 76: [2, 3, 4, 0],
    }  # fmt: skip


def test_characters_of_a_patch_are_the_first_two_from_the_left(processor):
    name, city = ("name", "apple"), ("city", "city")
    written = (("b", 10, 3, name), ("a", 2, 3, name), ("c", 13, 3, name), (":", 20, 20, city))
    lesson = world.Sample(lessons(1)[0].image, (("a", "1"),), written)
    found = Collator(processor.tokenizer, world.SIZE, 8).characters(lesson)
    assert found[0].tolist() == [2, 3]
    assert found[12 + 1].tolist() == [OTHER, BLANK]
    assert (found != BLANK).sum() == 3


def test_a_lesson_that_is_resized_keeps_its_characters_in_their_patches(processor):
    """At 252 pixels, 18 patches a side, a patch shows a stretch of 28 / 3 pixels of the lesson."""
    written = (("a", 9, 9, ("name", "name")), ("b", 9.4, 20, ("name", "name")))
    regions = (world.Region(("digit", "7"), (84, 84, 168, 168)),)
    lesson = world.Sample(lessons(1)[0].image, (), written, regions)
    collate = Collator(processor.tokenizer, 252, 8)
    assert collate.characters(lesson).any(-1).nonzero()[:, 0].tolist() == [0, 2 * 18 + 1]
    named = (collate._names(lesson) == processor.tokenizer.convert_tokens_to_ids("7")).any(-1)
    rows, columns = named.view(18, 18).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max(), len(rows)) == (9, 17, 9, 17, 81)


def test_names_of_a_patch_are_those_of_what_lies_in_front(processor):
    regions = (
        world.Region(("scene", "cat"), world.WHOLE),
        world.Region(("digit", "7"), (28, 28, 60, 60)),
    )
    written = (("a", 30, 30, ("name", "apple")),)
    lesson = world.Sample(lessons(1)[0].image, (("a", "1"),), written, regions)
    names = Collator(processor.tokenizer, world.SIZE, 8)._names(lesson)
    found = [tuple(processor.tokenizer.convert_ids_to_tokens(pair)) for pair in names]
    assert found[2 * 12 + 2] == ("name", "apple")
    # A patch shows what its centre lies in: the box ends at 60, before the centre of the fifth patch.
    digit = {3 * 12 + 2, 2 * 12 + 3, 3 * 12 + 3}
    assert {patch for patch, pair in enumerate(found) if pair == ("digit", "7")} == digit
    assert found.count(("scene", "cat")) == 144 - 4
    blank = world.Sample(lesson.image, ())
    assert set(Collator(processor.tokenizer, world.SIZE, 8)._names(blank).flatten().tolist()) == {
        processor.tokenizer.pad_token_id
    }


def test_reading_comes_first_and_fewer_pages_are_transcribed_later():
    asked = []

    def watched(index, **asked_for):
        asked.append(asked_for)
        return draw(index)

    dataset = LessonDataset(watched, recipe(reading=0.3))
    assert len(dataset) == 20 and len([dataset[index] for index in range(20)]) == 20
    assert [lesson["reading"] for lesson in asked] == [True] * 6 + [False] * 14
    assert [lesson["transcribe"] for lesson in asked] == [0.5] * 10 + [0.15] * 10


def test_stored_lessons_go_over_their_images_again_and_ask_anew():
    """Two of five images to read from in 4 steps of 2, three to answer about in the 6 steps after."""

    def asked(index, **asked_for):
        return {"index": index, **asked_for}

    dataset = StoredLessons(asked, Store(), 2, recipe(reading=0.4))
    drawn = [dataset[index] for index in range(len(dataset))]
    assert all(features[0, 0] == lesson["index"] for features, lesson in drawn)
    lessons = [lesson for _, lesson in drawn]
    assert [lesson["reading"] for lesson in lessons] == [True] * 8 + [False] * 12
    assert [lesson["again"] for lesson in lessons] == [0, 0, 1, 1, 2, 2, 3, 3] + [0, 0, 0, 1, 1, 1] + [
        2
    ] * 3 + [3] * 3
    passes = [[lesson["index"] for lesson in lessons[start : start + 3]] for start in range(8, 20, 3)]
    assert all(sorted(each) == [2, 3, 4] for each in passes) and len({tuple(each) for each in passes}) > 1
    assert {lesson["index"] for lesson in lessons[:8]} == {0, 1}
    assert [lesson["transcribe"] for lesson in lessons] == [0.5] * 10 + [0.15] * 10
    assert dataset[13][1] == lessons[13]
