import io

import numpy as np
import pytest
from PIL import Image

from atr.config import Prepare
from atr.datasets.training_images import training_images
from atr.micro import world


@pytest.fixture
def coco(repository):
    def draw(images, seed=0):
        settings = Prepare(source="coco", images=images, repository=str(repository))
        return {image.id: image.image for image in training_images(settings, seed)}

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
        list(training_images(settings, 0))


def test_an_image_of_the_micro_world_is_asked_its_own_questions():
    images = list(training_images(Prepare(images=12, benchmarks=["docs", "shapes"]), 3))
    assert [image.id.split("/")[0] for image in images] == ["docs", "shapes"] * 6
    for index, image in enumerate(images):
        sample = world.sample(image.id.split("/")[0], "pretrain", index, 3)
        assert image.image.tobytes() == sample.image.tobytes()
        assert image.prompts == [question for question, _ in sample.turns] != []


def test_any_other_image_is_asked_the_prompts_of_the_parameters(repository):
    prompts = ["What is it?", "Read it."]
    settings = Prepare(source="coco", images=2, repository=str(repository), prompts=prompts)
    assert [image.prompts for image in training_images(settings, 0)] == [prompts, prompts]


def test_a_folder_of_pictures(tmp_path):
    Image.new("L", (9, 9), 7).save(tmp_path / "a.png")
    [(name, image, _)] = training_images(Prepare(source=str(tmp_path), images=1), 0)
    assert (name, image.getpixel((0, 0))) == ("a.png", (7, 7, 7))
