import pytest

from atr import config

REDUCER = 'BUDGET = "asked"\n\n\ndef build(seed=0): ...\n'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a reducer and a benchmark of its own, and its parameter file."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/reducer.py").write_text(REDUCER)
    (tmp_path / "mine/benchmark.py").write_text('GROUP = "text"\n')
    (tmp_path / "random.py").write_text(REDUCER)
    (tmp_path / "prefill.py").write_text(REDUCER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_own_reducers_and_benchmarks_are_among_all(project, write):
    evaluate = config.load("report", write(evaluate__own=["mine/reducer"])).evaluate
    assert evaluate.own == ["mine/reducer"]
    assert "mine/reducer" in evaluate.names and "mine/reducer" in evaluate.budgeted
    assert config.load("report", write(evaluate__own=["mine/reducer"], report__best="mine/reducer"))
    prepare = config.load("prepare", write(prepare__own=["mine/benchmark"], prepare__benchmarks=[])).prepare
    assert prepare.names == ["mine/benchmark"]


@pytest.mark.parametrize(
    "name", ["my_package.my_module:MyReducer", "my_package/my_module", "my_package.my_module"]
)
@pytest.mark.parametrize(
    ("key", "own"), [("evaluate.reducers", "evaluate.own"), ("prepare.benchmarks", "prepare.own")]
)
def test_an_own_class_among_the_names_says_what_to_write(project, write, message, key, own, name):
    text = message(write(**{key.replace(".", "__"): ["full", name] if "reducers" in key else [name]}))
    assert (
        text == f"{key}: {name!r} is unknown, allowed: {own}: [my_package/my_module] for a file of your own"
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/mine/reducer",
        "mine/../mine/reducer",
        "./mine/reducer",
        "mine/reducer.py",
        "mine.reducer:Reducer",
        "mine//reducer",
        "mine/reducer/",
        "-mine",
        "mine/reducer; ls",
        "mine/réducer",
        "mine/reducer\n",
        "a" * 300,
    ],
)
@pytest.mark.parametrize("key", ["evaluate.own", "prepare.own"])
def test_what_is_no_plain_path_is_refused(project, write, message, key, name):
    text = message(write(**{key.replace(".", "__"): [name]}))
    assert text.startswith(f"{key}: ") and "allowed: a path in the project without .py" in text


def test_a_file_that_is_missing_or_outside_is_refused(project, write, message, tmp_path_factory):
    assert "there is no file mine/nothing.py" in message(write(evaluate__own=["mine/nothing"]))
    outside = tmp_path_factory.mktemp("outside") / "reducer.py"
    outside.write_text(REDUCER)
    (project / "mine/link.py").symlink_to(outside)
    assert "mine/link.py links to a file outside" in message(write(evaluate__own=["mine/link"]))


def test_names_are_taken_once(project, write, message):
    twice = message(write(evaluate__own=["mine/reducer", "mine/reducer"]))
    assert twice.endswith("is out of range, allowed: each path once")
    assert message(write(evaluate__own=["random"])).startswith("evaluate.own: 'random' is taken, allowed: ")
    # The folder experiments/latency/prefill is that of a stage.
    assert message(write(evaluate__own=["prefill"])).startswith("evaluate.own: 'prefill' is taken, ")


@pytest.mark.parametrize(
    ("key", "content", "named"),
    [
        (
            "evaluate.own",
            "def (:",
            "is not a reducer: mine/new.py line 1: invalid syntax, allowed: a Python file",
        ),
        (
            "evaluate.own",
            "BUDGET = 3",
            "is not a reducer: mine/new.py: BUDGET: 3 is unknown, allowed: 'asked', ",
        ),
        (
            "evaluate.own",
            'WEIGHTS = "pretrain"',
            "allowed: a reducer without WEIGHTS; mine/new.py has 'pretrain'",
        ),
        ("evaluate.own", "\0", "is not a reducer: mine/new.py"),
        (
            "prepare.own",
            "",
            "is not a benchmark: mine/new.py: GROUP: None is unknown, allowed: a Python file with",
        ),
        (
            "prepare.own",
            "1 +",
            "is not a benchmark: mine/new.py line 1: invalid syntax, allowed: a Python file with",
        ),
    ],
)
def test_a_file_that_is_no_part_is_refused_in_one_line(project, write, message, key, content, named):
    (project / "mine/new.py").write_text(content)
    text = message(write(**{key.replace(".", "__"): ["mine/new"]}))
    assert text.startswith(f"{key}: 'mine/new' ") and named in text


def test_an_own_reducer_of_one_tile_is_refused_where_the_model_cuts_images(project, write, message):
    (project / "mine/reducer.py").write_text("ONE_TILE = True\n" + REDUCER)
    one_head = {"pretrain__heads": 1, "distill__heads": 1, "encoder": "clip-vit-large-patch14-336"}
    assert "cuts images into tiles" in message(write(evaluate__own=["mine/reducer"], **one_head))
