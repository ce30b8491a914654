"""Extraction end to end: the store holds the encoder's features, for any number of devices and threads."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from atr.core.fingerprint import fingerprint
from atr.core.hub import checkpoint_digest, checkpoint_version
from atr.features.datamodule import ImageDataModule
from atr.features.encoder import Encoder
from atr.features.extraction import fill_store
from atr.features.merged import vision_tower
from atr.features.pca import pca_picture
from atr.features.preprocess import describe_preprocessing, probe_image
from atr.features.store import FeatureStore

PARAMETERS = {"encoder": "tiny"}


def pictures(count=10):
    """Images that differ in colour and in the place of a rectangle."""
    images = []
    for number in range(count):
        image = Image.new("RGB", (56, 56), (20 * number, 255 - 20 * number, 90))
        image.paste((255, 255, 255), (number, 2 * number, number + 20, 2 * number + 9))
        images.append((f"image/{number}", image))
    return images


def extract(checkpoint, folder, images=None, shard=4, workers=0, layer=-2, **trainer_kwargs):
    images = pictures() if images is None else images
    encoder = Encoder.load(str(checkpoint), layer, name="tiny")
    data = ImageDataModule(images, encoder.preprocess, 3, shard, workers)
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    version = checkpoint_version(str(checkpoint))
    fill_store(encoder, data, Path(folder), PARAMETERS, quiet | trainer_kwargs, version)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=3,
        patch_size=14,
        image_size=56,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    extract(checkpoint, folder)
    return FeatureStore.open(folder, PARAMETERS)


def content(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_the_store_holds_the_towers_hidden_states(store, checkpoint):
    model = CLIPVisionModel.from_pretrained(checkpoint).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(checkpoint)(
        [image for _, image in pictures()], return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = model(pixels["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    read = torch.stack([store[position] for position in range(len(store))])
    # Equal to one unit in the last place of bfloat16, as another batch size sums in another order.
    torch.testing.assert_close(read.float(), hidden, rtol=2**-8, atol=1e-5)
    assert store.ids == [name for name, _ in pictures()]
    assert store.manifest["encoder"] == "tiny"
    assert store.manifest["layer"] == -2
    assert store.manifest["fingerprint"] == fingerprint(model)
    assert store.manifest["preprocess"] == describe_preprocessing(
        CLIPImageProcessorPil.from_pretrained(checkpoint)
    )
    assert (store.grid, store.width) == ((4, 4), 24)


def test_the_store_records_precision_device_and_checkpoint(store, checkpoint):
    resolved = store.manifest["resolved"]
    assert (resolved["precision"], resolved["device"], resolved["commit"]) == ("32-true", "cpu", None)
    assert resolved["processor"] and resolved["digest"] == checkpoint_digest(str(checkpoint))


def test_a_second_run_gives_the_same_bytes_and_removes_a_longer_former_store(store, checkpoint, tmp_path):
    extract(checkpoint, tmp_path, pictures(13))
    assert len(FeatureStore.open(tmp_path)) == 13
    extract(checkpoint, tmp_path)
    assert content(tmp_path) == content(store.folder)


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_give_the_same_bytes(workers, store, checkpoint, tmp_path):
    extract(checkpoint, tmp_path, workers=workers)
    assert content(tmp_path) == content(store.folder)


def test_the_trainers_precision_reaches_the_encoder(store, checkpoint, tmp_path):
    extract(checkpoint, tmp_path, precision="bf16-mixed")
    mixed = FeatureStore.open(tmp_path)
    assert mixed.manifest["resolved"]["precision"] == "bf16-mixed"
    read = [torch.stack([one[position] for position in range(10)]).float() for one in (store, mixed)]
    assert not torch.equal(*read)
    torch.testing.assert_close(*read, rtol=0.05, atol=0.05)


class Cut:
    """Images of which the last raises an error."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 9:
            raise self.error
        return pictures()[index]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error", [ValueError("part-00000.parquet, row 9 (image/9): not an image"), SystemExit(143)]
)
def test_an_interrupted_run_leaves_no_store(error, workers, checkpoint, tmp_path):
    extract(checkpoint, tmp_path)  # the complete store of an earlier run must not remain
    with pytest.raises(type(error)) as raised:
        extract(checkpoint, tmp_path, Cut(error), workers=workers)
    assert str(raised.value) == str(error)
    assert sorted(content(tmp_path)) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        FeatureStore.open(tmp_path)


