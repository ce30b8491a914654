import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from atr.reporting import result_files

PAPER = ("full", "none", "random", "selector")


def scores_without(change, folder, unwanted):
    def without(content):
        content["scores"] = [entry for entry in content["scores"] if not unwanted(entry)]

    change(folder / "summary.json", without)


def test_results_of_a_reducer_that_is_not_named_are_ignored(world, load, synthetic, change):
    synthetic.write(world, reducers=("divprune", "dart", "selector_adaptive"))
    change(world / "evaluate/divprune/summary.json", lambda content: content.update(vlm="another"))
    (world / "evaluate/dart/summary.json").unlink()
    assert set(load(world).evaluations) == set(PAPER)


@pytest.mark.parametrize("name", result_files.REQUIRED)
def test_a_required_reducer_must_be_evaluated_even_if_its_results_exist(world, load, name):
    others = [other for other in PAPER if other != name]
    with pytest.raises(ValueError, match=f"evaluate.reducers: the report needs {name} among them"):
        load(world, others)


def test_an_adaptive_count_of_no_tokens_keeps_all_and_never_more_than_all(tmp_path, synthetic, load, change):
    names = ("full", "none", "random", "selector", "selector_adaptive")
    world = synthetic.write(tmp_path, 10, names)
    path = world / "evaluate/selector_adaptive/summary.json"

    def counted(**counts):
        change(path, lambda content: content["scores"][0].update(counts))

    counted(tokens=0, tokens_fed=0, tokens_full=0)
    assert load(world, names).benchmarks[0].adaptive["selector_adaptive"].keep == 1.0
    counted(tokens=9)
    with pytest.raises(ValueError, match=r"tokens: 9 is not allowed, allowed: 0 to tokens_full, 0, without"):
        load(world, names)


def test_the_bootstrap_of_the_summaries_is_known(world, load, change):
    loaded = load(world).evaluations["random"]
    assert (loaded.resamples, loaded.seed) == (200, 0)
    path = world / "evaluate/random/summary.json"
    change(path, lambda content: content["parameters"]["evaluate"].pop("bootstrap"))
    with pytest.raises(ValueError, match=r"random/summary.json: .*evaluate: bootstrap is missing"):
        load(world)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("evaluate/full/summary.json", "evaluate (reducer full)"),
        ("evaluate/none/results.jsonl", "evaluate (reducer none)"),
        ("evaluate/random/masks.json", "evaluate (reducer random)"),
        ("evaluate/selector/summary.json", "evaluate (reducer selector)"),
        ("pretrain/metrics.json", "pretrain"),
    ],
)
def test_a_missing_file_is_named_with_the_stage_that_makes_it(world, load, file, stage):
    (world / file).unlink()
    with pytest.raises(ValueError, match=re.escape(f"{world / file} is missing; stage {stage}")):
        load(world)


def test_a_whole_missing_reducer_is_named(world, load):
    with pytest.raises(ValueError, match=r"other/summary.json is missing; stage evaluate \(reducer other\)"):
        load(world, [*PAPER, "other"])
    shutil.rmtree(world / "evaluate")
    with pytest.raises(ValueError, match=r"full/summary.json is missing"):
        load(world)


def test_a_broken_row_is_named_by_its_line(world, load):
    path = world / "evaluate/selector/results.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:4], lines[4][:30]]))
    with pytest.raises(ValueError, match=f"{path} line 5 is not valid JSON: "):
        load(world)


def test_a_key_that_is_not_there_is_named(world, load, change):
    change(world / "evaluate/selector/summary.json", lambda content: content["scores"][3].pop("low"))
    with pytest.raises(ValueError, match=r"selector/summary.json: scores\[3\]: low is missing"):
        load(world)


def test_a_line_separator_inside_a_question_breaks_no_row(world, load):
    for path in world.glob("evaluate/*/results.jsonl"):
        path.write_text(path.read_text().replace("value of", "value\u2028of"))
    assert load(world).evaluations["full"].rows[0].question.startswith("value\u2028of")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: lines.pop(),
        lambda lines: [column.pop() for column in lines[7].values() if len(column) == 27],
        lambda lines: lines[7].update(question="something else?"),
        lambda lines: lines[7].update(answers=["another"]),
        lambda lines: lines[7].update(images=[]),
        lambda lines: lines[7].update(id="docs/999999#0"),
    ],
)
def test_reducers_that_were_asked_different_questions_are_refused(world, load, synthetic, spoil):
    path = world / "evaluate/random/results.jsonl"
    lines = synthetic.read_lines(path)
    spoil(lines)
    synthetic.write_lines(path, lines)
    with pytest.raises(ValueError, match="reducers full and random answered different questions"):
        load(world)


