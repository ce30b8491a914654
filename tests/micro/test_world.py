import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from atr.datasets.photographs import PHOTOGRAPHS, photograph
from atr.micro import drawing
from atr.micro.drawing import HANDWRITING, SIZE
from atr.micro.lessons import draw_lesson
from atr.micro.vocabulary import ANSWER_WORDS, QUESTION_WORDS, WORDS
from atr.micro.world import DRAW, sample

BENCHMARKS = tuple(DRAW)


def test_the_world_needs_no_module_of_the_training():
    """Stage prepare depends on these files alone, so that changes of the training do not rerun it."""
    code = "import sys, atr.micro.world; print(*sorted(name for name in sys.modules if 'micro.' in name))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == ["atr.micro.drawing", "atr.micro.vocabulary", "atr.micro.world"]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BENCHMARKS),
    st.sampled_from(sorted(HANDWRITING)),
    st.integers(0, 10**6),
    st.integers(0, 2**32 - 1),
)
def test_a_sample_depends_on_its_arguments_alone(benchmark, split, index, seed):
    once = sample(benchmark, split, index, seed)
    sample(benchmark, split, index + 1, seed)
    again = sample(benchmark, split, index, seed)
    assert once.turns == again.turns
    assert once.characters == again.characters
    np.testing.assert_array_equal(np.asarray(once.image), np.asarray(again.image))
    assert once.image.size == (SIZE, SIZE)
    assert once.image.mode == "RGB"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BENCHMARKS), st.integers(0, 10**6))
def test_questions_of_an_image_never_contradict(benchmark, index):
    turns = sample(benchmark, "evaluate", index, 0).turns
    questions = [question for question, _ in turns]
    assert len(set(questions)) == len(questions) > 0
    assert set(questions) <= set(QUESTION_WORDS)
    assert all(answer.isdigit() or answer in ANSWER_WORDS for _, answer in turns)


@pytest.mark.parametrize(
    "place", [("docs", "train", 0, 1), ("docs", "evaluate", 0, 0), ("docs", "train", 1, 0)]
)
def test_seed_split_and_index_each_change_the_sample(place):
    assert sample(*place).turns != sample("docs", "train", 0, 0).turns


