"""Families of the user's own, found by entry points of the group `atr.families`."""

from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace

import pytest
import torch

from atr.reduction import Full
from atr.vlm import families
from atr.vlm.families import Tiling, family_of
from atr.vlm.reduce import reduce


class OneTile:
    """One tile per image, its tokens in reverse order."""

    image_keys = frozenset({"pixel_values"})

    def tiling(self, model, inputs):
        return Tiling((1,) * len(inputs["pixel_values"]), (4, 4))

    def pack(self, model, tiling, values_BNC, newline_C, resample):
        return list(values_BNC.flip(1))


ONE_TILE_FAMILY = OneTile()
INCOMPLETE = SimpleNamespace(image_keys=frozenset(), tiling=print)
WITHOUT_KEYS = SimpleNamespace(tiling=print, pack=print)


@pytest.fixture
def install(monkeypatch):
    """Installs entry points of the group, given as (name, value)."""

    def install(*points):
        installed = EntryPoints(EntryPoint(name, value, "atr.families") for name, value in points)
        monkeypatch.setattr(families, "entry_points", installed.select)
        families.family_named.cache_clear()

    yield install
    families.family_named.cache_clear()


@torch.no_grad()
def test_a_family_of_an_entry_point_serves_its_model_type(install, model, process):
    install(("mine", f"{__name__}:ONE_TILE_FAMILY"))
    inputs = process("<image> a")
    own = reduce(model, inputs, Full(), 1.0)
    model.config.model_type = "mine"
    mine = reduce(model, inputs, Full(), 1.0)
    [own_PD], [mine_PD] = (part["mm_encoder_outputs"]["image"].pooler_output for part in (own, mine))
    assert torch.equal(mine_PD, own_PD.flip(0))
    assert families.supported_types() == ["llava", "llava_next", "llava_onevision", "mine"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mine", "no_such_module:MINE", " cannot be imported: ModuleNotFoundError"),
        ("mine", f"{__name__}:NO_SUCH_NAME", " cannot be imported: AttributeError"),
        ("mine", f"{__name__}:OneTile", " is a class, allowed: an object"),
        ("mine", f"{__name__}:INCOMPLETE", " lacks the method pack"),
        ("mine", f"{__name__}:WITHOUT_KEYS", " lacks image_keys, a frozenset of names"),
        (
            "llava",
            f"{__name__}:ONE_TILE_FAMILY",
            " has the name of a built-in family, allowed: a name of its own",
        ),
    ],
)
def test_an_unusable_entry_point_is_named_in_one_line(install, model, name, value, message):
    install((name, value))
    model.config.model_type = name
    with pytest.raises(ValueError) as error:
        family_of(model)
    assert str(error.value).startswith(f"entry point {name} of atr.families ({value}){message}")
    assert "\n" not in str(error.value)


def test_two_entry_points_of_one_name_are_refused(install, model):
    install(("mine", f"{__name__}:ONE_TILE_FAMILY"), ("mine", f"{__name__}:INCOMPLETE"))
    model.config.model_type = "mine"
    with pytest.raises(ValueError, match=r"INCOMPLETE\) has the name of entry point mine .*ONE_TILE"):
        family_of(model)
