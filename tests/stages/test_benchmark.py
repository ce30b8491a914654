"""The file that says which code a benchmark runs."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from atr import config
from atr.benchmarks import load_benchmark
from atr.core.files import read_json
from atr.stages import BENCHMARK_FILES, benchmark

ROOT = Path(__file__).parents[2]
OWN = "my_package/my_benchmark"
TEXT = """\
from my_package.my_metric import exact

from atr.benchmarks.base import HubDataset

GROUP = "general"
SOURCE = HubDataset("org/name", "*.parquet")


def examples(rows):
    return []


def score(prediction, question):
    return exact(prediction, question.answers)
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    Path("my_package").mkdir()
    Path("my_package/my_metric.py").write_text("def exact(prediction, answers):\n    return 0.0\n")
    Path(f"{OWN}.py").write_text(TEXT)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(SimpleNamespace()))
    load_benchmark.cache_clear()
    yield
    load_benchmark.cache_clear()


def run(name):
    benchmark.main(config.load("benchmark"), name)
    return read_json(BENCHMARK_FILES / f"{name}.json")


@pytest.mark.parametrize("name, group", [("docs", "text"), ("gqa", "general"), (OWN, "general")])
def test_a_benchmark_has_its_group_and_the_digest_of_its_code(name, group):
    first = run(name)
    assert first == run(name) and first["group"] == group and first["code"]


@pytest.mark.parametrize("file", [f"{OWN}.py", "my_package/my_metric.py"])
def test_the_digest_changes_with_the_file_and_with_what_it_imports(file):
    before = run(OWN)["code"]
    path = Path(file)
    text = path.read_text()
    path.write_text(text + "# a comment\n")
    imported_again()
    assert run(OWN)["code"] != before
    path.write_text(text)
    imported_again()
    assert run(OWN)["code"] == before


def imported_again():
    """A stage is a process of its own, which remembers no file."""
    from atr.core import imports

    load_benchmark.cache_clear()
    imports._imported.cache_clear()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('GROUP = "general"', "", r"my_benchmark\.py: GROUP: None is unknown"),
        ("def score", "def rate", r"my_benchmark\.py has no score\(\)"),
    ],
)
def test_a_file_that_is_no_benchmark_leaves_no_digest(before, after, message):
    Path(f"{OWN}.py").write_text(TEXT.replace(before, after))
    with pytest.raises(ValueError, match=message):
        run(OWN)
    assert not BENCHMARK_FILES.exists()