def uneven_pictures(count=10):
    """Images of which any two neighbours have other sizes."""
    return [(f"image/{n}", probe_image(30 + 20 * (n % 4), 100 - 6 * n)) for n in range(count)]


@pytest.mark.parametrize("layer", ["merged", 2])
def test_a_store_of_images_with_grids_of_their_own_holds_each_images_features(layer, hosts, tmp_path):
    model, checkpoint = hosts("qwen2_5_vl")
    extract(checkpoint, tmp_path, uneven_pictures(), layer=layer)
    store, encoder = FeatureStore.open(tmp_path, PARAMETERS), Encoder.load(str(checkpoint), layer)
    assert store.is_ragged and len(set(store.grids)) > 3
    assert (store.manifest["layer"], store.width) == (layer, 16 if layer == "merged" else 32)
    assert store.manifest["fingerprint"] == fingerprint(vision_tower(model))
    assert store.manifest["preprocess"] == describe_preprocessing(encoder.image_processor)
    with torch.inference_mode():
        for place, (_, image) in enumerate(uneven_pictures()):
            ((features_ND, grid),) = encoder.images(encoder.preprocess([image]))
            assert store.grid_of(place) == grid
            torch.testing.assert_close(store[place].float(), features_ND, rtol=2**-8, atol=1e-5)


def test_ragged_extraction_gives_the_same_bytes_by_threads_and_over_a_former_store(hosts, tmp_path):
    _, checkpoint = hosts("mistral3")
    extract(checkpoint, tmp_path / "one", uneven_pictures(), layer="merged")
    extract(checkpoint, tmp_path / "two", uneven_pictures(13), layer="merged")
    extract(checkpoint, tmp_path / "two", uneven_pictures(), layer="merged", workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_merged_features_of_images_of_one_grid_fill_a_rectangular_store(hosts, tmp_path):
    _, checkpoint = hosts("smolvlm")
    extract(checkpoint, tmp_path, uneven_pictures(), layer="merged")
    store = FeatureStore.open(tmp_path, PARAMETERS)
    assert (store.is_ragged, store.grid, store.manifest["layer"]) == (False, (2, 2), "merged")


def test_the_picture_of_ragged_features_has_each_image_in_its_own_shape(hosts):
    encoder = Encoder.load(str(hosts("qwen3_vl")[1]), "merged")
    png = pca_picture(encoder, [probe_image(112, 56), probe_image(56, 112)])
    width, height = Image.open(BytesIO(png)).size
    assert (width, height) == (2 * 384 + 2 * 192, 384)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layer", ["merged", 2])
def test_several_ranks_write_the_bytes_of_one_where_images_have_grids_of_their_own(layer, hosts, tmp_path):
    _, checkpoint = hosts("qwen2_5_vl")
    extract_by_ranks(2, checkpoint, tmp_path / "two", f"uneven_pictures(), shard=3, layer={layer!r}")
    extract(checkpoint, tmp_path / "one", uneven_pictures(), shard=3, layer=layer)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert FeatureStore.open(tmp_path / "two").is_ragged


@pytest.mark.slow
def test_several_ranks_write_the_bytes_of_one(checkpoint, tmp_path):
    """Three ranks for two shards: the last rank has no batches."""
    extract_by_ranks(3, checkpoint, tmp_path / "three", "shard=5")
    extract(checkpoint, tmp_path / "one", shard=5)
    assert content(tmp_path / "three") == content(tmp_path / "one")


def extract_by_ranks(ranks, checkpoint, folder, arguments):
    """Run `extract` with these arguments in so many processes."""
    script = folder.with_suffix(".py")
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_extraction import extract, uneven_pictures\n"
        f"extract({str(checkpoint)!r}, {str(folder)!r}, {arguments}, devices={ranks}, strategy='ddp')\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, script], env=environment, start_new_session=True) as process:
        try:
            assert process.wait() == 0
        finally:  # if one hangs, do not leave the other ranks behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
