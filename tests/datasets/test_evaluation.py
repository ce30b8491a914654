import pytest
from PIL import Image

from atr.benchmarks import load_benchmark
from atr.core.records import Example, Question
from atr.datasets import drawn, evaluation, parquet
from atr.micro import world


def example(name, images, **fields):
    return Example(name, **{"question": "what?", "answers": ["it"], "images": images} | fields)


@pytest.fixture
def cells(hub, tmp_path):
    """The first and second are the same picture, the third is cut off, the fourth is no picture."""
    contents = [hub.png(1), hub.png(1), hub.png(2)[:90], b"", hub.png(3)]
    rows = [{"image": {"bytes": content, "path": None}} for content in contents]
    return [row["image"] for row in parquet.read_rows(hub.write(tmp_path, "chartqa", rows, files=1))]


def read(examples, count=99, seed=0):
    return list(evaluation.sample_questions("chartqa", "text", examples, count, seed))


def draw(benchmark, count, seed, split):
    docs = load_benchmark(benchmark)
    rows = drawn.draw_rows(docs.source.module, benchmark, split, seed)
    return list(evaluation.first_questions(benchmark, docs.group, docs.examples(rows), count))


def test_drawn_questions_are_the_first_of_each_image_in_their_order():
    pictured = draw("docs", 3, 5, "evaluate")
    for index, (question, [image]) in enumerate(pictured):
        sample, name = world.sample("docs", "evaluate", index, 5), f"docs/{index:06d}"
        text, answer = sample.turns[0]
        assert question == Question(f"{name}#0", "docs", "text", [name], text, [answer])
        assert image.id == name and image.image.tobytes() == sample.image.tobytes()
    assert len(pictured) == 3


def test_a_question_has_its_images_in_order_and_shares_them_by_content(cells):
    pictured = read(
        [
            example("a", [cells[0], cells[4]], choices=["x"], unit="u"),
            example("b", [cells[1]]),
            example("c", []),
        ]
    )
    (first, pictures), (second, same), (third, none) = pictured
    assert first.id == "chartqa/a" and first.images == [image.id for image in pictures]
    assert second.images == first.images[:1] and same[0].id == pictures[0].id
    assert (third.images, none, third.unreadable) == ([], [], "")
    assert (first.choices, first.unit, second.unit) == (["x"], "chartqa/u", "")
    questions = []
    stored = list(evaluation.deduplicate(pictured, questions))
    assert [image.id for image in stored] == first.images and questions == [first, second, third]


@pytest.mark.parametrize(
    "broken, reason", [(2, "row 2 column image cannot be read as an image"), (3, "row 3")]
)
def test_an_unreadable_image_is_said_and_the_others_are_asked(cells, broken, reason):
    pictured = read([example("a", [cells[0], cells[broken]]), example("b", [cells[1]])])
    assert [(question.images == [], reason in question.unreadable) for question, _ in pictured] == [
        (True, True), (False, False),
    ]  # fmt: skip
    assert [len(pictures) for _, pictures in pictured] == [0, 1]
    questions = [question for question, _ in pictured]
    assert evaluation.unreadable_questions(questions) == questions[:1]


def test_a_benchmark_without_a_readable_image_is_refused(cells):
    questions = [question for question, _ in read([example("a", [cells[2]]), example("b", [cells[3]])])]
    with pytest.raises(ValueError, match=r"chartqa: no image can be read: .*row 2"):
        evaluation.unreadable_questions([Question("docs/0", "docs", "text", ["x"], "?", ["7"]), *questions])


def test_a_sample_is_seeded_whole_units_in_the_order_of_the_rows():
    rows = [example(f"{turn}.{unit}", [], unit=str(unit)) for turn in range(3) for unit in range(20)]
    names = [[question.id for question, _ in read(rows, 5, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert len(names[0]) == 15 and names[0] == sorted(names[0], key=[f"chartqa/{r.id}" for r in rows].index)
    assert len({name.partition(".")[2] for name in names[0]}) == 5
    assert len(read(rows, 20)) == len(read(rows, 1000)) == 60


def test_pictures_are_distinct_over_all_questions(cells):
    questions = []
    pictured = read([example("a", [cells[0]]), example("b", [cells[1]]), example("c", [cells[4]])])
    pictures = list(evaluation.deduplicate(pictured, questions))
    assert len(pictures) == 2 and all(isinstance(picture.image, Image.Image) for picture in pictures)


@pytest.mark.parametrize("split", ["evaluate", "validation"])
@pytest.mark.parametrize("benchmark", world.DRAW)
def test_a_drawn_image_says_where_its_text_is(benchmark, split):
    for index, (_, [image]) in enumerate(draw(benchmark, 20, 3, split)):
        written = world.sample(benchmark, split, index, 3).characters
        assert image.text_centres == [(mark.x / world.SIZE, mark.y / world.SIZE) for mark in written]
        assert all(0 <= x < 1 and 0 <= y < 1 for x, y in image.text_centres)
        assert bool(image.text_centres) == (benchmark in ("docs", "signs", "charts"))


def test_nothing_is_known_of_the_text_of_other_images(cells):
    [(_, [image])] = read([example("a", [cells[0]])])
    assert image.text_centres == []


def test_a_question_that_comes_twice_is_refused_before_any_picture_is_read():
    with pytest.raises(
        ValueError, match=r"^chartqa: ids of examples: 'a' occurs twice, allowed: distinct names$"
    ):
        read([example("a", ["no cell"]), example("b", []), example("a", [])])


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
    with pytest.raises(ValueError, match=f"^question chartqa/b: {message}"):
        read([example("a", []), example("b", [], **broken)])


def test_an_image_that_no_row_holds_is_named_by_example():
    with pytest.raises(
        ValueError, match=r"^chartqa: images of example 'a': 'x.png' is not allowed, allowed: im"
    ):
        read([example("a", ["x.png"])])
