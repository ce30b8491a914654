"""The prepare stage in a folder of its own: the micro world, and the paper's benchmarks in miniature."""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from atr import config
from atr.datasets import PreparedImages, load_questions
from atr.micro import world
from atr.stages import EVALUATE_IMAGES, PRETRAIN_IMAGES, prepare

ROOT = Path(__file__).parents[2]


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
    names = [f"{benchmark}/{n:06d}" for benchmark in config.BENCHMARKS for n in range(3)]
    assert images.ids == names == [question.images[0] for question in questions]
    for question in questions:
        sample = world.sample(question.benchmark, "evaluate", int(question.images[0][-6:]), 0)
        assert (question.question, question.answers) == (sample.turns[0][0], [sample.turns[0][1]])
        assert images.image(question.images[0]).tobytes() == sample.image.tobytes()
    assert PreparedImages(PRETRAIN_IMAGES).ids == [
        f"{benchmark}/{n:06d}" for n, benchmark in zip(range(4), config.BENCHMARKS, strict=False)
    ]
    assert logged == {"images/pretrain": 4, "questions": 18, "unreadable": 0}


def test_the_papers_ten_and_coco(run, hub, repository):
    questions, images, _ = run(
        benchmarks=list(config.PAPER_BENCHMARKS), source="coco", repository=str(repository), questions=99
    )
    assert {question.benchmark: question.group for question in questions} == config.PAPER_BENCHMARKS
    counts = {
        name: sum(question.benchmark == name for question in questions) for name in config.PAPER_BENCHMARKS
    }
    assert counts == {name: len(hub.DATASETS[name][2]) for name in config.PAPER_BENCHMARKS}
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
    assert images.parameters["commits"] == dict.fromkeys(
        ["detection-datasets/coco", "lmms-lab/GQA", "lmms-lab/DocVQA"], "555"
    )
    assert PreparedImages(PRETRAIN_IMAGES).parameters == images.parameters


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
