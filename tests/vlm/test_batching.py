from itertools import chain

import pytest

from atr.vlm.batching import batch_by_tokens

IMAGES = [["x"], ["y"], ["x"], ["z"], ["x"], [], ["x", "y"], ["y", "x"]]
LENGTHS = [2, 3, 4, 3, 2, 5, 2, 2]
VISUAL = dict.fromkeys("xyz", 10)


def test_questions_about_an_image_follow_each_other_and_read_it_once():
    assert batch_by_tokens(IMAGES, LENGTHS, visual=VISUAL, most=36) == [[5], [1, 3], [0, 2, 4], [6], [7]]
    # Three images of 18 tokens at most, padding included: those of the longest.
    assert batch_by_tokens(IMAGES, LENGTHS, visual=VISUAL, most=54) == [[5], [1, 3, 0, 2, 4], [6, 7]]


def test_without_sharing_each_question_reads_its_images():
    batches = batch_by_tokens(IMAGES, LENGTHS, visual=VISUAL, most=36, shares=False)
    assert batches == [[5], [0, 4], [1, 3], [2], [6], [7]]


def test_without_padding_a_batch_has_one_length_except_for_questions_about_an_image():
    batches = batch_by_tokens(IMAGES, LENGTHS, visual=VISUAL, most=1000, pads=False)
    assert batches == [[5], [0, 2, 4], [1, 3], [6, 7]]


def test_more_questions_about_an_image_than_fit_are_split():
    assert batch_by_tokens([["x"]] * 5, [3] * 5, visual=VISUAL, most=17) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("shares", [True, False])
def test_a_batch_has_at_least_one_question_and_their_order_is_the_same(shares, pads):
    single = batch_by_tokens(IMAGES, LENGTHS, VISUAL, 1, shares, pads)
    assert sorted(single) == [[index] for index in range(len(IMAGES))]
    for most in (20, 40, 1000):
        batches = batch_by_tokens(IMAGES, LENGTHS, VISUAL, most, shares, pads)
        assert list(chain(*batches)) == list(chain(*single))


def test_images_count_with_their_own_tokens():
    visual = {"x": 10, "y": 2, "z": 4}
    images, lengths = [["x"], ["y"], ["z"], ["y"]], [1, 1, 1, 2]
    assert batch_by_tokens(images, lengths, visual, most=11) == [[1, 3, 2], [0]]
