import sys
from itertools import islice
from types import SimpleNamespace

import pytest

from atr.datasets import drawn
from atr.micro import world


def test_a_module_is_imported_by_its_name():
    assert drawn.load_drawing_module(drawn.MICRO) is world


@pytest.mark.parametrize(
    ("name", "message"),
    [("atr.no_such", "cannot be imported: No module named 'atr.no_such'"), ("json", r"has no sample\(\)")],
)
def test_a_module_that_cannot_draw_is_named(name, message):
    with pytest.raises(ValueError, match=f"^drawing module {name} {message}"):
        drawn.draw_rows(name, "docs", "evaluate", 0)


def test_centres_are_fractions_of_the_image_of_any_module(monkeypatch):
    from PIL import Image

    marks = [SimpleNamespace(x=10.0, y=30.0)]
    sample = SimpleNamespace(image=Image.new("RGB", (40, 60)), turns=[("what?", "it")], characters=marks)
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(sample=lambda *_: sample))
    first, second = islice(drawn.draw_rows("mine", "own/one", "evaluate", 0), 2)
    assert (first["id"], second["id"], first["question"], first["answer"]) == (
        "000000#0",
        "000001#0",
        "what?",
        "it",
    )
    assert (first["image"].name, first["image"].text_centres) == ("000000", [(0.25, 0.5)])


@pytest.mark.parametrize(
    ("benchmarks", "chosen"),
    [
        (["docs", "digits"], ["docs", "digits"]),
        (["textvqa", "signs", "gqa"], ["signs"]),
        (["textvqa"], list(world.DRAW)),
    ],
)
def test_training_images_are_of_the_modules_own_benchmarks_in_turn(benchmarks, chosen):
    images = list(drawn.draw_training_images(drawn.MICRO, benchmarks, 7, seed=3))
    assert [name for name, *_ in images] == [f"{chosen[n % len(chosen)]}/{n:06d}" for n in range(7)]
    name, image, questions = images[5]
    sample = world.sample(name.split("/")[0], "pretrain", 5, 3)
    assert image.tobytes() == sample.image.tobytes()
    assert questions == [question for question, _ in sample.turns] != []
