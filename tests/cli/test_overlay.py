import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from atr import config
from atr.cli import overlay, plan
from atr.config.stages import PIPELINE

ROOT = Path(__file__).parents[2]
SHIPPED = (ROOT / "params.yaml").read_text()
QWEN = {"qwen2.5-vl": (28, 3584), "qwen3-vl": (32, 4096)}
"""Side of a token in pixels, and its channels."""
EXPERIMENTS = {path.stem: path for path in sorted((ROOT / "experiments").glob("*.yaml"))}


@pytest.fixture
def params(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED)
    return path


def laid(folder, text):
    path = folder / "overlay.yaml"
    path.write_text(text)
    return path


def comments(text):
    return re.findall(r"#.*", text)


def keys(text):
    return re.findall(r"^ *\w+:", text, flags=re.MULTILINE)


def test_the_papers_two_experiments_and_those_of_qwen_are_shipped():
    assert set(EXPERIMENTS) == {"llava-next", "llava-onevision", *QWEN}
    tracked = subprocess.run(
        ["git", "check-ignore", *EXPERIMENTS.values()], cwd=ROOT, capture_output=True, text=True
    )
    assert tracked.stdout == ""


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_states_every_parameter_of_its_stages(name):
    tree = config.read(EXPERIMENTS[name])
    assert list(tree) == list(PIPELINE.keys)
    for section, kind in PIPELINE.sections.items():
        assert list(tree[section]) == [key.name for key in fields(kind)]


@pytest.mark.parametrize("name", QWEN)
def test_an_experiment_with_qwen_holds_what_idpruners_table_has(params, name):
    side, width = QWEN[name]
    overlay.apply(EXPERIMENTS[name], path=params)
    evaluate = config.load("report", params).evaluate
    assert evaluate.keep == [0.1, 0.25]
    assert set(config.load("prepare", params).prepare.benchmarks) == set(plan.BENCHMARK_QUESTIONS)
    assert {"full", "divprune", "selector_mmr"} <= set(evaluate.names)
    models = config.load("models", params)
    assert models.encoder.path == models.vlm.path and models.vlm.encoder == models.encoder.name
    costs = plan.load_plan(params)
    assert costs.features.width == width and costs.resolution.side == side
    assert costs.resolution.least <= 640 * 480 <= costs.resolution.most, "photographs of COCO as they are"
    for recipe in (costs.pretrain, costs.distill):
        assert 0.02 < costs.selection_share(recipe, costs.largest.tokens) < plan.WORTH
    assert recipe.heads * 128 == width


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_valid_and_reaches_the_stages_as_written(params, name):
    changes = overlay.apply(EXPERIMENTS[name], path=params)
    assert config.read(params) | config.read(EXPERIMENTS[name]) == config.read(params)
    assert config.load("prepare", params).prepare.images == 100_000
    before = config.flat(ROOT / "params.yaml")
    assert changes == {
        key: (before[key], value) for key, value in config.flat(params).items() if value != before[key]
    }


@pytest.mark.parametrize(
    ("name", "encoder", "width", "keep"),
    [
        ("llava-next", "openai/clip-vit-large-patch14-336", 1024, 9),
        ("llava-onevision", "google/siglip-so400m-patch14-384", 1152, 6),
    ],
)
def test_an_experiment_holds_what_the_paper_states(params, name, encoder, width, keep):
    overlay.apply(EXPERIMENTS[name], path=params)
    trained = config.load("pretrain", params)
    evaluate = config.load("report", params).evaluate
    assert trained.encoder.path.partition("@")[0] == encoder
    assert (trained.pretrain.layers, trained.pretrain.heads * 64) == (3, width)
    assert (trained.pretrain.learning_rate, trained.pretrain.batch_size) == (3e-4, 32)
    assert trained.pretrain.warmup == 0.05
    assert evaluate.keep == [round(0.1 * tenths, 1) for tenths in range(1, keep + 1)]
    assert set(evaluate.reducers) == {"full", "none", "random"}
    assert set(config.load("prepare", params).prepare.benchmarks) == set(plan.BENCHMARK_QUESTIONS) - {
        "ocrbench"
    }


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_comments_order_and_every_other_line_stay(params, name):
    changes = overlay.apply(EXPERIMENTS[name], path=params)
    text = params.read_text()
    assert comments(text) == comments(SHIPPED)
    assert keys(text) == keys(SHIPPED)
    pairs = list(zip(SHIPPED.splitlines(), text.splitlines(), strict=True))
    assert sum(old != new for old, new in pairs) == len(changes) > 10
    assert all(re.search(r"\S  #|^#|^[^#]*$", new) for _, new in pairs), "two spaces before a comment"


def test_an_experiment_laid_twice_changes_nothing_the_second_time(params):
    overlay.apply(EXPERIMENTS["llava-next"], path=params)
    text = params.read_text()
    assert overlay.apply(EXPERIMENTS["llava-next"], path=params) == {}
    assert params.read_text() == text


def test_a_setting_wins_over_the_file_and_has_the_type_it_has_in_yaml(params):
    settings = ["trainer.devices=8", "trainer.strategy=ddp", "pretrain.learning_rate=1e-4", "seed=3"]
    settings += ["evaluate.keep=[0.25,0.5]", "extract.layer=null"]
    overlay.apply(EXPERIMENTS["llava-next"], settings, params)
    flat = config.flat(params)
    assert (flat["trainer.devices"], flat["trainer.strategy"]) == (8, "ddp")
    assert (flat["pretrain.learning_rate"], flat["seed"]) == (1e-4, 3)
    assert (flat["evaluate.keep"], flat["extract.layer"]) == ([0.25, 0.5], None)
    assert "  layer: null  # " in params.read_text()


