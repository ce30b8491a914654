"""Signals for reducers, against the store and the encoder used directly."""

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from atr.config import EncoderPreset
from atr.features.attention_hooks import CAPTURABLE
from atr.features.encoder import Encoder
from atr.features.preprocess import probe_image
from atr.features.signals import (
    COMPUTED_SIGNALS,
    ENCODER_SIGNALS,
    MERGED_SIGNALS,
    RAGGED_SIGNALS,
    load_store_encoder,
    observe_signals,
    sample_evenly,
    signals_of,
)
from atr.features.store import FeatureStore, RaggedShardWriter, ShardWriter, write_manifest

NAMES = [f"image/{number}" for number in range(3)]
PICTURES = {name: Image.new("RGB", (28, 28), (80 * place, 30, 90)) for place, name in enumerate(NAMES)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A store of layer 1 and the checkpoint of its encoder."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 3}
    CLIPVisionModel(CLIPVisionConfig(**shape, patch_size=14, image_size=28)).save_pretrained(folder / "tower")
    size = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder / "tower")
    writer = ShardWriter(folder, len(NAMES), 8)
    writer.add(0, NAMES, torch.randn(3, 4, 24))
    write_manifest(
        folder, encoder="tiny", layer=1, grid=(2, 2), width=24, parameters={}, shards=writer.shards
    )
    return FeatureStore.open(folder), EncoderPreset("tiny", str(folder / "tower"))


def refused(*_):
    raise AssertionError("not needed")


def test_features_and_grid_come_from_the_store(project):
    store, _ = project
    fields = observe_signals(store, NAMES[:0:-1], refused, refused, {"grid"}, CPU)
    assert set(fields) == {"features_BND", "grid"} and fields["grid"] == (2, 2)
    assert fields["features_BND"].dtype == torch.bfloat16
    assert torch.equal(fields["features_BND"], torch.stack([store[2], store[1]]))


def test_other_signals_come_from_the_stores_encoder_and_the_pictures(project):
    store, preset = project
    encoder = load_store_encoder(store, preset, store.folder, CPU)
    assert (encoder.layer, encoder.name) == (1, "tiny")
    fields = observe_signals(store, NAMES[1:], PICTURES.__getitem__, lambda: encoder, ENCODER_SIGNALS, CPU)
    assert set(fields) == {"features_BND", *ENCODER_SIGNALS}
    assert torch.equal(fields["features_BND"], torch.stack([store[1], store[2]]))
    pixels_BCHW = encoder.preprocess([PICTURES[name] for name in NAMES[1:]])
    assert torch.equal(fields["pixels_BCHW"], pixels_BCHW)
    seen = encoder.observe(pixels_BCHW, {"attention_BN", "keys_BND"})
    for name in ("attention_BN", "keys_BND"):
        assert torch.equal(fields[name], seen[name])
    assert torch.equal(fields["encode"](pixels_BCHW), seen["features_BND"])


@pytest.mark.parametrize("need", sorted(COMPUTED_SIGNALS))
def test_only_the_needed_signals_are_given(project, need):
    store, preset = project
    encoder = load_store_encoder(store, preset, store.folder, CPU)
    fields = observe_signals(store, NAMES, PICTURES.__getitem__, lambda: encoder, {need, "text_BD"}, CPU)
    assert set(fields) == {"features_BND", "grid", need}


@pytest.mark.parametrize("images", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_images_are_sampled_at_even_steps_in_batches(project, images, size):
    store, _ = project
    batches = list(sample_evenly(store, images, size))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    taken = [store.index(name) for batch in batches for name in batch]
    assert taken == {1: [0], 2: [0, 1], 3: [0, 1, 2], 5: [0, 1, 2]}[images]


def test_images_of_grids_of_their_own_come_in_batches_of_one_grid(tmp_path):
    grids = [(1, 2), (2, 1), (1, 2), (2, 2), (1, 2), (2, 1)]
    names = [f"image/{number}" for number in range(len(grids))]
    writer = RaggedShardWriter(tmp_path, len(names), 8)
    writer.add(0, names, [torch.randn(rows * columns, 24) for rows, columns in grids], grids)
    write_manifest(
        tmp_path, encoder="tiny", layer="merged", grid=None, width=24, parameters={}, shards=writer.shards
    )
    store = FeatureStore.open(tmp_path)
    batches = list(sample_evenly(store, 6, 2))
    assert batches == [[names[0], names[2]], [names[4]], [names[1], names[5]], [names[3]]]
    for batch in batches:
        fields = observe_signals(store, batch, refused, refused, ENCODER_SIGNALS, CPU)
        assert set(fields) == {"features_BND", *RAGGED_SIGNALS}
        assert {fields["grid"]} == {store.grid_of(store.index(name)) for name in batch}
        assert torch.equal(fields["features_BND"], torch.stack([store[store.index(name)] for name in batch]))


@pytest.mark.parametrize("layer", [1, "merged"])
@pytest.mark.parametrize("kind", ["gemma3", "internvl"])
def test_tokens_of_several_patches_have_the_signals_of_their_patches(kind, layer, hosts, tmp_path):
    encoder = Encoder.load(str(hosts(kind)[1]), layer)
    pictures = {name: probe_image(60 + 9 * place, 80) for place, name in enumerate(NAMES)}
    pixels_BCHW = encoder.preprocess(list(pictures.values()))
    with torch.inference_mode():
        seen = encoder.observe(pixels_BCHW, CAPTURABLE)
    writer = ShardWriter(tmp_path, len(NAMES), 8)
    writer.add(0, NAMES, seen["features_BND"])
    about = {"encoder": "tiny", "layer": layer, "grid": encoder.grid, "width": encoder.width}
    write_manifest(tmp_path, **about, parameters={}, shards=writer.shards)
    store = FeatureStore.open(tmp_path)
    needs = ENCODER_SIGNALS | MERGED_SIGNALS
    assert signals_of(store) == (needs if layer == "merged" else ENCODER_SIGNALS)
    fields = observe_signals(store, NAMES, pictures.__getitem__, lambda: encoder, needs, CPU)
    assert set(fields) == {"features_BND", *signals_of(store)}
    for name in CAPTURABLE:
        assert torch.equal(fields[name], seen[name]) and len(fields[name].unique(dim=0)) == len(NAMES)
    if layer == "merged":
        assert torch.equal(fields["projected_BND"], fields["features_BND"])
