import torch

from atr.micro.curriculum import LessonDataset, StoredLessons
from atr.micro.lessons import draw_lesson
from atr.micro.params import Micro


def recipe(**changes):
    return Micro(**{"steps": 10, "batch_size": 2, "epochs": 1, "workers": 0, **changes})


def draw(index):
    return draw_lesson(index, seed=0, reading=False, transcribe=0.5)


class Store:
    """Features of five images: the position of each."""

    def __len__(self):
        return 5

    def __getitem__(self, position):
        return torch.full((1, 1), position)


def test_reading_comes_first_and_fewer_questions_ask_for_a_page_later():
    calls = []

    def record(index, **arguments):
        calls.append(arguments)
        return draw(index)

    dataset = LessonDataset(record, recipe(reading=0.3))
    assert len(dataset) == 20 and len([dataset[index] for index in range(20)]) == 20
    assert [lesson["reading"] for lesson in calls] == [True] * 6 + [False] * 14
    assert [lesson["transcribe"] for lesson in calls] == [0.5] * 10 + [0.15] * 10


def test_stored_lessons_repeat_their_images_with_other_questions():
    """Two of five images for 4 reading steps of 2, three for the 6 answering steps after them."""

    def describe(index, **arguments):
        return {"index": index, **arguments}

    dataset = StoredLessons(describe, Store(), 2, recipe(reading=0.4))
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
