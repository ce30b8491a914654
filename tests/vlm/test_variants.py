import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from atr.config import Evaluate
from atr.vlm.generation import Generator, QuestionBatch
from atr.vlm.inputs import ImageInputs
from atr.vlm.variants import BLOCK, VARIANTS, Variant, after_encoding, deploy, pixel_digest, q4_0, q8_0


@pytest.fixture
def photograph():
    """Smooth, with edges, larger than the tower's 28 pixels and no square."""
    y, x = np.mgrid[:90, :120]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11) * (x > 60)], -1)
    return Image.fromarray((127.5 * (1 + waves)).astype(np.uint8))


@pytest.fixture
def generator(model, processor, photograph):
    source = ImageInputs(model, processor, SimpleNamespace(image=lambda name: photograph))
    return Generator(model, processor, source, Evaluate(positions="original"))


@torch.no_grad()
def seen(generator, variant, needs=()):
    """What reducers are given in a deployment."""
    with deploy(generator, variant) as changed:
        batch = changed.prepare([["p"]], ["a b c"], needs)
        return after_encoding(changed, batch, variant)[1].whole.encoded.whole


@torch.no_grad()
def change(generator, variant, field="features_BND"):
    """Relative change of what is encoded."""
    own, other = (getattr(seen(generator, each, [field]), field).float() for each in (Variant(), variant))
    return float((own - other).norm() / own.norm())


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_changes_its_part_and_restores_the_model(generator, name):
    variant, own = VARIANTS[name], generator.model.model.vision_tower
    before = copy.deepcopy(own.state_dict())
    pixels = change(generator, variant, "pixels_BCHW") if variant.tower is None else 0.0
    assert (pixels > 0) == variant.is_of_images
    features = change(generator, variant)
    assert features < 0.5
    if name in ("batch of one", "contiguous positions") or name.startswith("linear weights"):
        assert features == 0  # no layer of a tower that is 24 wide divides into blocks
    elif name != "eager attention":
        assert features > 1e-5
    assert generator.model.model.vision_tower is own
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())
    assert own.config._attn_implementation == "sdpa" and not own._forward_hooks
    assert "resize" not in vars(generator.processor.image_processor)


def test_the_tower_is_put_back_after_an_error(generator):
    own = generator.model.model.vision_tower
    with pytest.raises(ZeroDivisionError), deploy(generator, VARIANTS["bfloat16 weights"]):
        _ = 1 / 0
    assert generator.model.model.vision_tower is own


def test_features_come_in_the_precision_that_is_named(generator):
    types = {
        "bfloat16 weights": torch.bfloat16,
        "float16 weights": torch.float16,
        "features stored in bfloat16": torch.bfloat16,
        "eager attention": torch.float32,
    }
    for name, dtype in types.items():
        encoded = seen(generator, VARIANTS[name])
        assert encoded.features_BND.dtype == dtype, name
        assert encoded.projected_BND.dtype == torch.float32, "the language model keeps its own"
    stored = seen(generator, VARIANTS["features stored in bfloat16"]).features_BND
    assert torch.equal(stored, seen(generator, Variant()).features_BND.bfloat16())


@torch.inference_mode()
def test_features_rounded_after_the_encoding_are_rounded_for_a_reducer_that_encodes_too(generator):
    encoded = seen(generator, VARIANTS["features stored in bfloat16"], ["pixels_BCHW", "encode"])
    assert torch.equal(encoded.encode(encoded.pixels_BCHW), encoded.features_BND)


@torch.no_grad()
def test_float16_on_a_cpu_rounds_as_torch_does():
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 2), torch.nn.Flatten(), torch.nn.Linear(32, 6))
    tower.device = torch.device("cpu")
    plain, pixels = copy.deepcopy(tower).half(), torch.randn(4, 3, 3, 3).half()
    VARIANTS["float16 weights"].tower(tower)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float16}
    assert tower(pixels).dtype == torch.float16
    torch.testing.assert_close(tower(pixels), plain(pixels), atol=2e-3, rtol=2e-3)


