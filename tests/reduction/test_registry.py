"""Reducers are built by name from one file, and what is wrong with a user's file is one line."""

import re
import subprocess
import sys
from textwrap import dedent

import pytest
import torch

from atr.core import catalog
from atr.reduction import EncoderOutput, FeatureSelector, Merger
from atr.reduction.layer_schedule import LayerReducer
from atr.reduction.peers.random import Random
from atr.reduction.registry import OPTIONAL_FIELDS, build_reducer, built_in_names

REDUCER = """
class {name}:
    needs = frozenset()
    def __call__(self, encoded, budget):
        return torch.arange(budget).repeat(len(encoded.features_BND), 1)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module of the user's project, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(name, *parts):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("import torch\n" + "\n".join(map(dedent, parts)))
        return name

    return write


@pytest.fixture(scope="module")
def selector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selector")
    FeatureSelector(width=4, grid=(2, 2), layers=1, heads=1).save_pretrained(folder)
    return folder


def test_names_are_those_of_the_files():
    assert {"random", "tome", "fastv", "selector", "distilled"} <= set(built_in_names())
    assert len(set(built_in_names())) == len(built_in_names()) == 31


@pytest.mark.parametrize("name", built_in_names())
def test_a_built_in_reducer_is_built_by_its_name(name, selector):
    weights = catalog.reducer_traits(name).weights
    reducer = build_reducer(name, 0, selector if weights else None)
    assert reducer.needs <= OPTIONAL_FIELDS
    assert isinstance(reducer, LayerReducer) == (name in ("fastv", "pyramiddrop"))


@pytest.mark.parametrize("name", built_in_names())
def test_the_constants_of_a_file_say_what_its_reducer_is(name, selector):
    traits = catalog.reducer_traits(name)
    reducer = build_reducer(name, 0, selector if traits.weights else None)
    assert reducer.needs == set(traits.needs) and list(traits.needs) == sorted(traits.needs)
    assert isinstance(reducer, Merger) == traits.merges
    assert isinstance(reducer, LayerReducer) == traits.inside_llm
    assert traits.one_tile or not traits.merges, "merged tokens of several tiles have no place"


def test_the_fields_that_a_file_may_name_are_those_of_the_encoders_output(write):
    name = write("own_fields", f"NEEDS = {tuple(sorted(OPTIONAL_FIELDS))!r}", REDUCER.format(name="Mine"))
    assert set(catalog.reducer_traits(name).needs) == OPTIONAL_FIELDS


def test_random_is_built_from_the_seed():
    assert build_reducer("random", 3) == Random(3) != build_reducer("random")


def test_a_trained_reducer_without_a_selector_is_refused():
    with pytest.raises(
        ValueError, match=r"^reducer distilled: it is built from a trained selector, and none"
    ):
        build_reducer("distilled")


def test_building_one_reducer_imports_no_other():
    code = (
        "import sys; from atr.reduction.registry import build_reducer; build_reducer('tome'); "
        "print(*sorted(m for m in sys.modules if m.startswith(('atr.reduction.peers.', "
        "'atr.reduction.trained.'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["atr.reduction.peers.tome"]


def test_the_one_class_of_a_users_file_is_its_reducer(write):
    name = write("own_a/one", "from atr.reduction.base import EncoderOutput", REDUCER.format(name="Mine"))
    reducer = build_reducer(name, 5)
    assert type(reducer).__name__ == "Mine" and reducer.needs == frozenset()
    assert reducer(EncoderOutput(torch.zeros(2, 4, 3), None), 2).tolist() == [[0, 1]] * 2


def test_build_decides_where_there_are_several_classes(write):
    build = "def build(seed=0):\n    return Two(seed)\n"
    two = REDUCER.format(name="Two").replace(
        "__call__", "__init__(self, seed): self.seed = seed\n    def __call__"
    )
    reducer = build_reducer(write("own_b", REDUCER.format(name="One"), two, build), 7)
    assert type(reducer).__name__ == "Two" and reducer.seed == 7


def test_a_users_class_that_draws_is_built_from_the_seed(write):
    code = REDUCER.format(name="Drawn").replace(
        "needs =", "def __init__(self, seed): self.seed = seed\n    needs ="
    )
    assert build_reducer(write("own_c", "DRAWS = True", code), 9).seed == 9


def test_a_users_reducer_may_be_made_of_a_selector(write, selector):
    imported = "from atr.reduction import SelectorReducer"
    build = "def build(selector):\n    return SelectorReducer(selector)"
    name = write("own_d", 'WEIGHTS = "pretrain"', imported, build)
    reducer = build_reducer(name, 0, selector)
    assert reducer.selector.grid == (2, 2) and reducer.needs == {"grid"}


def test_a_users_module_may_import_its_neighbours(write):
    write("own_e/helper", "WORD = 'helped'")
    code = REDUCER.format(name="Mine").replace("needs =", "word = WORD\n    needs =")
    assert build_reducer(write("own_e/main", "from own_e.helper import WORD", code)).word == "helped"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", r"it has 0 reducers \(none\), allowed: a function build\(seed=0\), or one class with `needs`"),
        (REDUCER.format(name="A") + REDUCER.format(name="B"), r"it has 2 reducers \(A, B\), allowed: "),
        ("import no_such_module", "it cannot be imported: ModuleNotFoundError: No module named 'no_such"),
        ("def build(seed=0):\n    return 5", "build returns a int, which is no reducer"),
        ("def build(seed=0):\n    raise KeyError('x')", "build raised KeyError: 'x'"),
        ("def build():\n    return 5", "build raised TypeError: build() takes 0 positional arguments"),
        (
            REDUCER.format(name="A").replace("frozenset()", "frozenset({'attention'})"),
            "needs: 'attention' is unknown, allowed: attention_BN, ",
        ),
        (
            REDUCER.format(name="A").replace("frozenset()", "['grid']"),
            "A returns a A, which",
        ),
        ("1 +", r"it cannot be imported: SyntaxError: "),
    ],
)
def test_what_is_wrong_with_a_users_file_is_one_line_that_names_it(write, code, message, request):
    name = write(f"own_wrong_{request.node.callspec.indices['code']}", code)
    with pytest.raises(ValueError, match=rf"^{name}\.py: ") as caught:
        build_reducer(name)
    text = str(caught.value)
    assert "\n" not in text and re.search(message.replace("build()", r"build\(\)"), text), text


def test_a_file_that_there_is_not_is_named(write):
    with pytest.raises(
        ValueError, match=r"^reducer 'own/missing': there is no file own/missing\.py, allowed: "
    ):
        build_reducer("own/missing")


def test_a_path_that_cannot_be_imported_is_refused(write):
    with pytest.raises(ValueError, match=r"^own-name\.py: this path cannot be imported, allowed: letters"):
        build_reducer(write("own-name", REDUCER.format(name="A")))


def test_a_name_that_another_module_has_is_refused(write):
    with pytest.raises(ValueError, match=r"^json\.py: another module has the name json, .*: rename the file"):
        build_reducer(write("json", REDUCER.format(name="A")))
