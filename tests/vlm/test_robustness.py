import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from atr.config import Evaluate
from atr.core import catalog
from atr.core.bootstrap import interval, resampled
from atr.core.records import Question
from atr.reduction.peers.l2_norm import L2Norm
from atr.reduction.registry import build_reducer
from atr.vlm import robustness
from atr.vlm.generation import Generator
from atr.vlm.inputs import ImageInputs
from atr.vlm.robustness import Observation, RobustnessSettings, change, first_of_each, overlaps
from atr.vlm.variants import VARIANTS, Variant

SETTINGS = RobustnessSettings(keep=[0.25, 0.5], batch_tokens=80, resamples=200, seed=3)
NAMES = ("docs/0", "docs/1", "docs/2", "shapes/0", "shapes/1", "shapes/2")


def picture(name):
    pixels = torch.randint(
        0,
        256,
        (40, 60, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(len(name) + ord(name[-1])),
    )
    return Image.fromarray(pixels.numpy())


def small(name):
    return picture(name).crop((0, 0, 28, 28))


def question(name, **changes):
    benchmark, _, number = name.partition("/")
    fields = {"question": "a b c"[: 1 + 2 * int(number)], "answers": ["x"], "images": [name]}
    return Question(
        **{
            "id": name,
            "benchmark": benchmark,
            "group": catalog.benchmark_group(benchmark),
            **fields,
            **changes,
        }
    )


@dataclass
class Place:
    """Keeps the tokens of the brightest patches, as features tell it by their first channel."""

    needs: frozenset = field(default=frozenset())

    def __call__(self, encoded, budget):
        return encoded.features_BND[..., 0].float().topk(budget).indices.sort().values


@pytest.fixture
def generator(model, processor):
    source = ImageInputs(model, processor, SimpleNamespace(image=small))
    return Generator(model, processor, source, Evaluate(positions="original", max_new_tokens=2))


@pytest.fixture
def measure(generator, model, processor):
    def measure(
        reducers, names, score=lambda question, prediction: float(len(prediction) % 2), with_full=True
    ):
        photographs = Generator(
            model,
            processor,
            ImageInputs(model, processor, SimpleNamespace(image=picture)),
            generator.settings,
        )
        variants = {name: VARIANTS[name] for name in names}
        questions = [question(name) for name in NAMES]
        return robustness.robustness(
            generator, reducers, questions, score, photographs, ["p/1", "p/2"], SETTINGS, with_full, variants
        )

    return measure


def test_a_deployment_that_changes_nothing_keeps_the_same_tokens_and_answers(measure):
    results = measure({"place": Place()}, ["batch of one", "resize by torch bicubic no antialias"])
    assert (results["keep"], results["questions"], results["photographs"]) == ([0.25, 0.5], 6, 2)
    one, resized = results["variants"]
    for line in (one["reducers"]["place"], resized["reducers"]["place"]):
        assert line["iou"] == [{"mean": 1.0, "lowest": 1.0}] * 2
        assert line["change"] == [{"mean": 0.0, "low": 0.0, "high": 0.0}] * 2
    assert one["reducers"]["place"]["photographs"] == one["reducers"]["place"]["iou"]
    assert one["full"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    # Images of 28 pixels are not resized, so only the photographs tell.
    assert [each["no_pixel_changed"] for each in (one, resized)] == [False, True]
    assert any(each["lowest"] < 1 for each in resized["reducers"]["place"]["photographs"])


def test_what_is_kept_is_compared_with_the_reference_image_by_image(measure):
    results = measure({"place": Place(), "l2_norm": L2Norm()}, ["JPEG 50", "contiguous positions"])
    jpeg, positions = results["variants"]
    for name in ("place", "l2_norm"):
        assert all(0 < each["lowest"] <= each["mean"] < 1 for each in jpeg["reducers"][name]["iou"])
        assert positions["reducers"][name]["iou"] == [{"mean": 1.0, "lowest": 1.0}] * 2
    assert not jpeg["no_pixel_changed"] and jpeg["name"] == "JPEG 50"
    again = measure({"place": Place(), "l2_norm": L2Norm()}, ["JPEG 50", "contiguous positions"])
    assert json.dumps(results) == json.dumps(again)


def test_the_score_is_that_of_the_answers_in_the_deployment(measure, generator, monkeypatch):
    """The fake model answers with its positions, so that the score is known."""
    used = []

    def generate(self, inputs, **options):
        used.append(self.settings.positions)
        return [self.settings.positions] * len(inputs["input_ids"])

    monkeypatch.setattr(Generator, "_generate", generate)
    results = measure(
        {"place": Place()},
        ["contiguous positions"],
        lambda question, prediction: float(prediction == "original"),
    )
    assert (results["full"], results["reference"]) == (1.0, {"place": [1.0, 1.0]})
    (positions,) = results["variants"]
    assert positions["full"] == {"mean": -1.0, "low": -1.0, "high": -1.0}
    assert positions["reducers"]["place"]["change"] == [positions["full"]] * 2
    assert set(used) == {"original", "contiguous"}


UNCHANGED = ("contiguous positions", "features stored in bfloat16", "resize by Pillow bilinear")


def test_together_the_variants_change_what_each_changes_alone(measure):
    names = [*UNCHANGED, "JPEG 75", "batch of one"]
    together = measure({"place": Place()}, names)
    alone = [measure({"place": Place()}, [name]) for name in names]
    assert together["variants"] == [results["variants"][0] for results in alone]
    assert all(results["reference"] == together["reference"] for results in alone)


def test_the_tower_runs_once_for_all_that_read_its_output_alike(measure, model):
    shapes = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: shapes.append(len(args[0])))
    measure({}, UNCHANGED)
    once = list(shapes)
    assert sum(once) == len(NAMES), "of the questions alone: without a reducer no photograph is looked at"
    measure({"place": Place()}, UNCHANGED[:2])
    assert shapes == [*once, *once, 2], "and of the two photographs"


def test_a_reducer_that_needs_text_gets_the_question(measure):
    results = measure({"cdpruner_text": build_reducer("cdpruner_text")}, ["batch of one"])
    assert results["variants"][0]["reducers"]["cdpruner_text"]["iou"] == [{"mean": 1.0, "lowest": 1.0}] * 2


def test_images_cut_into_another_number_of_tokens_are_not_compared():
    cell = ("place", 0.5)
    own = Observation(
        kept={cell: [(torch.tensor([0, 1]), 4), (torch.tensor([0, 1]), 8), (torch.tensor([2]), 2)]}
    )
    other = Observation(
        kept={cell: [(torch.tensor([1, 2]), 4), (torch.tensor([0, 1]), 6), (torch.tensor([2]), 2)]}
    )
    assert overlaps(other, own, cell) == {"mean": pytest.approx((1 / 3 + 1) / 2), "lowest": 1 / 3}
    none = Observation(kept={cell: [(kept, of + 1) for kept, of in own.kept[cell]]})
    assert overlaps(none, own, cell) is None


def test_a_change_weighs_benchmarks_alike_and_units_by_their_lowest_score():
    questions = [question("docs/0"), question("docs/1"), question("docs/2", id="docs/2#0", unit="two")]
    questions += [question("docs/2", id="docs/2#1", unit="two"), question("shapes/0")]
    own = dict.fromkeys((each.id for each in questions), 1.0)
    scores = own | {"docs/0": 0.0, "docs/2#1": 0.5}
    results = change(scores, own, questions, SETTINGS)
    assert results["mean"] == pytest.approx((-(1 + 0 + 0.5) / 3 + 0) / 2)
    drawn = resampled(torch.tensor([-1, 0, -0.5]).double().numpy(), "docs", 200, 3)
    assert (results["low"], results["high"]) == pytest.approx(interval(drawn / 2))
    assert robustness.mean_score(scores, questions) == pytest.approx((1.5 / 3 + 1) / 2)


def test_the_first_units_with_images_are_taken():
    questions = [question(name) for name in NAMES]
    questions[0] = question(NAMES[0], unreadable="cut off", images=[])
    questions[3] = question(NAMES[3], unit="turns")
    questions[5] = question(NAMES[5], unit="turns")
    chosen = first_of_each(questions, 1)
    assert [each.id for each in chosen] == ["docs/1", "shapes/0", "shapes/2"]
    assert len(first_of_each(questions, 9)) == 5
    with pytest.raises(ValueError, match="no question has an image"):
        first_of_each(questions[:1], 2)


def test_without_full_a_reducer_is_compared_alone_and_full_without_a_reducer(measure):
    together = measure({"place": Place()}, ["JPEG 50"])
    alone = measure({"place": Place()}, ["JPEG 50"], with_full=False)
    full = measure({}, ["JPEG 50"])
    assert alone["full"] is None and alone["variants"][0]["full"] is None
    assert alone["variants"][0]["reducers"] == together["variants"][0]["reducers"]
    assert alone["reference"] == together["reference"] and full["reference"] == {}
    assert full["full"] == together["full"]
    assert full["variants"][0]["full"] == together["variants"][0]["full"]
    assert full["variants"][0]["reducers"] == {}


@pytest.mark.parametrize("family", ["llava_next"])
def test_models_that_cut_images_are_compared_where_the_tiles_are_the_same(measure):
    results = measure({"l2_norm": L2Norm()}, ["JPEG 75", "source at half size", "bfloat16 weights"])
    jpeg, half, bfloat16 = (each["reducers"]["l2_norm"] for each in results["variants"])
    for line in (jpeg, bfloat16):
        assert all(0 < overlap["lowest"] <= overlap["mean"] <= 1 for overlap in line["photographs"])
    assert half["photographs"] == [None, None], "at half size they are cut into fewer tiles"


def test_the_reference_is_a_variant_without_a_change():
    assert all(variant != Variant() for variant in VARIANTS.values())
