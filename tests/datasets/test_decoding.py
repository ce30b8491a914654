import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from atr.datasets.decoding import decode


def encoded(image, format="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def pixel(content, place=(0, 0)):
    image = decode(content, "x")
    assert image.mode == "RGB"
    return image.getpixel(place)


def noise(width=40, height=30):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(1, 1), (10_000, 20), (1, 3), (3, 1)])
def test_any_size(size):
    image = decode(encoded(Image.new("RGB", size, (10, 20, 30))), "x")
    assert (image.size, image.mode, image.getpixel((0, 0))) == (size, "RGB", (10, 20, 30))


@pytest.mark.parametrize("format", ["png", "bmp", "webp", "tiff"])
def test_plain_colour_is_unchanged(format):
    options = {"lossless": True} if format == "webp" else {}
    picture = noise()
    np.testing.assert_array_equal(
        np.asarray(decode(encoded(picture, format, **options), "x")), np.asarray(picture)
    )


def test_a_path_is_read_like_its_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(noise()))
    assert decode(tmp_path / "a.png", "x").tobytes() == noise().tobytes()


def test_what_is_transparent_lies_on_white():
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth of black over white
    content = encoded(image)
    assert [pixel(content, (x, 0)) for x in range(3)] == [(255, 255, 255), (200, 0, 0), (204, 204, 204)]
    assert pixel(encoded(Image.new("LA", (1, 1), (0, 0)))) == (255, 255, 255)


def test_opaque_rgba_is_its_colours():
    picture = noise().convert("RGBA")
    assert decode(encoded(picture), "x").tobytes() == noise().tobytes()


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 60, 50, 40])
    image.putpixel((1, 0), 1)
    assert [pixel(encoded(image), (x, 0)) for x in range(2)] == [(9, 8, 7), (60, 50, 40)]
    assert [pixel(encoded(image, transparency=1), (x, 0)) for x in range(2)] == [(9, 8, 7), (255, 255, 255)]


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_16_bit_grey_keeps_its_upper_byte(format):
    values = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = decode(encoded(Image.fromarray(values), format), "x")
    assert np.asarray(image)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 0x12, 0x80, 0xFF)]


def test_32_bit_grey():
    within = Image.fromarray(np.array([[0x1234, 0xFFFF]], dtype=np.int32))
    assert np.asarray(decode(encoded(within, "tiff"), "x"))[0, :, 0].tolist() == [0x12, 0xFF]
    for values in (np.array([[2**16]], np.int32), np.array([[-1]], np.int32), np.array([[0.5]], np.float32)):
        with pytest.raises(
            ValueError, match=r"deep.tif cannot be read as an image: mode [IF] \(32-bit grey\)"
        ):
            decode(encoded(Image.fromarray(values), "tiff"), "deep.tif")


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_bilevel(mode):
    assert pixel(encoded(Image.new(mode, (1, 1), 255))) == (255, 255, 255)


def test_cmyk():
    assert pixel(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "jpeg")) == (255, 255, 255)
    red, green, blue = pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpeg", quality=95))
    assert red > 245 and green < 10 and blue < 10


@pytest.mark.parametrize("format", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame(format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if format == "webp" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert pixel(content) == (255, 0, 0)


@pytest.mark.parametrize("format", ["png", "jpeg", "gif", "bmp", "webp", "tiff"])
def test_a_truncated_file_is_named(format):
    content = encoded(noise(200, 200), format)
    with pytest.raises(ValueError, match=r"photos/a.x cannot be read as an image: \S"):
        decode(content[: len(content) // 2], "photos/a.x")


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n", encoded(noise())[:40]])
def test_what_is_no_picture_is_named(content):
    with pytest.raises(ValueError, match="row 3 cannot be read as an image"):
        decode(content, "row 3")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ValueError, match=f"{path} cannot be read as an image"):
            decode(path, str(path))


def bomb(side):
    """A PNG of a few kilobytes that unpacks to side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_unopened():
    content = bomb(16_000)
    assert len(content) < 100_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"bomb.png cannot be read as an image: .*decompression bomb"):
            decode(content, "bomb.png")
    assert pixel(bomb(8)) == (0, 0, 0)
