import numpy as np
from sklearn.datasets import load_digits

from atr.datasets.photographs import PHOTOGRAPHS, photograph
from atr.micro import drawing
from atr.micro.world import sample


def test_the_parts_of_a_photograph_are_cut_from_it_pixel_by_pixel():
    for name in PHOTOGRAPHS:
        shown, held_out = drawing._photograph_part(name, False), drawing._photograph_part(name, True)
        assert min(*shown.size, *held_out.size) >= drawing.SMALLEST_CROP
        together = np.concatenate([np.asarray(shown), np.asarray(held_out)], axis=1)
        np.testing.assert_array_equal(together, np.asarray(photograph(name)))
    assert len(PHOTOGRAPHS) == 12


def test_the_handwriting_holds_no_sample_twice():
    pixels, digits = drawing._load_handwriting()
    assert len({sample.tobytes() for sample in pixels}) == len(pixels) == len(digits) == 1797


def test_the_handwriting_is_that_of_scikit_learn():
    pixels, digits = drawing._load_handwriting()
    expected, labels = load_digits(return_X_y=True)
    np.testing.assert_array_equal(pixels, (expected.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8))
    np.testing.assert_array_equal(digits, labels)


def test_characters_lie_where_the_text_is_drawn():
    """Around each written character there is ink: pixels unlike the page's own colour, its most frequent."""
    for index in range(20):
        page = sample("docs", "train", index, 0)
        pixels = np.asarray(page.image).astype(int)
        colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        ink = np.abs(pixels - colours[counts.argmax()]).sum(-1) > 90
        for _, x, y, _ in page.characters:
            window = ink[max(0, round(y) - 8) : round(y) + 9, max(0, round(x) - 4) : round(x) + 5]
            assert window.any()
        written = "".join(written.character for written in page.characters)
        assert all(f"{key}:{value}" in written for key, value in page.turns)
