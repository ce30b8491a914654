"""The selector as a net, as an artifact on disk and as a reducer."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from atr.reduction import EncoderOutput, FeatureSelector, SelectorReducer
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.reduction.layers import Block, Standardise
from atr.reduction.registry import build_reducer

KWARGS = {"width": 16, "grid": (3, 4), "layers": 2, "heads": 2, "encoder": "tiny", "layer": -2, "keep": 0.3}


@pytest.fixture
def selector():
    """A selector with a random head, for features whose mean is not zero."""
    torch.manual_seed(0)
    selector = FeatureSelector(**KWARGS).eval()
    torch.nn.init.normal_(selector.trunk.head.weight)
    selector.standardise.measure(3 * torch.randn(50, 12, 16) + 1)
    return selector


def test_the_given_revision_of_the_hub_is_loaded(selector, hub, tmp_path, monkeypatch):
    selector.save_pretrained(tmp_path / "old")
    FeatureSelector(**KWARGS).save_pretrained(tmp_path / "main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.cache(tmp_path / "cache", "org/selector", {name: tmp_path / name for name in ("old", "main")})
    weight = selector.trunk.head.weight
    assert torch.equal(FeatureSelector.from_pretrained("org/selector@old").trunk.head.weight, weight)
    by_keyword = FeatureSelector.from_pretrained("org/selector", revision="old")
    assert torch.equal(by_keyword.trunk.head.weight, weight)
    assert not torch.equal(FeatureSelector.from_pretrained("org/selector").trunk.head.weight, weight)


def test_an_untrained_selector_keeps_most_tokens():
    logits = FeatureSelector(**KWARGS)(torch.randn(2, 12, 16))
    assert logits.shape == (2, 12) and (logits == 2).all()


def test_block_equals_torchs_layer():
    torch.manual_seed(0)
    ours = Block(16, 4, 2.0)
    for norm in (ours.norm_attention, ours.norm_feedforward):
        torch.nn.init.normal_(norm.weight)
    theirs = torch.nn.TransformerEncoderLayer(
        16, 4, 32, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    pairs = {
        "self_attn.in_proj_": ours.query_key_value,
        "self_attn.out_proj.": ours.out,
        "linear1.": ours.feedforward[0],
        "linear2.": ours.feedforward[2],
        "norm1.": ours.norm_attention,
        "norm2.": ours.norm_feedforward,
    }
    state = {
        prefix + kind: getattr(part, kind) for prefix, part in pairs.items() for kind in ("weight", "bias")
    }
    theirs.load_state_dict(state)
    features = torch.randn(3, 7, 16)
    torch.testing.assert_close(ours(features), theirs(features))


def test_save_and_load_give_the_same_logits(selector, tmp_path):
    selector.save_pretrained(tmp_path)
    loaded = FeatureSelector.from_pretrained(tmp_path)
    features = torch.randn(2, 12, 16)
    assert torch.equal(loaded(features), selector(features))
    assert (
        json.loads((tmp_path / "config.json").read_text()).items()
        >= {
            "encoder": "tiny",
            "layer": -2,
            "keep": 0.3,
            "grid": [3, 4],
        }.items()
    )
    assert (loaded.encoder, loaded.layer, loaded.keep, loaded.grid) == ("tiny", -2, 0.3, (3, 4))
    assert not loaded.training


def test_saved_twice_gives_the_same_bytes(selector, tmp_path):
    for name in ("one", "two"):
        selector.save_pretrained(tmp_path / name)
    for file in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_wrong_folder_is_refused_by_name(selector, tmp_path, file, damage):
    folder = tmp_path / "selector"
    selector.save_pretrained(folder)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "truncated":
        (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=str(folder)):
        FeatureSelector.from_pretrained(folder)


def test_folder_of_something_else_is_refused(selector, tmp_path):
    FeatureAutoencoder(**KWARGS).save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="no FeatureSelector could be loaded"):
        FeatureSelector.from_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="no-such/selector"):
        FeatureSelector.from_pretrained("no-such/selector")


def test_reducer_takes_the_highest_logits(selector, tmp_path):
    selector.save_pretrained(tmp_path)
    reducer = build_reducer("selector", 0, tmp_path)
    features = 3 * torch.randn(3, 12, 16) + 1
    for k in range(13):
        keep = reducer(EncoderOutput(features, (3, 4)), k)
        assert (keep.diff(dim=1) > 0).all()
        best = selector(features).topk(k).indices.sort().values
        assert torch.equal(keep, best)
    alone = torch.cat([reducer(EncoderOutput(row[None], (3, 4)), 5) for row in features])
    assert torch.equal(reducer(EncoderOutput(features, (3, 4)), 5), alone)


def test_reducer_computes_its_logits_once_for_each_batch(selector):
    reducer, asked = SelectorReducer(selector), []
    selector.register_forward_hook(lambda *_: asked.append(1))
    encoded = EncoderOutput(torch.randn(3, 12, 16), (3, 4))
    scores = reducer.scores(encoded)
    assert torch.equal(scores, selector.rank(encoded.features_BND))
    for k in (2, 5):
        assert torch.equal(reducer(encoded, k), selector.select(encoded.features_BND, k))
    assert len(asked) == 1 + 1 + 2
    mask = selector(encoded.features_BND) > 0
    assert torch.equal(scores > reducer.threshold, mask) and 0 < mask.sum() < mask.numel()


def test_reducer_reads_stored_bfloat16(selector):
    features = torch.randn(2, 12, 16).bfloat16()
    keep = SelectorReducer(selector)(EncoderOutput(features, (3, 4)), 4)
    assert torch.equal(keep, selector.select(features.float(), 4))


def test_another_grid_must_be_given(selector):
    features = torch.randn(1, 20, 16)
    with pytest.raises(ValueError, match=r"\(20, 16\) tokens and channels do not fit, allowed: \(12, 16\)"):
        selector(features)
    assert selector(features, (4, 5)).shape == (1, 20)
    same = torch.randn(1, 12, 16)
    assert torch.equal(selector(same, (3, 4)), selector(same))
    assert not torch.equal(selector(same, (4, 3)), selector(same))


def test_positions_distinguish_equal_features():
    equal = torch.ones(1, 12, 16)
    for position, distinct in (("none", 1), ("sine", 12)):
        selector = FeatureSelector(**KWARGS, position=position)
        torch.nn.init.normal_(selector.trunk.head.weight)
        assert len(selector(equal).unique()) == distinct


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads: 3 .* width 16"),
        ({"position": "learned"}, "position: 'learned' .* none, sine"),
        ({"width": 18, "heads": 2}, "width: 18"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FeatureSelector(**{**KWARGS, **change})


def test_standardise_measures_and_inverts():
    features = torch.randn(40, 12, 16) * torch.linspace(1, 90, 16) + torch.linspace(-9, 9, 16)
    features[..., 3] = 5.0  # a channel that never varies
    standardise = Standardise(16)
    standardise.measure(features.bfloat16())
    standard = standardise(features)
    others = [channel for channel in range(16) if channel != 3]
    torch.testing.assert_close(standard.mean((0, 1)), torch.zeros(16), atol=0.02, rtol=0)
    torch.testing.assert_close(standard.std((0, 1))[others], torch.ones(15), atol=0.02, rtol=0)
    torch.testing.assert_close(standardise.inverse(standard), features)
    torch.testing.assert_close(standardise.variance, features.var((0, 1)).mean(), atol=0, rtol=0.01)


def test_the_deviation_of_a_channel_far_from_zero_is_exact():
    """Some channels of vision encoders are a thousand deviations from zero: float32 sums would be noise."""
    features = 0.1 * torch.randn(200, 12, 16, generator=torch.Generator().manual_seed(0)) + 100
    standardise = Standardise(16)
    standardise.measure(features)
    expected = torch.from_numpy(features.double().numpy().std((0, 1))).float()
    torch.testing.assert_close(standardise.deviation_D, expected, rtol=1e-4, atol=0)


def test_standardise_refuses_features_that_are_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        Standardise(4).measure(torch.full((2, 3, 4), float("nan")))


def damaged(module, folder, name, change):
    """A saved folder of a module with one changed tensor."""
    module.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    change(weights[name])
    save_file(weights, folder / "model.safetensors")
    return folder


BROKEN = [
    (
        "trunk.blocks.1.out.weight",
        lambda weight: weight[0, :3].fill_(torch.nan),
        r"model.safetensors: 1 of \d+ tensors hold NaN or infinity, first {}trunk.blocks.1.out.weight "
        r"\(3 of its 256 values\)",
    ),
    (
        "trunk.norm.bias",
        lambda weight: weight.fill_(-torch.inf),
        r"first {}trunk.norm.bias \(16 of its 16 values\)",
    ),
    (
        "standardise.deviation_D",
        lambda weight: weight[4:].fill_(torch.inf),
        r"first {}standardise.deviat",
    ),
    (
        "standardise.deviation_D",
        lambda weight: weight[:2].fill_(0),
        r"{}standardise.deviation_D is zero or negative in 2 of 16 channels",
    ),
    (
        "standardise.deviation_D",
        lambda weight: weight[5:6].fill_(-1),
        r"is zero or negative in 1 of 16",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
@pytest.mark.parametrize(("kind", "prefix"), [(FeatureSelector, ""), (FeatureAutoencoder, "selector.")])
def test_unusable_weights_are_refused_at_load(tmp_path, kind, prefix, name, change, message):
    folder = damaged(kind(**KWARGS), tmp_path, prefix + name, change)
    with pytest.raises(ValueError, match=f"^{folder}: no {kind.__name__} .*{message.format(prefix)}"):
        kind.from_pretrained(folder)


@pytest.mark.parametrize("name", ["trunk.head.bias", "standardise.mean_D"])
def test_a_selector_with_nan_is_never_written(selector, tmp_path, name):
    selector.state_dict()[name].fill_(torch.nan)
    with pytest.raises(ValueError, match=f"^FeatureSelector: 1 of .* NaN or infinity, first {name}"):
        selector.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_logits_that_are_not_finite_are_refused(selector):
    features = torch.zeros(3, 12, 16)
    features[1, 7] = torch.finfo(torch.float32).max
    for rank in (selector.rank, lambda each: selector.select(each, 2)):
        with pytest.raises(ValueError, match=r"FeatureSelector: scores of images \[1\] of 3 holds NaN"):
            rank(features)


@pytest.mark.parametrize("kind", [FeatureSelector, FeatureAutoencoder])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 10**9}, "config.json: Storage size calculation overflowed"),
        ({"width": 10**6}, "config.json asks for"),
        ({"layers": 10**6}, r"layers: 1000000, though model.safetensors has \d+ tensors"),
        ({"layers": 1}, "config.json asks for none"),
        ({"layers": 3}, "is missing in model.safetensors"),
        ({"ffn_ratio": 1e12}, "config.json asks for"),
        ({"grid": [10**6, 10**6]}, r"grid: \(1000000, 1000000\) is not allowed, allowed: 1 to 65536 tokens"),
        ({"grid": [0, 4]}, r"grid: \(0, 4\) is not allowed"),
        ({"grid": [3]}, r"config.json: grid: \[3\] is not allowed, allowed: tuple\[int, int\]"),
        ({"grid": "3x4"}, "config.json: grid: '3x4' is not allowed"),
        ({"width": "16"}, "config.json: width: '16' is not allowed, allowed: int"),
        ({"width": 16.0}, "config.json: width: 16.0 is not allowed, allowed: int"),
        ({"layers": True}, "config.json: layers: True is not allowed, allowed: int"),
        ({"heads": 0}, "heads: 0 is not allowed"),
        ({"heads": -2}, "heads: -2 is not allowed"),
        ({"initial_bias": torch.nan}, "config.json: initial_bias: nan is not allowed, allowed: float"),
        ({"keep": "half"}, "config.json: keep: 'half' is not allowed, allowed: float | None"),
        ({"encoder": ["micro"]}, "config.json: encoder"),
        ({"layer": "last"}, "config.json: layer: 'last' is not allowed"),
        ({"width": None}, "config.json: width: None is not allowed"),
    ],
)
def test_a_configuration_that_does_not_fit_the_weights_is_refused_before_building(
    tmp_path, kind, change, message
):
    kind(**KWARGS).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=rf"^{tmp_path}: no {kind.__name__} could be loaded .*{message}"):
        kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["width", "grid"])
def test_a_configuration_that_lacks_a_key_is_refused(selector, tmp_path, missing):
    selector.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[missing]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{tmp_path}: no FeatureSelector could be loaded .*'{missing}'"):
        FeatureSelector.from_pretrained(tmp_path)


@pytest.mark.parametrize("record", [[], "x", {"fingerprint": 5}, {"fingerprint": "no hex"}])
def test_a_malformed_record_is_refused(selector, tmp_path, record):
    selector.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"record": record}))
    with pytest.raises(ValueError, match=f"^{tmp_path}: no FeatureSelector .*(record|fingerprint): "):
        FeatureSelector.from_pretrained(tmp_path)
