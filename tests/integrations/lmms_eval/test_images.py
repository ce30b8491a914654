import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from atr.integrations.lmms_eval.images import Rounding, pass_through_jpeg

side = st.integers(28, 3000)


@given(side, side, st.sampled_from([28, 32]), st.integers(4, 64), st.integers(64, 4096))
def test_sizes_are_those_of_transformers_own_resizing(width, height, multiple, low, high):
    rounding = Rounding(multiple, low * multiple**2, high * multiple**2)
    rows, columns = smart_resize(height, width, multiple, rounding.low, rounding.high)
    assert rounding.size(width, height) == (columns, rows)


def test_an_image_smaller_than_a_token_is_enlarged():
    assert Rounding.of(28).size(3, 5) == (56, 84)  # four tokens at least
    assert Rounding(28, 1, 10**6).size(3, 5) == (28, 28)


def test_an_image_too_long_is_refused():
    with pytest.raises(ValueError, match="image: 2010 x 10 is too long, allowed: an aspect up to 200"):
        Rounding.of(28).size(2010, 10)


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (56, 56), (200, 0, 0, 0))
    assert Rounding.of(28).resize(image).getpixel((5, 5)) == (255, 255, 255)
    assert Rounding.of(28).resize(Image.new("L", (56, 56), 7)).getpixel((5, 5)) == (7, 7, 7)


def test_an_image_loses_what_a_jpeg_loses():
    image = Image.linear_gradient("L").convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    assert pass_through_jpeg(image).tobytes() == Image.open(buffer).tobytes() != image.tobytes()
