"""Stage own_benchmark in a folder of its own."""

import hashlib
import json
from pathlib import Path

import pytest

from atr.benchmarks import load_benchmark
from atr.stages import own_benchmark

TEXT = """\
from atr.benchmarks.base import HubDataset

GROUP = "general"
SOURCE = HubDataset("org/name", "*.parquet")


def examples(rows):
    return []


def score(prediction, question):
    return 0.0
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_benchmark.cache_clear()
    Path("my_package").mkdir()
    Path("my_package/my_benchmark.py").write_text(TEXT)
    yield
    load_benchmark.cache_clear()


def test_the_digest_of_the_file_is_written():
    own_benchmark.main(None, "my_package/my_benchmark")
    assert json.loads(Path("data/own/my_package/my_benchmark.json").read_text()) == {
        "file": "my_package/my_benchmark.py",
        "group": "general",
        "sha256": hashlib.sha256(TEXT.encode()).hexdigest(),
    }


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('GROUP = "general"', "", r"my_benchmark\.py: GROUP: None is unknown"),
        ("def score", "def rate", r"my_benchmark\.py has no score\(\)"),
    ],
)
def test_a_file_that_is_no_benchmark_leaves_no_digest(before, after, message):
    Path("my_package/my_benchmark.py").write_text(TEXT.replace(before, after))
    with pytest.raises(ValueError, match=message):
        own_benchmark.main(None, "my_package/my_benchmark")
    assert not Path("data").exists()
