"""Every built-in reducer has all properties of a reducer, and broken reducers fail them one by one."""

import re
from itertools import count
from textwrap import dedent, indent

import pytest

from atr.core import catalog
from atr.reduction.conformance import PROPERTIES, Subject, check, results
from atr.reduction.registry import built_in_names


@pytest.mark.parametrize("name", built_in_names())
def test_a_built_in_reducer_has_all_properties(name):
    failures = [f"{title}: {failure}" for title, failure in results(name) if failure]
    assert failures == []


def test_every_property_applies_to_some_built_in_reducer():
    names = ("class_attention", "prumerge_adaptive", "hired", "random")
    subjects = [Subject(name, catalog.reducer_file(name)) for name in names]
    for each in PROPERTIES:
        assert any(each.applies(subject, subject.reducer()) for subject in subjects), each.name


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Runs the checks on a reducer whose `__call__` has the given body; returns the failures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    numbers = count()

    def write(body, constant="", members=""):
        name = f"{tmp_path.name}_{next(numbers)}".replace("-", "_")
        lines = [
            "import torch",
            constant,
            "CALLS = []",
            "class Own:",
            "    needs = frozenset()",
            "    def __init__(self, seed=0):",
            "        self.seed = seed",
            "    def __call__(self, encoded, budget):",
            "        x, N = encoded.features_BND.float(), encoded.tokens",
            indent(body, " " * 8),
            indent(members, " " * 4),
        ]
        (tmp_path / f"{name}.py").write_text("\n".join(lines) + "\n")
        return {title: failure for title, failure in results(name) if failure}

    return write


FIRST = "return torch.arange(budget).repeat(len(x), 1)"


def test_a_sound_user_reducer_fails_nothing(failing):
    assert failing(FIRST) == {}


@pytest.mark.parametrize(
    ("body", "title", "message"),
    [
        ("return torch.arange(max(1, budget - 1)).repeat(len(x), 1)", "exact counts", r"have shape \(3, 3\)"),
        ("return torch.arange(budget).flip(0).repeat(len(x), 1)", "exact counts", "are out of order"),
        ("return torch.zeros(len(x), budget, dtype=torch.int64)", "exact counts", "kept twice"),
        ("return torch.arange(budget).int().repeat(len(x), 1)", "exact counts", "are torch.int32"),
        ("return torch.arange(budget).repeat(len(x), 1) + 1", "exact counts", "kept index 1 is out of range"),
        ("return 5", "exact counts", r"are of type int, allowed: a tensor of shape \(3, 1\)"),
        (
            "return (x.norm(dim=2) >= x.norm(dim=2).sort(1).values[:, -budget, None])"
            ".nonzero()[:, 1].reshape(len(x), budget)",
            "ties",
            "RuntimeError: shape",
        ),
        (
            "return (x - x.mean(0)).norm(dim=2).topk(budget).indices.sort(1).values",
            "independent of the batch",
            r"images .* have another selection",
        ),
        (
            "CALLS.append(0)\n"
            "return torch.arange(N).roll(len(CALLS))[:budget].sort().values.repeat(len(x), 1)",
            "deterministic",
            "another selection",
        ),
        (
            "encoded.features_BND[:, 0] += 1\nreturn torch.arange(budget).repeat(len(x), 1)",
            "leaves its input",
            "changes features_BND",
        ),
        (
            "return torch.arange(budget).repeat(len(x), 1) if encoded.keys_BND is None else "
            "torch.arange(N - budget, N).repeat(len(x), 1)",
            "reads no field",
            "changes with fields",
        ),
        ("assert encoded.grid\n" + FIRST, "packed tokens", "AssertionError"),
        ("encoded.features_BND.numpy()\n" + FIRST, "bfloat16", "TypeError"),
        ("raise SystemExit(0)", "exact counts", "SystemExit: 0"),
    ],
)
def test_a_reducer_that_lacks_a_property_fails_it_with_an_example(failing, body, title, message):
    failures = failing(body)
    [failure] = [text for name, text in failures.items() if name.startswith(title)]
    assert "images of" in failure and "budget" in failure and "\n" not in failure
    assert re.search(message, failure), failure