class Windowed:
    """A photograph that records which box of the whole each resize reads."""

    def __init__(self, name, box, noted):
        self.name, self.box, self.noted = name, box, noted
        self.width, self.height = self.size = box[2] - box[0], box[3] - box[1]

    def crop(self, box):
        left, top = self.box[:2]
        inside = (left + box[0], top + box[1], left + box[2], top + box[3])
        return Windowed(self.name, inside, self.noted)

    def resize(self, size, resample, box):
        assert 0 <= box[0] < box[2] <= self.width and 0 <= box[1] < box[3] <= self.height
        # A bilinear resize reads beyond the box, by one pixel of the result, but not beyond the image.
        reach = [-(-(end - start) // side) for start, end, side in zip(box, box[2:], size, strict=False)]
        left, top = max(0, box[0] - reach[0]), max(0, box[1] - reach[1])
        right, bottom = min(self.width, box[2] + reach[0]), min(self.height, box[3] + reach[1])
        self.noted.append((self.name, self.crop((left, top, right, bottom)).box))
        return Image.new("RGB", size, (90, 120, 150))


class Noting:
    """A sequence that records which items are taken."""

    def __init__(self, items, noted):
        self.items, self.noted = items, noted

    def __getitem__(self, index):
        self.noted.append(index)
        return self.items[index]


@pytest.fixture(scope="module")
def drawn():
    """The boxes of photographs, digits and fonts that each split and the lessons use."""
    noted = {"photographs": [], "digits": [], "fonts": []}
    sizes = {name: photograph(name).size for name in PHOTOGRAPHS}
    (pixels, digits), font = drawing._load_handwriting(), drawing._load_font

    def whole(name):
        return Windowed(name, (0, 0, *sizes[name]), noted["photographs"])

    def named(name, size):
        noted["fonts"].append(name)
        return font(name, size)

    draws = {
        split: [(sample, (name, split, index, 0)) for name in BENCHMARKS for index in range(100)]
        for split in HANDWRITING
    }
    draws["lessons"] = [(draw_lesson, (index, 0, index % 2 == 0, 0.0)) for index in range(300)]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "photograph", whole)
        patch.setattr(drawing, "_photograph_part", drawing._photograph_part.__wrapped__)
        patch.setattr(drawing, "_load_handwriting", lambda: (Noting(pixels, noted["digits"]), digits))
        patch.setattr(drawing, "_load_font", named)
        for split, calls in draws.items():
            for of in noted.values():
                of.clear()
            for call, place in calls:
                call(*place)
            found[split] = {key: set(of) for key, of in noted.items()}
    return found


def seen(drawn, key, but):
    return set().union(*(found[key] for split, found in drawn.items() if split != but))


def test_evaluation_shares_no_pixel_of_a_photograph(drawn):
    held_out, others = drawn["evaluate"]["photographs"], seen(drawn, "photographs", "evaluate")
    for name in PHOTOGRAPHS:
        width, height = photograph(name).size
        read = [np.zeros((height, width), bool) for _ in range(2)]
        for mask, boxes in zip(read, (held_out, others), strict=True):
            for _, (left, top, right, bottom) in (each for each in boxes if each[0] == name):
                mask[top:bottom, left:right] = True
        assert not (read[0] & read[1]).any(), name
        # Both parts are large, and together they cover most of the photograph.
        assert min(mask.mean() for mask in read) > 0.2 and (read[0] | read[1]).mean() > 0.8, name


def test_evaluation_and_validation_share_no_handwriting(drawn):
    for split in ("evaluate", "validation"):
        assert len(drawn[split]["digits"]) > 50
        assert not drawn[split]["digits"] & seen(drawn, "digits", split)
    assert all(found["digits"] < set(range(1797)) for found in drawn.values())


def test_the_first_and_last_handwriting_of_splits_do_not_overlap(monkeypatch):
    """The ends of each range, which samples seldom hit."""
    ground, written, spans = Image.new("RGB", (SIZE, SIZE)), [], {}
    pixels, digits = drawing._load_handwriting()
    monkeypatch.setattr(drawing, "_load_handwriting", lambda: (Noting(pixels, written), digits))
    for split in HANDWRITING:
        sampler = drawing.SplitSampler(np.random.default_rng(0), split)
        for end in (min, max):
            monkeypatch.setattr(
                drawing.SplitSampler, "integer", lambda sampler, *bounds, end=end: end(bounds)
            )
            drawing.draw_digit(sampler, ground, (0, 0), SIZE)
        spans[split] = set(range(written[-2], written[-1] + 1))
    assert spans["train"] == spans["pretrain"] and all(spans.values())
    separate = [spans[split] for split in ("train", "validation", "evaluate")]
    assert not any(one & other for one, other in itertools.combinations(separate, 2))


def test_one_font_occurs_in_evaluation_only(drawn):
    assert drawn["evaluate"]["fonts"] - seen(drawn, "fonts", "evaluate") == {drawing.HELD_OUT_FONT}
    assert all(drawn[split]["fonts"] == set(drawing.FONTS) for split in drawn if split != "evaluate")


@pytest.mark.parametrize("benchmark", ["docs", "signs", "charts"])
def test_characters_bear_the_question_of_their_line(benchmark):
    for index in range(50):
        drawn = sample(benchmark, "pretrain", index, 0)
        for question, answer in drawn.turns:
            written = [w.character for w in drawn.characters if w.names[0] == question]
            assert answer in "".join(written)
            if answer in WORDS:
                named = [w.character for w in drawn.characters if w.names == (question, answer)]
                assert "".join(named) == answer


def test_shapes_never_run_out_of_room():
    """Three big shapes can leave no room for the fourth; one of these indices once looped forever."""
    for index in range(333_700, 334_400):
        assert len(sample("shapes", "train", index, 0).turns) == 4


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["shapes", "digits", "scenes", "signs"]), st.integers(0, 10**6))
def test_regions_lie_in_the_image_and_bear_the_answers(benchmark, index):
    drawn = sample(benchmark, "validation", index, 0)
    for region in drawn.regions:
        left, top, right, bottom = region.box
        assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
    named = {name for region in drawn.regions for name in region.names}
    answers = {answer for question, answer in drawn.turns if question in ("colour", "kind", "scene", "digit")}
    assert answers <= named
