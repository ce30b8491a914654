"""The step micro_selectors on random weights, and what it left in data/micro/selectors."""

import json
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from atr.micro.params import PARAMETERS, load_micro
from atr.micro.scoring import score_benchmark
from atr.micro.stages import selectors
from atr.micro.world import DRAW
from atr.reduction import EncoderOutput, FeatureSelector, SelectorReducer
from atr.reduction.registry import build_reducer
from atr.vlm.checkpoint import load_vlm
from atr.vlm.reduce import reduce

ROOT = Path(__file__).parents[3]
PROVENANCE = {"commit": "0" * 40, "versions": {"torch": "2"}}
FEATURES = EncoderOutput(torch.randn(16, 144, 192, generator=torch.Generator().manual_seed(0)), (12, 12))
shipped = pytest.mark.parametrize("name", selectors.SELECTOR_SOURCES)


def train(folder, **record):
    """What the pipeline leaves of a training: a selector for the micro model, with a random head."""
    selector = FeatureSelector(192, (12, 12), layers=1, encoder="micro", layer=-1)
    torch.nn.init.normal_(selector.trunk.head.weight)
    selector.standardise.mean_D.normal_()
    selector.note(scores={"loss": 0.5}, **record)
    selector.save_pretrained(folder / "selector")
    (folder / "metrics.json").write_text(json.dumps({"provenance": PROVENANCE}))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with both trained selectors, and the numbers that it logs."""
    (tmp_path / "data/micro").mkdir(parents=True)
    (tmp_path / "data/micro/llava").symlink_to(ROOT / "data/micro/llava")
    text = (ROOT / PARAMETERS.path).read_text()
    text = re.sub(r"(\nmicro_selectors:.*questions:) \d+", r"\1 2", text, flags=re.DOTALL)
    (tmp_path / PARAMETERS.path).write_text(text)
    torch.manual_seed(0)
    train(tmp_path / "experiments/pretrain")
    train(tmp_path / "experiments/distill", taught_by="micro")
    monkeypatch.chdir(tmp_path)
    logged = {}
    run = SimpleNamespace(metrics=logged.update)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(run))
    return SimpleNamespace(folder=tmp_path, logged=logged)


def count_common(kept_K, others_K):
    return int(torch.isin(kept_K, others_K).sum())


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def test_weights_are_halved_scored_and_recorded_and_nothing_differs_the_second_time(project):
    selectors.main(load_micro("micro_selectors"))
    written = contents(selectors.SHIPPED_SELECTORS)
    selectors.main(load_micro("micro_selectors"))
    assert contents(selectors.SHIPPED_SELECTORS) == written and len(written) == 6
    for name, folder in selectors.SELECTOR_SOURCES.items():
        tensors = load_file(selectors.SHIPPED_SELECTORS / name / "model.safetensors")
        dtypes = {key: value.dtype for key, value in tensors.items()}
        assert {key for key, dtype in dtypes.items() if dtype == torch.float32} == {
            "standardise.mean_D", "standardise.deviation_D",
        }  # fmt: skip
        loaded = FeatureSelector.from_pretrained(selectors.SHIPPED_SELECTORS / name)
        assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}, "computes in float32"
        trained = FeatureSelector.from_pretrained(folder / "selector")
        assert loaded.record.items() >= {"weights": "bfloat16", "trained_by": PROVENANCE}.items()
        assert loaded.is_taught == trained.is_taught and loaded.record["scores"]["loss"] == 0.5
        for benchmark in DRAW:
            score = loaded.record["scores"][f"exact_match_0.4_{benchmark}"]
            assert project.logged[f"{name}/exact_match_0.4_{benchmark}"] == score
            row = f"exact&#95;match&#95;0.4&#95;{benchmark} | {score:.4g}"
            assert row in written[f"{name}/README.md"].decode()
        kept, rounded = (SelectorReducer(one)(FEATURES, 58) for one in (trained, loaded))
        common = sum(map(count_common, kept, rounded)) / len(kept)
        assert common / (2 * 58 - common) > 0.98


def test_without_a_trained_selector_nothing_is_replaced(project):
    selectors.main(load_micro("micro_selectors"))
    before = contents(selectors.SHIPPED_SELECTORS)
    (project.folder / "experiments/distill/metrics.json").unlink()
    with pytest.raises(ValueError, match=r"^experiments/distill/metrics\.json is missing$"):
        selectors.main(load_micro("micro_selectors"))
    assert contents(selectors.SHIPPED_SELECTORS) == before


def test_a_selector_of_another_encoder_is_not_shipped(project):
    other = FeatureSelector(192, (12, 12), layers=1, encoder="micro", layer=-2)
    other.save_pretrained("experiments/pretrain/selector")
    with pytest.raises(ValueError, match="layer"):
        selectors.main(load_micro("micro_selectors"))
    assert not selectors.SHIPPED_SELECTORS.exists()


@pytest.fixture(scope="module")
def micro():
    return load_vlm(str(ROOT / "data/micro/llava"), torch.float32)


@shipped
def test_the_shipped_selector_is_small_and_says_where_it_comes_from(name):
    folder = ROOT / selectors.SHIPPED_SELECTORS / name
    assert (folder / "model.safetensors").stat().st_size < 3e6
    record = FeatureSelector.from_pretrained(folder).record
    assert {"data", "images", "fingerprint", "seed", "scores", "rounded_from", "trained_by"} <= set(record)
    assert record["fingerprint"] in (folder / "README.md").read_text()
    assert ("taught_by" in record) == (name == "distilled")


@shipped
def test_the_shipped_selector_answers_what_random_tokens_do_not(name, micro):
    model, processor = micro
    selector = FeatureSelector.from_pretrained(ROOT / selectors.SHIPPED_SELECTORS / name)
    scores = [
        score_benchmark(
            processor, model, "docs", "validation", 24, 0, partial(reduce, model, reducer=reducer, keep=0.4)
        )
        for reducer in (selector, build_reducer("random"))
    ]
    assert scores[0] > 0.85 and scores[1] < 0.6