@pytest.mark.parametrize(("key", "value"), [("vlm", "llava"), ("encoder", "clip"), ("tokens_full", 576)])
def test_results_of_another_model_are_refused(world, load, change, key, value):
    change(world / "evaluate/none/summary.json", lambda content: content.update({key: value}))
    with pytest.raises(ValueError, match=f"reducers full and none differ in {key}, .*{value}"):
        load(world)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("evaluate", "positions", "contiguous"),
        ("evaluate", "budget", "tile"),
        ("evaluate", "newline", "follow"),
        ("evaluate", "interpolation", "off"),
        ("evaluate", "interpolation", None),
        ("evaluate", "max_new_tokens", 32),
    ],
)
def test_results_of_other_settings_are_refused_by_the_settings_name(world, load, change, section, key, value):
    def changed(content):
        content["parameters"][section][key] = value
        content["tokens_full"] += 1

    change(world / "evaluate/random/summary.json", changed)
    with pytest.raises(ValueError, match=f"reducers full and random differ in {section}.{key}, .*{value!r}"):
        load(world)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("precision", "bf16-mixed"),
        ("attention", "eager"),
        ("vlm.digest", "another"),
        ("vlm.commit", "1" * 40),
        ("features.precision", "bf16-mixed"),
        ("features.device", "cuda"),
    ],
)
def test_results_that_were_computed_otherwise_are_refused_by_name(world, load, change, key, value):
    def changed(content):
        *outer, last = key.split(".")
        place = content["resolved"]
        for name in outer:
            place = place[name]
        place[last] = value

    change(world / "evaluate/random/summary.json", changed)
    with pytest.raises(ValueError, match=f"reducers full and random differ in resolved.{key}.*; run stage"):
        load(world)


def test_a_key_that_the_first_of_two_results_lacks_is_compared_too(world, load, change):
    path = world / "evaluate/full/summary.json"
    change(path, lambda content: content["resolved"]["vlm"].pop("digest"))
    with pytest.raises(ValueError, match=r"differ in resolved.vlm.digest, None and '"):
        load(world)


@pytest.mark.parametrize("name", ["full", "random"])
def test_answers_from_images_and_from_stored_features_are_not_compared(world, load, change, name):
    change(world / f"evaluate/{name}/summary.json", lambda content: content["resolved"].update(features=None))
    read = {"full": "'images' and 'stored features'", "random": "'stored features' and 'images'"}[name]
    with pytest.raises(ValueError, match=f"reducers full and .* differ in what was read, {read}; run"):
        load(world)


def test_an_auto_precision_compares_with_the_same_one_by_name(world, load, change):
    path = world / "evaluate/random/summary.json"
    change(path, lambda content: content["parameters"]["trainer"].update(precision="auto"))
    assert set(load(world).evaluations) == set(PAPER)


def test_results_of_several_machines_are_comparable_in_one_precision(world, load, change):
    path = world / "evaluate/random/summary.json"
    change(path, lambda content: content["resolved"].update(device="cuda", processor="NVIDIA H200"))
    assert load(world).evaluations["random"].resolved["processor"] == "NVIDIA H200"


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("evaluate/selector/summary.json", r"evaluate \(reducer selector\)"),
        ("pretrain/metrics.json", "pretrain"),
    ],
)
def test_results_without_resolved_name_the_stage_to_run(world, load, change, file, stage):
    change(world / file, lambda content: content.pop("resolved"))
    with pytest.raises(ValueError, match=f"{file}: resolved is missing, .*; stage {stage} writes it"):
        load(world)


@pytest.mark.parametrize("key", ["precision", "device", "processor", "attention", "features"])
def test_a_missing_key_of_resolved_is_named(world, load, change, key):
    change(world / "evaluate/selector/summary.json", lambda content: content["resolved"].pop(key))
    with pytest.raises(ValueError, match=rf"summary.json: resolved: {key} is missing, .*; stage evaluate"):
        load(world)


def test_results_that_are_older_than_a_setting_are_comparable_with_each_other_alone(world, load, change):
    for name in PAPER:
        change(
            world / f"evaluate/{name}/summary.json",
            lambda content: content["parameters"]["evaluate"].pop("newline"),
        )
        if name != PAPER[-1]:
            with pytest.raises(ValueError, match=r"differ in evaluate.newline, None and 'keep'"):
                load(world)
    assert set(load(world).evaluations) == set(PAPER)


