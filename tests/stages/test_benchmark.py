"""The file that says which code a benchmark runs."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from atr import config
from atr.core import catalog
from atr.core.files import read_json
from atr.stages import BENCHMARKS, benchmark

ROOT = Path(__file__).parents[2]
OWN = '''
from atr.benchmarks.metrics import exact_match
from my_metrics import FACTOR

GROUP = "text"
SOURCE = None


def examples(rows):
    return iter(())


def score(prediction, question):
    return exact_match(prediction, question.answers)
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    log = SimpleNamespace(artifact=lambda *_: None)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(log))
    return tmp_path


def run(name):
    benchmark.main(config.load("benchmark"), name)
    return read_json(BENCHMARKS / f"{name}.json")


@pytest.mark.parametrize("name", ["docs", "chartqa"])
def test_a_benchmark_of_ours_has_its_group_and_the_digest_of_its_code(project, name):
    first = run(name)
    assert first == run(name) and first["group"] == "text" and len(first["code"]) == 64


def test_the_digest_changes_with_the_file_and_with_what_it_imports(project, monkeypatch):
    copied = project / "atr_copy"
    copied.mkdir()
    file = copied / "docs.py"
    file.write_text(catalog.benchmark_file("docs").read_text())
    monkeypatch.setattr(catalog, "benchmark_file", lambda name: file)
    before = run("docs")["code"]
    assert run("docs")["code"] == before
    file.write_text(file.read_text() + "# a comment\n")
    assert run("docs")["code"] != before
