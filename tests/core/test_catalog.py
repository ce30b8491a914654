from pathlib import Path

import pytest

from atr.core import catalog

ROOT = Path(__file__).parents[2]


def test_literals_are_read_and_the_file_is_not_run(tmp_path):
    path = tmp_path / "part.py"
    path.write_text("A = 1\nB: str = 'x'\nC = D = (1, 2)\nE = open('no')\nf = 3\nraise SystemExit\n")
    assert catalog.constants(path) == {"A": 1, "B": "x", "C": (1, 2), "D": (1, 2)}


def test_an_edited_file_is_read_again(tmp_path):
    path = tmp_path / "part.py"
    path.write_text("A = 1\n")
    assert catalog.constants(path) == {"A": 1}
    path.write_text("A = 22\n")
    path.touch()
    assert catalog.constants(path) == {"A": 22}


@pytest.mark.parametrize(
    ("content", "named"), [(b"x = (", "part.py line 1: "), (b"\0", "part.py"), (b"\xff", "part.py")]
)
def test_a_file_that_is_no_python_is_named_in_one_line(tmp_path, content, named):
    path = tmp_path / "part.py"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        catalog.constants(path)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.py: no such file"):
        catalog.constants(tmp_path / "nothing.py")
    with pytest.raises(ValueError, match=str(tmp_path)):
        catalog.constants(tmp_path)


def test_reducers_are_the_files_of_the_two_folders():
    files = [*catalog.PEERS.glob("[!_]*.py"), *catalog.TRAINED.glob("[!_]*.py")]
    assert sorted(catalog.reducers()) == sorted(path.stem for path in files)
    assert catalog.untrained()[:3] == ["full", "none", "random"]
    assert catalog.trained("pretrain") + catalog.trained("distill") == catalog.reducers()[-6:]
    assert set(catalog.trained()) == {*catalog.trained("pretrain"), *catalog.trained("distill")}


@pytest.mark.parametrize("name", catalog.reducers())
def test_a_trained_reducer_says_whose_weights_it_takes(name):
    folder = catalog.reducer_file(name).parent
    assert bool(catalog.reducer_traits(name).weights) == (folder == catalog.TRAINED)


@pytest.mark.parametrize(
    ("name", "traits"),
    [
        ("full", catalog.ReducerTraits(budget="all")),
        ("none", catalog.ReducerTraits(budget="nothing")),
        ("random", catalog.ReducerTraits(draws=True)),
        (
            "prumerge_adaptive",
            catalog.ReducerTraits(
                budget="own", one_tile=True, needs=("attention_BN", "keys_BND"), merges=True
            ),
        ),
        ("selector", catalog.ReducerTraits(weights="pretrain", needs=("grid",))),
        ("distilled", catalog.ReducerTraits(weights="distill", needs=("grid", "projected_BND"))),
        ("fastv", catalog.ReducerTraits(inside_llm=True)),
    ],
)
def test_traits_are_those_of_the_file(name, traits):
    assert catalog.reducer_traits(name) == traits


def test_a_reducer_of_the_users_own_has_traits(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/reducer.py").write_text("ONE_TILE = True\n")
    monkeypatch.chdir(tmp_path)
    assert catalog.reducer_file("mine/reducer") == Path("mine/reducer.py")
    assert catalog.reducer_traits("mine/reducer") == catalog.ReducerTraits(one_tile=True)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("BUDGET = 'half'", "BUDGET: 'half' is unknown, allowed: 'asked', 'all', 'nothing', 'own'"),
        ("DRAWS = 1", "DRAWS: 1 is unknown, allowed: False, True"),
        ("WEIGHTS = None", "WEIGHTS: None is unknown, allowed: '', 'pretrain', 'distill'"),
        ("MERGES = 1", "MERGES: 1 is unknown, allowed: False, True"),
        ("NEEDS = 'grid'", "NEEDS: 'grid' is not allowed, allowed: a tuple of names of fields"),
        (
            "NEEDS = ('grid', 'keys')",
            "NEEDS: 'keys' is unknown, allowed: 'attention_BN', 'encode', 'first_attention_BN', 'grid', "
            "'image_key_BX', 'keys_BND', 'pixels_BCHW', 'projected_BND', 'text_BD'",
        ),
    ],
)
def test_a_trait_that_is_not_allowed_is_named(tmp_path, monkeypatch, line, named):
    (tmp_path / "mine.py").write_text(line)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        catalog.reducer_traits("mine")
    assert str(caught.value) == f"mine.py: {named}"


def test_benchmarks_have_the_groups_of_their_files():
    groups = catalog.benchmarks()
    assert {name: catalog.benchmark_group(name) for name in groups} == groups
    assert len(groups) == 17 and set(groups.values()) == set(catalog.GROUPS)
    assert {"docs", "textvqa"} <= set(groups) and "runner" not in groups
    assert list(groups.values()) == sorted(groups.values(), key=catalog.GROUPS.index)


def test_a_benchmark_of_the_users_own_has_a_group(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("GROUP = 'general'\n")
    (tmp_path / "other.py").write_text("GROUP = 'video'\n")
    monkeypatch.chdir(tmp_path)
    assert catalog.benchmark_group("mine") == "general"
    with pytest.raises(
        ValueError, match=r"^other\.py: GROUP: 'video' is unknown, allowed: 'text', 'general'$"
    ):
        catalog.benchmark_group("other")
    with pytest.raises(ValueError, match=r"^nothing\.py: no such file$"):
        catalog.benchmark_group("nothing")
