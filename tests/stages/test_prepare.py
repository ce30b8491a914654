"""The prepare stage in a folder of its own: the micro world, and the paper's benchmarks in miniature."""

import hashlib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from atr import config
from atr.benchmarks import load_benchmark
from atr.core import catalog
from atr.datasets import PreparedImages, load_prompts, load_questions, load_text_centres
from atr.micro import world
from atr.stages import EVALUATE_IMAGES, PRETRAIN_IMAGES, prepare

ROOT = Path(__file__).parents[2]
PAPER = {name: catalog.benchmark_group(name) for name in catalog.benchmarks() if name not in world.DRAW}
OWN = """
from atr.benchmarks.base import DrawingModule, HubDataset
from atr.core.records import Example

GROUP = "general"
SOURCE = DrawingModule("my_drawings")


def examples(rows):
    for row in rows:
        yield Example(row["id"], row["question"].upper(), [row["answer"]], [row["image"]])


def score(prediction, question):
    return float(prediction == question.answers[0])
"""
DRAWINGS = """
from types import SimpleNamespace

from PIL import Image


def sample(benchmark, split, index, seed):
    mark = SimpleNamespace(x=4.0, y=2.0)
    image = Image.new("RGB", (8, 8), (index, seed, 0))
    return SimpleNamespace(image=image, turns=[("what?", str(index))], characters=[mark])
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the stage with changes to its parameters; gives questions, images and what was logged."""
    monkeypatch.chdir(tmp_path)
    logged = {}
    log = SimpleNamespace(metrics=logged.update, artifact=lambda *_: None)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(log))

    def run(**changes):
        tree = OmegaConf.load(ROOT / "params.yaml")
        tree.encoder, tree.vlm = "org/tower", "org/model"  # the micro model's folder is not here
        tree.prepare.update({"images": 4, "questions": 3} | changes)
        OmegaConf.save(tree, "params.yaml")
        prepare.main(config.load("prepare"))
        return load_questions(EVALUATE_IMAGES), PreparedImages(EVALUATE_IMAGES), dict(logged)

    return run


def test_the_micro_world(run):
    questions, images, logged = run()
    names = [f"{benchmark}/{n:06d}" for benchmark in world.DRAW for n in range(3)]
    assert images.ids == names == [question.images[0] for question in questions]
    for question in questions:
        sample = world.sample(question.benchmark, "evaluate", int(question.images[0][-6:]), 0)
        assert (question.question, question.answers) == (sample.turns[0][0], [sample.turns[0][1]])
        assert images.image(question.images[0]).tobytes() == sample.image.tobytes()
    assert PreparedImages(PRETRAIN_IMAGES).ids == [
        f"{benchmark}/{n:06d}" for n, benchmark in zip(range(4), world.DRAW, strict=False)
    ]
    assert logged == {"images/pretrain": 4, "questions": 18, "unreadable": 0}


def test_what_later_stages_ask_of_the_micro_world_is_stored(run):
    _, images, _ = run(split="validation")
    for name, prompts in load_prompts(PRETRAIN_IMAGES).items():
        benchmark, _, index = name.partition("/")
        turns = world.sample(benchmark, "pretrain", int(index), 0).turns
        assert prompts == [question for question, _ in turns]
    centres = load_text_centres(EVALUATE_IMAGES)
    assert list(centres) == images.ids and len(load_prompts(PRETRAIN_IMAGES)) == 4
    for name, found in centres.items():
        benchmark, _, index = name.partition("/")
        written = world.sample(benchmark, "validation", int(index), 0).characters
        assert found == [(mark.x / world.SIZE, mark.y / world.SIZE) for mark in written]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes the user's own benchmark with a change to its text, and what it draws with."""
    monkeypatch.syspath_prepend(tmp_path)
    load_benchmark.cache_clear()
    (tmp_path / "my_drawings.py").write_text(DRAWINGS)

    def write(before="", after=""):
        assert before in OWN
        (tmp_path / "my_benchmark.py").write_text(OWN.replace(before, after) if before else OWN)
        return {"benchmarks": ["docs"], "own": ["my_benchmark"]}

    yield write
    sys.modules.pop("my_drawings", None)
    load_benchmark.cache_clear()


def test_a_benchmark_of_the_users_own(run, own):
    questions, images, _ = run(**own())
    assert [question.benchmark for question in questions] == ["docs"] * 3 + ["my_benchmark"] * 3
    assert (questions[4].id, questions[4].group, questions[4].question, questions[4].answers) == (
        "my_benchmark/000001#0", "general", "WHAT?", ["1"],
    )  # fmt: skip
    assert images.image("my_benchmark/000002").getpixel((0, 0)) == (2, 0, 0)
    assert load_text_centres(EVALUATE_IMAGES)["my_benchmark/000002"] == [(0.5, 0.25)]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("yield Example", "yield tuple, ", r"examples\(\) gave \(.*, allowed: an Example"),
        ('row["question"]', 'row["text"]', r"examples\(\) raised KeyError: 'text'"),
        ('[row["image"]]', "['a.png']", "images of example '000000#0': 'a.png' is not allowed"),
        ("prediction ==", "'one' or", r"score\(\) of '0' raised ValueError: could not convert string"),
        ("float(prediction == question.answers[0])", "float('nan')", r"score\(\) of '0' is nan, allowed"),
        (
            "float(prediction == question.answers[0])",
            "2",
            r"score\(\) of '0' is 2, allowed: a number in 0..1",
        ),
        ('[row["answer"]]', "[7]", r"answers\[0\]: 7 is not allowed, allowed: str"),
    ],
)
def test_what_is_wrong_with_a_benchmark_of_the_users_own_stops_the_stage(run, own, before, after, message):
    with pytest.raises(ValueError, match=rf"my_benchmark.*{message}") as caught:
        run(**own(before, after))
    assert "\n" not in str(caught.value)
    assert not EVALUATE_IMAGES.exists()