@pytest.mark.parametrize(
    ("constant", "title", "message"),
    [
        ("DRAWS = True", "another selection", "seeds 0 to 7 have the same selection"),
        ('BUDGET = "own"', "a budget of its own", "neither `counts` nor a `threshold`"),
        ('BUDGET = "most"', "builds", "BUDGET: 'most' is unknown, allowed: 'asked', 'all', 'nothing', 'own'"),
        ("DRAWS = 1", "builds", "DRAWS: 1 is unknown, allowed: False, True"),
        ("raise SystemExit(0)", "builds", "it cannot be imported: SystemExit: 0"),
    ],
)
def test_the_constants_of_the_file_are_checked(failing, constant, title, message):
    [(name, failure)] = failing(FIRST, constant=constant).items()
    assert name.startswith(title) and message in failure


@pytest.mark.parametrize(
    ("members", "title", "message"),
    [
        (
            "def merge(self, encoded, budget):\n    return self(encoded, budget), 0",
            "merged",
            "are of type int",
        ),
        (
            "def merge(self, encoded, budget):\n"
            "    return self(encoded, budget), encoded.features_BND[:, :budget] * float('nan')",
            "merged",
            "merged features of images",
        ),
        (
            "def merge(self, encoded, budget):\n"
            "    return self(encoded, budget), encoded.features_BND[:, :budget] + 1",
            "merged",
            "with all tokens kept the features change",
        ),
        ("def counts(self, encoded):\n    return torch.ones(len(encoded.features_BND))", "counts", "float32"),
        (
            "def counts(self, encoded):\n"
            "    return torch.full((len(encoded.features_BND),), encoded.tokens + 1)",
            "counts",
            r"counts are \[2, 2, 2\], allowed: 0 to 1",
        ),
        (
            "threshold = None\ndef scores(self, encoded):\n    return encoded.features_BND.mean(2) / 0",
            "scores",
            "scores of images",
        ),
    ],
)
def test_merging_counting_and_scoring_are_checked(failing, members, title, message):
    failures = failing(FIRST, members=members)
    [failure] = [text for name, text in failures.items() if name.startswith(title)]
    assert re.search(message, failure), failure


def test_a_wrong_schedule_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_layers.py").write_text(
        dedent("""
        from atr.reduction.layer_schedule import Schedule
        class Half:
            needs = frozenset()
            def schedule(self, layers, keep):
                return Schedule(layers, {layers // 2: keep / 2}, own=True)
        """)
    )
    assert dict(results("own_layers")) == {
        "builds": "",
        "schedule": "4 layers, keep 1.0: layers read 0.750 of the tokens, allowed: all",
    }


def test_check_prints_a_line_for_each_property_and_returns_whether_any_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check(["fastv", "none"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["fastv", "  ok     builds", "  ok     schedule"]
    assert check(["none", "no_such"]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("  FAILS  builds: reducer 'no_such': there is no file no_such.py, allowed: ")


def test_check_returns_1_for_a_file_without_a_reducer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_reducer.py").write_text("")
    assert check(["no_reducer.py", "none"]) == 1
    assert "it has 0 reducers (none)" in capsys.readouterr().out


def test_a_class_is_chosen_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "two.py").write_text(
        dedent("""
        import torch
        class One:
            needs = frozenset()
            def __call__(self, encoded, budget):
                return torch.arange(budget).repeat(len(encoded.features_BND), 1)
        class Other(One):
            pass
        """)
    )
    for name in ("own_package.two:One", "own_package/two.py:Other", "own_package/two:One"):
        assert not any(failure for _, failure in results(name)), name
    assert "it has 2 reducers (One, Other)" in dict(results("own_package/two.py"))["builds"]
    assert "it has no class Third" in dict(results("own_package.two:Third"))["builds"]