def test_visual_tokens_compare_over_the_same_questions_only(world, load, change, synthetic):
    path = world / "evaluate/none/results.jsonl"
    first, *others = synthetic.read_lines(path)
    synthetic.write_lines(path, [first | {"score": [None]}, *others])
    change(world / "evaluate/none/summary.json", lambda content: content.update(tokens_full=143.5))
    assert load(world).evaluations["none"].tokens_full == 143.5


def test_a_benchmark_that_one_reducer_lacks_is_named(world, load, change):
    scores_without(change, world / "evaluate/selector", lambda entry: entry.get("benchmark") == "signs")
    with pytest.raises(ValueError, match="differ in the benchmarks with scores: signs"):
        load(world)


def test_selector_and_random_must_meet_at_some_kept_fraction(world, load, change):
    def shifted(content):
        for entry in content["scores"]:
            entry["keep"] += 0.05

    change(world / "evaluate/random/summary.json", shifted)
    with pytest.raises(ValueError, match="no kept fraction has scores of selector and random;"):
        load(world)


def test_a_patch_outside_the_grid_is_refused(world, load, change):
    change(
        world / "evaluate/selector/masks.json", lambda content: content["masks"]["docs/000001"].append(144)
    )
    with pytest.raises(ValueError, match=r"image docs/000001 keeps patches outside the grid 12 x 12"):
        load(world)


HOSTILE = [
    "../../outside",
    "/tmp/outside",
    "a//b",
    "..",
    "",
    ".hidden",
    "a@b",
    "a\x00b",
    "a b",
    "x" * 65,
    None,
    7,
    ["a"],
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["benchmark", "group"])
def test_an_invalid_name_is_refused_in_every_file(world, load, change, synthetic, kind, name):
    original = {"benchmark": "docs", "group": "text"}[kind]
    path = world / "evaluate/selector/results.jsonl"
    lines = synthetic.read_lines(path)
    synthetic.write_lines(path, [line | {kind: name} if line[kind] == original else line for line in lines])
    with pytest.raises(
        ValueError, match=r"results.jsonl line \d+: .* (is no name|is not allowed), allowed: "
    ):
        load(world)

    def renamed(content):
        content["scores"] = [
            entry | {kind: name} if entry.get(kind) == original else entry for entry in content["scores"]
        ]

    change(world / "evaluate/selector/summary.json", renamed)
    with pytest.raises(ValueError, match=r"summary.json: scores.* (is no name|is not allowed), allowed: "):
        load(world)


def test_results_under_another_reducers_name_are_refused(world, load, change):
    change(world / "evaluate/selector/summary.json", lambda content: content.update(reducer="../random"))
    with pytest.raises(
        ValueError, match=r"selector/summary.json: reducer: '../random' is not allowed, allowed: selector"
    ):
        load(world)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("prediction", None, "prediction: None is not allowed"),
        ("prediction", [None] * 9, "prediction[0]: None is not allowed"),
        ("question", ["?"], "question: ["),
        ("images", [3], "images[0]: 3 is not"),
        ("score", ["1"] * 9, "score[0]: '1' is not"),
        ("score", [float("nan")] * 9, "score[0]: nan is not"),
        ("score", [1.0], "score: 1 values are not allowed, allowed: 9, as in keep"),
        ("keep", [True] * 9, "keep[0]: True is not"),
        ("keep", [0.1] * 9, "keep and seed: "),
        ("id", "docs/000000#0", "occurs twice"),
    ],
)
def test_a_row_of_wrong_types_or_a_second_time_is_named_by_its_line(world, load, key, value, reason):
    path = world / "evaluate/selector/results.jsonl"
    lines = path.read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | {key: value})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"results.jsonl line 5: .*{re.escape(reason)}"):
        load(world)


