import io

import numpy as np
import pytest
from PIL import Image

from atr.config import BENCHMARKS, Prepare
from atr.datasets import training_images
from atr.micro import world


@pytest.fixture
def coco(repository):
    def draw(images, seed=0):
        settings = Prepare(source="coco", images=images, repository=str(repository))
        return dict(training_images.images(settings, seed))

    return draw


def test_a_seeded_sample_of_coco(coco, hub):
    everything, first, again, other = coco(12), coco(5), coco(5), coco(5, seed=1)
    assert list(everything) == [f"coco/{9 + n:012d}" for n in range(12)]
    assert list(first) == list(again) == sorted(first) and len(first) == 5
    assert list(first) != list(other)
    for name, image in first.items():
        number = int(name.removeprefix("coco/")) - 9
        own = Image.open(io.BytesIO(hub.png(100 + number)))
        np.testing.assert_array_equal(np.asarray(image), np.asarray(own))


def test_too_few_are_named(coco):
    with pytest.raises(ValueError, match=r"coco/data holds 12 pictures, prepare.images asks for 13"):
        coco(13)


def test_a_broken_picture_of_coco_is_named(hub, tmp_path):
    rows = [{"image_id": n, "image": hub.image(n)} for n in range(3)]
    rows[2]["image"] = {"bytes": hub.png(2)[:90], "path": None}
    hub.write(tmp_path, "coco", rows, files=1)
    settings = Prepare(source="coco", images=3, repository=str(tmp_path))
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet row 2 column image cannot be read"):
        list(training_images.images(settings, 0))


@pytest.mark.parametrize(
    "benchmarks, drawn",
    [
        (["docs", "digits"], ["docs", "digits"]),
        (["textvqa", "signs", "gqa"], ["signs"]),
        (["textvqa"], list(BENCHMARKS)),
    ],
)
def test_the_micro_world_draws_its_own_benchmarks_in_turn(benchmarks, drawn):
    images = list(training_images.images(Prepare(images=7, benchmarks=benchmarks), seed=3))
    assert [name for name, _ in images] == [f"{drawn[n % len(drawn)]}/{n:06d}" for n in range(7)]
    name, image = images[5]
    assert image.tobytes() == world.sample(name.split("/")[0], "pretrain", 5, 3).image.tobytes()


def test_an_image_of_the_micro_world_is_asked_its_own_questions():
    settings = Prepare(images=12)
    prepared = {"seed": 3, "prepare": {"source": "micro", "prompts": settings.prompts}}
    asked = training_images.AskedImages([name for name, _ in training_images.images(settings, 3)], prepared)
    assert len(asked) == 12
    for index in range(12):
        name, prompts = asked[index]
        sample = world.sample(name.split("/")[0], "pretrain", index, 3)
        assert prompts == [question for question, _ in sample.turns] != []


def test_any_other_image_is_asked_the_prompts_of_the_parameters():
    prepared = {"seed": 0, "prepare": {"source": "coco", "prompts": ["What is it?", "Read it."]}}
    assert training_images.prompts("coco/000000000009", prepared) == ["What is it?", "Read it."]


def test_a_folder_of_pictures(tmp_path):
    Image.new("L", (9, 9), 7).save(tmp_path / "a.png")
    [(name, image)] = training_images.images(Prepare(source=str(tmp_path), images=1), 0)
    assert (name, image.getpixel((0, 0))) == ("a.png", (7, 7, 7))


@pytest.mark.parametrize("name", ["docs/x", "docs", "elsewhere/000001", "../docs/1"])
def test_an_image_that_the_micro_world_did_not_draw_is_named(name):
    with pytest.raises(ValueError, match=f"^image '{name}' is none of the micro world, allowed: a number"):
        training_images.prompts(name, {"seed": 0, "prepare": {"source": "micro", "prompts": []}})