@pytest.mark.parametrize(
    ("text", "settings", "named"),
    [
        ("pretrain: {lr: 1e-4}", [], "pretrain.lr: 0.0001 is an unknown key"),
        ("pretrian: {keep: 0.4}", [], "pretrian: "),
        ("pretrain: {keep: 1.5}", [], "pretrain.keep: 1.5 is out of range"),
        ("pretrain: {epochs: many}", [], "pretrain.epochs: 'many' has a wrong type"),
        ("pretrain: {epochs: '${seed}'}", [], "pretrain.epochs: '${seed}' is not a value"),
        ("trainer: 8", [], "trainer: 8 is not a section"),
        ("seed: {value: 1}", [], "seed: {'value': 1} has a wrong type"),
        ("encoder: no-such-tower", [], "encoder: 'no-such-tower' is unknown"),
        ("- pretrain", [], "overlay.yaml: "),
        ("pretrain: [", [], "overlay.yaml: "),
        ("seed: 1", ["trainer.device=8"], "trainer.device: 8 is an unknown key"),
        ("seed: 1", ["trainer.devices"], "--set: 'trainer.devices' is not allowed, allowed: section.key="),
        (
            "seed: 1",
            ["Trainer.devices=2"],
            "--set: 'Trainer.devices=2' is not allowed, allowed: ",
        ),
        ("seed: 1", ["trainer.devices=[8"], "--set: "),
        ("seed: 010", [], "seed: 10 in YAML 1.2, which DVC reads, is 8 in YAML 1.1"),
        ("evaluate: {newline: yes}", [], "evaluate.newline: 'yes' in YAML 1.2"),
        ("seed: 1", ["pretrain.epochs=010"], "pretrain.epochs: 10 in YAML 1.2"),
        ("seed: 1", ["evaluate.keep=[.5,1:30]"], "evaluate.keep: '1:30' in YAML 1.2"),
        ("report: {best: divprune}", [], "report.best: 'divprune' is out of range, allowed: random, "),
        ("seed: 1", ["evaluate.reducers=[none]"], "evaluate.reducers: ['none'] is out of range"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(params, tmp_path, text, settings, named):
    path = laid(tmp_path, text)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(config.ConfigError) as caught:
        overlay.apply(path, ["report.pages=2", *settings], params)
    assert named in str(caught.value) and "allowed: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert params.read_text() == SHIPPED
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_overlay_is_named(params):
    with pytest.raises(config.ConfigError, match=r"nowhere\.yaml: no such file"):
        overlay.apply("nowhere.yaml", path=params)


def test_a_file_that_cannot_be_replaced_stays_whole(params, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"params\.yaml could not be written"):
        overlay.apply(laid(tmp_path, "seed: 1"), path=params)
    assert params.read_text() == SHIPPED
    assert not list(tmp_path.glob("*.part"))


def test_a_list_in_block_style_keeps_its_style_and_the_comment_behind_it(params, tmp_path):
    block = "  keep:  # kept\n  - 0.1\n  - 0.9  # last\n  # seeds\n"
    params.write_text(re.sub(r"  keep: \[.*\]\n", block, SHIPPED))
    overlay.apply(laid(tmp_path, "evaluate: {keep: [0.2, 0.3, 0.4]}"), path=params)
    text = params.read_text()
    assert config.flat(params)["evaluate.keep"] == [0.2, 0.3, 0.4]
    assert "  keep:  # kept\n  - 0.2\n  - 0.3\n  - 0.4" in text
    assert comments(text) == comments(re.sub(r"  keep: \[.*\]\n", block, SHIPPED))


@pytest.mark.parametrize("word", ["off", "1e3", "null", "a: b", "010", "08", "1:30", "yes", "2024-01-01"])
def test_a_word_that_yaml_takes_for_something_else_stays_a_word(params, tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    Path(word).mkdir()
    OmegaConf.save({"prepare": {"source": word}}, "overlay.yaml")
    overlay.apply("overlay.yaml", path=params)
    assert config.load("prepare", params).prepare.source == word


@pytest.mark.slow
def test_dvc_runs_what_the_new_values_concern(warm_dvc, params, tmp_path):
    """`dvc exp run`, with a value of its own on top, in a repository whose stages copy the parameters."""
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  pretrain:\n    cmd: cp params.yaml pretrained.yaml\n    params: [encoder, pretrain]\n"
        "    outs: [pretrained.yaml]\n"
        "  report:\n    cmd: cp params.yaml reported.yaml\n    params: [report.pages]\n"
        "    outs: [reported.yaml]\n"
    )

    def call(*command):
        if command[0] == "dvc":
            done = warm_dvc.run("-m", *command, cwd=tmp_path, env=environment)
        else:
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "1"}
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "atr", f"GIT_{who}_EMAIL": "atr@localhost"}
    call("git", "init", "-q")
    call("dvc", "init", "-q")
    call("dvc", "repro", "-q")
    call("git", "add", "--all")
    call("git", "commit", "-qm", "before")
    overlay.apply(EXPERIMENTS["llava-next"], path=params)
    assert "pretrain.heads" in call("dvc", "params", "diff")
    output = call("dvc", "exp", "run", "-S", "pretrain.epochs=3")
    assert "Running stage 'pretrain'" in output and "Running stage 'report'" not in output
    seen = config.flat(tmp_path / "pretrained.yaml")
    assert (seen["pretrain.heads"], seen["pretrain.epochs"]) == (16, 3)
    assert seen["encoder"] == "clip-vit-large-patch14-336"
