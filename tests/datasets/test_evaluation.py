from dataclasses import dataclass, field

import pytest
from PIL import Image

from atr.config import GROUPS
from atr.core.records import Question
from atr.datasets import evaluation, parquet
from atr.micro import world


@dataclass(frozen=True)
class Row:
    """An example as a benchmark's file makes it."""

    id: str
    images: list
    unit: str = ""
    question: str = "what?"
    answers: list[str] = field(default_factory=lambda: ["it"])
    choices: list[str] = field(default_factory=list)


@pytest.fixture
def cells(hub, tmp_path):
    """The first and second are the same picture, the third is cut off, the fourth is no picture."""
    contents = [hub.png(1), hub.png(1), hub.png(2)[:90], b"", hub.png(3)]
    rows = [{"image": {"bytes": content, "path": None}} for content in contents]
    return [row["image"] for row in parquet.read_rows(hub.write(tmp_path, "chartqa", rows, files=1))]


def read(examples, count=99, seed=0):
    return list(evaluation.read_from("chartqa", "text", examples, count, seed))


def test_micro_questions_are_the_first_of_each_evaluation_image():
    [(question, [(name, image)])] = [*evaluation.drawn_by_micro("docs", "text", 1, 5, "evaluate")]
    sample = world.sample("docs", "evaluate", 0, 5)
    asked, answer = sample.turns[0]
    assert question == Question("docs/000000#0", "docs", "text", ["docs/000000"], asked, [answer])
    assert name == "docs/000000" and image.tobytes() == sample.image.tobytes()


def test_a_question_has_its_images_in_order_and_shares_them_by_content(cells):
    drawn = read(
        [Row("a", [cells[0], cells[4]], choices=["x"], unit="u"), Row("b", [cells[1]]), Row("c", [])]
    )
    (first, pictures), (second, same), (third, none) = drawn
    assert first.id == "chartqa/a" and first.images == [name for name, _ in pictures]
    assert second.images == first.images[:1] and same[0][0] == pictures[0][0]
    assert (third.images, none, third.unreadable) == ([], [], "")
    assert (first.choices, first.unit, second.unit) == (["x"], "chartqa/u", "")
    questions = []
    stored = dict(evaluation.distinct(drawn, questions))
    assert list(stored) == first.images and questions == [first, second, third]


@pytest.mark.parametrize(
    "broken, reason", [(2, "row 2 column image cannot be read as an image"), (3, "row 3")]
)
def test_an_unreadable_image_is_said_and_the_others_are_asked(cells, broken, reason):
    drawn = read([Row("a", [cells[0], cells[broken]]), Row("b", [cells[1]])])
    assert [(question.images == [], reason in question.unreadable) for question, _ in drawn] == [
        (True, True), (False, False),
    ]  # fmt: skip
    assert [len(pictures) for _, pictures in drawn] == [0, 1]
    questions = [question for question, _ in drawn]
    assert evaluation.unreadable(questions) == questions[:1]


def test_a_benchmark_without_a_readable_image_is_refused(cells):
    questions = [question for question, _ in read([Row("a", [cells[2]]), Row("b", [cells[3]])])]
    with pytest.raises(ValueError, match=r"chartqa: no image can be read: .*row 2"):
        evaluation.unreadable([Question("docs/0", "docs", "text", ["x"], "?", ["7"]), *questions])


def test_a_sample_is_seeded_whole_units_in_the_order_of_the_rows():
    rows = [Row(f"{turn}.{unit}", [], unit=str(unit)) for turn in range(3) for unit in range(20)]
    names = [[question.id for question, _ in read(rows, 5, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 15 and names[0] == sorted(names[0], key=[f"chartqa/{r.id}" for r in rows].index)
    assert len({name.partition(".")[2] for name in names[0]}) == 5
    assert len(read(rows, 20)) == len(read(rows, 1000)) == 60


def test_pictures_are_distinct_over_all_questions(cells):
    questions = []
    drawn = read([Row("a", [cells[0]]), Row("b", [cells[1]]), Row("c", [cells[4]])])
    pictures = list(evaluation.distinct(drawn, questions))
    assert len(pictures) == 2 and all(isinstance(image, Image.Image) for _, image in pictures)


@pytest.mark.parametrize("split", ["evaluate", "validation"])
@pytest.mark.parametrize("benchmark", world.DRAW)
def test_the_text_of_an_evaluation_image_is_found_again_by_its_name(benchmark, split):
    for index in range(20):
        drawn = evaluation.drawn_by_micro(benchmark, GROUPS[benchmark], index + 1, 3, split)
        ((name, _),) = list(drawn)[-1][1]
        written = world.sample(benchmark, split, index, 3).characters
        centres = evaluation.text_centres(name, 3, split)
        for (x, y), character in zip(centres, written, strict=True):
            assert (x * world.SIZE, y * world.SIZE) == pytest.approx((character.x, character.y))
        assert all(0 <= x < 1 and 0 <= y < 1 for x, y in centres)
        assert bool(centres) == (benchmark in ("docs", "signs", "charts"))


def test_nothing_is_known_of_the_text_of_other_images():
    assert evaluation.text_centres("docvqa/0123456789abcdef", 3, "evaluate") == []


def test_a_question_that_comes_twice_is_refused_before_any_picture_is_read():
    with pytest.raises(ValueError, match=r"^ids of questions: 'a' comes twice, allowed: distinct names$"):
        read([Row("a", ["no cell"]), Row("b", []), Row("a", [])])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"question": None}, "question: None is not allowed, allowed: str"),
        ({"answers": ["it", None]}, r"answers\[1\]: None is not allowed, allowed: str"),
        ({"answers": []}, r"answers: \[\] is not allowed"),
        ({"choices": ["one", float("nan")]}, r"choices\[1\]: nan is not allowed, allowed: str"),
    ],
)
def test_texts_that_are_none_are_named_by_question(broken, message):
    with pytest.raises(ValueError, match=f"^(question chartqa/b: )?{message}"):
        read([Row("a", []), Row("b", [], **broken)])


@pytest.mark.parametrize("image", ["docs/x", "docs/-1", "docs", "elsewhere/0001", ""])
def test_nothing_is_known_of_an_image_that_micro_did_not_draw(image):
    assert evaluation.text_centres(image, 0, "evaluate") == []
