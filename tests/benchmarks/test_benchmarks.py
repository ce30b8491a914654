"""What every benchmark's file keeps to, ours and the user's own."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from atr.benchmarks import Benchmark, DrawingModule, benchmark_file, load_benchmark
from atr.core import catalog
from atr.core.records import Example, Question
from atr.datasets import drawn, parquet

NAMES = [
    name for name in catalog.names(catalog.BENCHMARKS) if "GROUP" in catalog.constants(benchmark_file(name))
]
OWN = """
from atr.benchmarks.base import DrawingModule
from atr.core.records import Example

GROUP = "text"
SOURCE = DrawingModule("atr.micro.world")


def examples(rows):
    for row in rows:
        yield Example(row["id"], row["question"], [row["answer"]], [row["image"]])


def score(prediction, question):
    return float(prediction in question.answers)
"""


def read(benchmark: Benchmark, repository, count=12) -> list[Example]:
    """The first examples of a benchmark, as stage prepare reads them."""
    source = benchmark.source
    if isinstance(source, DrawingModule):
        rows = drawn.draw_rows(source.module, benchmark.name, "evaluate", 0)
        return list(islice(benchmark.examples(rows), count))
    rows = parquet.read_rows(parquet.find_files(str(repository), source.hub, source.files))
    if source.images:
        images = parquet.find_files(str(repository), source.hub, source.images)
        rows = parquet.join_images(rows, images, source.image_key)
    return list(islice(benchmark.examples(rows), count))


def test_the_benchmarks_are_the_files_with_a_group():
    assert len(NAMES) == 17 and sorted(catalog.benchmarks()) == NAMES
    assert not {"base", "metrics", "runner", "summary", "vqa"} & set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_its_group_and_where_it_comes_from(name):
    benchmark = load_benchmark(name)
    assert benchmark.group == catalog.benchmark_group(name) and benchmark.name == name
    assert benchmark_file(name).read_text().startswith('"""')


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_a_question_with_an_answer_and_an_image(repository, name):
    benchmark = load_benchmark(name)
    examples = read(benchmark, repository)
    assert examples and len({example.id for example in examples}) == len(examples)
    for example in examples:
        assert example.question.strip() and all(example.answers) and example.answers and example.images
        question = Question(
            example.id, name, benchmark.group, [], example.question, example.answers, example.choices
        )
        assert benchmark.score(example.answers[0], question) == 1.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "prediction", ["", " ", "\n", "é\x00", "A" * 3000, "(B) or (C).", "<image 1>", "-0.0%", "nan"]
)
def test_every_prediction_has_a_score_that_is_the_same_again(repository, name, prediction):
    benchmark = load_benchmark(name)
    for example in read(benchmark, repository, 3):
        scores = [benchmark.score(prediction, example) for _ in range(2)]
        assert scores[0] == scores[1] and 0 <= scores[0] <= 1 and type(scores[0]) is float


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes the user's own benchmark with a change to its text, and gives its name."""
    monkeypatch.chdir(tmp_path)
    load_benchmark.cache_clear()
    Path("my_package").mkdir()

    def write(before="", after=""):
        assert before in OWN
        Path("my_package/my_benchmark.py").write_text(OWN.replace(before, after) if before else OWN)
        return "my_package/my_benchmark"

    yield write
    load_benchmark.cache_clear()


def test_a_benchmark_of_the_users_own_is_named_by_its_path(own, repository):
    benchmark = load_benchmark(own())
    assert (benchmark.name, benchmark.group) == ("my_package/my_benchmark", "text")
    assert benchmark.score("7", SimpleNamespace(answers=["7"])) == 1.0


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('GROUP = "text"', "", "GROUP: None is unknown, allowed: 'text', 'general'"),
        ('"text"', '"image"', "GROUP: 'image' is unknown, allowed: 'text', 'general'"),
        ("SOURCE =", "PLACE =", "SOURCE: None is not allowed, allowed: a HubDataset or a DrawingModule"),
        ("def examples", "def samples", r"has no examples\(\), allowed: a function of rows"),
        ("def score", "def rate", r"has no score\(\), allowed: a function of a prediction and a question"),
        ("import Example", "import Exampel", "cannot be imported: ImportError: cannot import name 'Exampel'"),
        ("def score(", "def score((", "line 14"),
    ],
)
def test_what_is_wrong_with_it_is_one_line_that_names_the_file(own, before, after, message):
    with pytest.raises(ValueError, match=rf"^my_package/my_benchmark\.py:?.* ?{message}") as caught:
        load_benchmark(own(before, after))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(own):
    own()
    with pytest.raises(ValueError, match=r"^my_package/other\.py: no such file"):
        load_benchmark("my_package/other")