@pytest.mark.parametrize(
    ("file", "spoil", "reason"),
    [
        ("evaluate/full/summary.json", lambda content: content.update(scores={"a": 1}), "summary.json: "),
        (
            "evaluate/full/summary.json",
            lambda content: content["scores"][0].update(mean="1"),
            "mean: '1' is not",
        ),
        (
            "evaluate/full/summary.json",
            lambda content: content["scores"][0].update(low=1e999),
            "low: inf is not",
        ),
        (
            "evaluate/full/summary.json",
            lambda content: content.update(tokens_full=None),
            "tokens_full: None is not",
        ),
        ("evaluate/full/summary.json", lambda content: content.update(parameters=[]), "summary.json: "),
        ("evaluate/random/masks.json", lambda content: content.update(grid=12), "masks.json: "),
        ("evaluate/random/masks.json", lambda content: content.update(masks=[3]), "masks.json: "),
        ("evaluate/random/masks.json", lambda content: content["masks"].update(a=["1"]), "masks.json: "),
        ("pretrain/metrics.json", lambda content: content.update(final=3), "final: 3 is not"),
        (
            "pretrain/metrics.json",
            lambda content: content["final"].update(kept="much"),
            "final\\['kept'\\]: 'much' is not",
        ),
    ],
)
def test_a_file_of_wrong_types_is_named(world, load, change, file, spoil, reason):
    change(world / file, spoil)
    with pytest.raises(ValueError, match=f"{re.escape(str(world / file))}.*{reason}|{reason}") as caught:
        load(world)
    assert str(world / file) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("grid", [4], r"grid: \[4\] is not allowed, allowed: tuple\[int, int\]"),
        ("grid", None, "grids: docs/000000 is missing"),
        ("keep", "half", "keep: 'half' is not allowed"),
        ("masks", [], r"masks: \[\] is not allowed, allowed: dict"),
        ("masks", {"docs/000000": "01"}, r"masks\['docs/000000'\]: '01' is not allowed, allowed: list"),
        ("masks", {"docs/000000": [0, 1.5]}, r"masks\['docs/000000'\]\[1\]: 1.5 is not allowed"),
    ],
)
def test_mistyped_masks_are_named_by_key(world, load, change, key, value, message):
    change(world / "evaluate/random/masks.json", lambda content: content.update({key: value}))
    with pytest.raises(ValueError, match=rf"random/masks\.json: {message}.*; stage evaluate"):
        load(world)


def test_images_may_have_grids_of_their_own(world, load, change):
    path = world / "evaluate/random/masks.json"
    images = list(json.loads(path.read_text())["masks"])
    grids = {image: [2, 3 + place] for place, image in enumerate(images)}
    own = {"keep": 0.4, "grids": grids, "masks": {image: [5] for image in images}}
    change(path, lambda content: (content.clear(), content.update(own)))
    masks = load(world).evaluations["random"].masks
    assert [masks.grid_of(image) for image in images] == [tuple(grid) for grid in grids.values()]
    change(path, lambda content: content["masks"].update({images[0]: [6]}))
    with pytest.raises(ValueError, match="keeps patches outside the grid 2 x 3"):
        load(world)
    change(path, lambda content: content["grids"].pop(images[0]))
    with pytest.raises(ValueError, match=f"grids: {images[0]} is missing, allowed: one per image"):
        load(world)


def test_where_nothing_was_answered_there_are_no_masks(world, load, change):
    path = world / "evaluate/random/masks.json"
    change(path, lambda content: content.update(grid=None, masks={}))
    assert load(world).evaluations["random"].masks is None


def test_a_benchmark_of_the_users_own_is_named_by_the_path_of_its_file(world, load):
    for path in world.glob("evaluate/*/*.json*"):
        path.write_text(path.read_text().replace('"docs"', '"my_package/my_docs"'))
    assert load(world).benchmarks[0].title == "my_package/my_docs"


def test_the_selector_alone_is_refused_without_a_name_that_was_not_evaluated(world, load, change):
    scores_without(
        change,
        world / "evaluate/selector",
        lambda entry: (entry.get("benchmark") == "signs") == (entry["keep"] == 0.5),
    )
    names = [name for name in PAPER if name != "random"]
    with pytest.raises(ValueError, match="no kept fraction has scores of selector; run stage evaluate"):
        load(world, names)


def test_the_settings_are_parameters_of_section_evaluate():
    shipped = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
    assert set(result_files.SETTINGS) < set(shipped["evaluate"])


def test_a_reducer_of_the_users_own_is_read_by_the_constants_of_its_file(world, load, change, monkeypatch):
    monkeypatch.chdir(world)
    (world / "my_package").mkdir()
    (world / "my_package/mine.py").write_text('BUDGET = "own"\n')
    shutil.copytree(world / "evaluate/selector", world / "evaluate/my_package/mine")
    path = world / "evaluate/my_package/mine/summary.json"
    change(path, lambda content: content.update(reducer="my_package/mine"))
    assert load(world, [*PAPER, "my_package/mine"]).adaptive == ["my_package/mine"]