def test_the_papers_ten_and_coco(run, hub, repository):
    questions, images, _ = run(
        benchmarks=list(PAPER), source="coco", repository=str(repository), questions=99
    )
    assert {question.benchmark: question.group for question in questions} == PAPER
    counts = {name: sum(question.benchmark == name for question in questions) for name in PAPER}
    assert counts == {name: len(hub.DATASETS[name][2]) for name in PAPER}
    stored = set(images.ids)
    assert {name for question in questions for name in question.images} == stored
    assert len(PreparedImages(PRETRAIN_IMAGES)) == 4
    assert images.parameters["commits"] == {}, "a folder has none"
    # Pages that questions share are stored once, and the picture is the dataset's.
    docvqa = [question for question in questions if question.benchmark == "docvqa"]
    assert [question.images for question in docvqa[:2]] == [docvqa[0].images] * 2 != docvqa[2].images
    assert docvqa[0].images == [f"docvqa/{hashlib.sha256(hub.png(10)).hexdigest()[:16]}"]
    assert images.image(docvqa[0].images[0]).size == (24, 18)
    several = {question.id: len(question.images) for question in questions if len(question.images) != 1}
    assert several == {"mmmu/validation_Art_1": 3}


def test_the_commits_of_what_the_hub_gave_are_recorded(run, repository, monkeypatch):
    def snapshot(dataset, local_files_only=False, **_):
        return str(repository / dataset / "555") if local_files_only else str(repository / dataset)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    _, images, _ = run(benchmarks=["docs", "gqa", "docvqa", "infovqa"], source="coco")
    assert images.parameters["commits"] == dict.fromkeys(["lmms-lab/GQA", "lmms-lab/DocVQA"], "555")
    assert PreparedImages(PRETRAIN_IMAGES).parameters["commits"] == {"detection-datasets/coco": "555"}


@pytest.mark.parametrize(
    "source, change, again",
    [
        ("coco", {"benchmarks": ["docs", "gqa"]}, "questions"),
        ("micro", {"benchmarks": ["docs", "signs"]}, "both"),
        ("coco", {"questions": 2}, "questions"),
        ("coco", {"images": 3}, "images"),
        ("coco", {"prompts": ["What is this?"]}, "images"),
    ],
)
def test_a_parameter_makes_anew_what_depends_on_it_alone(run, repository, source, change, again):
    def manifests():
        return [(folder / "manifest.json").read_bytes() for folder in (PRETRAIN_IMAGES, EVALUATE_IMAGES)]

    where = {"source": source, "repository": str(repository), "images": 4}
    run(**where, benchmarks=["docs"])
    before = manifests()
    run(**{**where, "benchmarks": ["docs"], **change})
    changed = [one != other for one, other in zip(before, manifests(), strict=True)]
    assert changed == [again != "questions", again != "images"]


def test_a_sample_of_the_questions_is_seeded(run, repository):
    benchmarks = ["gqa", "mmbench", "docs"]
    first, _, _ = run(benchmarks=benchmarks, repository=str(repository), questions=2)
    assert [question.benchmark for question in first].count("mmbench") == 2 * 3  # with their rotations
    assert [question.benchmark for question in first].count("gqa") == 2
    again, _, _ = run(benchmarks=benchmarks, repository=str(repository), questions=2)
    assert first == again


def test_unreadable_images_are_told_and_counted(run, hub, tmp_path, capsys):
    rows = [dict(row) for row in hub.DATASETS["chartqa"][2]]
    rows[1]["image"] = {"bytes": hub.png(31)[:200], "path": None}
    rows[2]["image"] = None
    hub.write(tmp_path / "data", "chartqa", rows, files=1)
    questions, images, logged = run(benchmarks=["chartqa"], repository=str(tmp_path / "data"))
    assert [bool(question.unreadable) for question in questions] == [False, True, True]
    assert len(images) == 1 and logged["unreadable"] == 2
    told = capsys.readouterr().err
    assert "chartqa/000001 will not be asked: test-00000-of-00001.parquet row 1 column image cannot" in told
    assert "chartqa/000002 will not be asked: test-00000-of-00001.parquet row 2 column image holds no" in told


def test_a_benchmark_without_a_readable_image_leaves_the_former_questions(run, hub, tmp_path):
    former, _, _ = run(benchmarks=["docs"])
    rows = [row | {"image": None} for row in hub.DATASETS["chartqa"][2]]
    hub.write(tmp_path / "data", "chartqa", rows)
    with pytest.raises(ValueError, match="chartqa: no image can be read"):
        run(benchmarks=["docs", "chartqa"], repository=str(tmp_path / "data"))
    assert load_questions(EVALUATE_IMAGES) == former


@pytest.mark.parametrize("changes", [{"benchmarks": ["docs", "mmstar"]}, {"source": "coco"}])
def test_a_dataset_that_is_not_there_stops_before_anything_is_drawn(run, tmp_path, changes):
    with pytest.raises(ValueError, match=r"mmstar.parquet: no such|train-\*.parquet: no such"):
        run(**changes, repository=str(tmp_path))
    assert not Path("data").exists()