def test_the_digest_of_an_image_tells_whether_its_pixels_change(generator, photograph):
    pictures = SimpleNamespace(image={"small": photograph.crop((0, 0, 28, 28)), "large": photograph}.get)
    source = ImageInputs(generator.model, generator.processor, pictures)
    generator = Generator(generator.model, generator.processor, source, generator.settings)
    with deploy(generator, VARIANTS["resize by Pillow bilinear"]) as changed:
        same = [pixel_digest(changed, name) == pixel_digest(generator, name) for name in ("small", "large")]
    assert same == [True, False]
    assert pixel_digest(generator, "small") != pixel_digest(generator, "large")


def test_kernel_batch_and_positions_are_those_of_the_variant(generator):
    with deploy(generator, VARIANTS["eager attention"]) as changed:
        assert changed.model.model.vision_tower.config._attn_implementation == "eager"
    changed, batch = after_encoding(generator, QuestionBatch(1, {}, None), VARIANTS["contiguous positions"])
    assert (changed.settings.positions, batch.whole) == ("contiguous", None)
    assert generator.settings.positions == "original"
    assert VARIANTS["batch of one"].batch_tokens == 1


def test_more_compression_and_a_poorer_kernel_change_more(generator):
    def pixels(name):
        return change(generator, VARIANTS[name], "pixels_BCHW")

    assert 0 < pixels("JPEG 95") < pixels("JPEG 75") < pixels("JPEG 50")
    antialias, without = (pixels(f"resize by torch bicubic {how}") for how in ("antialias", "no antialias"))
    assert 10 * antialias < without


def test_a_kernel_changes_nothing_of_an_image_that_is_not_resized(generator, photograph):
    small = photograph.crop((0, 0, 28, 28))
    source = ImageInputs(generator.model, generator.processor, SimpleNamespace(image=lambda name: small))
    generator = Generator(generator.model, generator.processor, source, generator.settings)
    for name, variant in VARIANTS.items():
        if name.startswith("resize"):
            assert change(generator, variant, "pixels_BCHW") == 0, name


def test_q8_0_restores_each_weight_to_half_a_step():
    blocks = torch.randn(5, 3, BLOCK, generator=torch.Generator().manual_seed(0))
    largest = blocks.abs().amax(-1, keepdim=True)
    error = (q8_0(blocks) - blocks).abs()
    assert (error <= largest / 127 * 0.5 + largest * 2**-11).all() and error.max() > 0
    assert torch.equal(q8_0(torch.zeros(1, 1, BLOCK)), torch.zeros(1, 1, BLOCK))


def test_q4_0_is_that_of_llama_cpp():
    """As quantize_row_q4_0_ref rounds: the weight of the largest magnitude, sign and all, is step -8."""
    block = torch.zeros(BLOCK)
    block[:6] = torch.tensor([8.0, -8.0, -7.6, -0.4, 0.6, 3.3])
    # The first of the largest is 8, so the scale is -1 and -8 is out of reach: it becomes -7.
    expected = torch.zeros(BLOCK)
    expected[:6] = torch.tensor([8.0, -7.0, -7.0, 0.0, 1.0, 3.0])
    assert torch.equal(q4_0(block), expected)
    assert torch.equal(q4_0(torch.zeros(BLOCK)), torch.zeros(BLOCK))


def test_quantisation_skips_widths_that_are_no_multiple_of_a_block():
    tower = torch.nn.Sequential(torch.nn.Linear(24, 4), torch.nn.Linear(64, 4), torch.nn.Conv2d(32, 4, 1))
    before = [module.weight.clone() for module in tower]
    VARIANTS["linear weights Q4_0"].tower(tower)
    same = [torch.equal(module.weight, weight) for module, weight in zip(tower, before, strict=True)]
    assert same == [True, False, True]
