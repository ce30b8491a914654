import numpy as np
import pytest
from PIL import Image

from atr.micro.drawing import HANDWRITING, SplitSampler, _load_handwriting
from atr.micro.lessons import (
    ANSWERING_SHARES,
    LESSONS,
    READING_SHARES,
    LessonImages,
    VariedSampler,
    _set_chart_share,
    draw_lesson,
)
from atr.micro.vocabulary import LABELS, TRANSCRIBE
from atr.micro.world import DRAW


def test_the_whole_model_learns_from_images_of_every_benchmark():
    assert set(ANSWERING_SHARES) >= set(DRAW)


def test_another_share_of_charts_keeps_the_ratios_of_the_others():
    assert _set_chart_share(ANSWERING_SHARES, None) is ANSWERING_SHARES
    shares = _set_chart_share(ANSWERING_SHARES, 0.57)
    assert shares["charts"] == 0.57 and sum(shares.values()) == pytest.approx(1)
    rest = {name: share / shares["docs"] for name, share in shares.items() if name != "charts"}
    assert rest == pytest.approx({name: ANSWERING_SHARES[name] / ANSWERING_SHARES["docs"] for name in rest})
    answering = [draw_lesson(index, 0, False, 0.0, charts=0.9).turns for index in range(40)]
    assert sum(turns[0][0] in LABELS for turns in answering) > 30
    reading = [draw_lesson(index, 0, True, 0.0, charts=0.9).turns for index in range(40)]
    assert sum(turns != () and turns[0][0] in LABELS for turns in reading) > 30


@pytest.mark.parametrize("shares", [READING_SHARES, ANSWERING_SHARES])
def test_shares_sum_to_one_over_kinds_that_can_be_drawn(shares):
    assert set(shares) <= set(LESSONS)
    assert sum(shares.values()) == pytest.approx(1)


def test_transcription_is_the_page_from_top_to_bottom():
    for index in range(200):
        lesson = draw_lesson(index, seed=0, reading=False, transcribe=1.0)
        if lesson.turns[0][0] == TRANSCRIBE:
            written = "".join(written.character for written in lesson.characters).replace(":", "")
            assert lesson.turns[0][1].replace(" ", "") == written
            return
    pytest.fail("no page was transcribed")


def test_reading_lessons_have_something_to_read_everywhere():
    lessons = [draw_lesson(index, 0, reading=True, transcribe=0.0) for index in range(50)]
    assert all(lesson.characters or lesson.regions for lesson in lessons)
    assert np.mean([len(lesson.characters) for lesson in lessons]) > 30


def test_the_image_of_a_lesson_answers_its_questions():
    for index in range(200):
        lesson = draw_lesson(index, 0, reading=False, transcribe=0.0)
        questions = [question for question, _ in lesson.turns]
        assert len(set(questions)) == len(questions) > 0
        written = "".join(written.character for written in lesson.characters)
        if lesson.characters:
            assert all(answer in written for _, answer in lesson.turns)


def test_only_lessons_vary_bars_and_handwriting():
    pixels = _load_handwriting()[0][0]
    drawn = Image.fromarray(pixels).resize((70, 70), Image.Resampling.BICUBIC)
    leaning = {drawn.rotate(angle, Image.Resampling.BILINEAR).tobytes() for angle in range(-12, 13)}
    for split in HANDWRITING:
        sampler = SplitSampler(np.random.default_rng(0), split)
        assert {sampler.bar_style() for _ in range(20)} == {("filled", 0.3)}
        assert {sampler.stroke(pixels, 70).tobytes() for _ in range(20)} <= leaning
    varied = VariedSampler(np.random.default_rng(0), "train")
    assert {varied.bar_style()[0] for _ in range(50)} == {"filled", "outline", "none"}
    assert not {varied.stroke(pixels, 70).tobytes() for _ in range(20)} & leaning


def test_half_of_the_grey_photographs_in_lessons_stay_grey():
    varied = VariedSampler(np.random.default_rng(0), "train")
    crops = [np.asarray(varied.photograph("coins")[0], dtype=int) for _ in range(40)]
    grey = sum(bool((crop == crop[..., :1]).all()) for crop in crops)
    assert 10 < grey < 30


@pytest.mark.parametrize("reading", [False, True])
def test_a_repeated_lesson_has_the_same_image_and_other_questions(reading):
    orders, lines = set(), set()
    for index in range(80):
        first, *others = (draw_lesson(index, 0, reading, transcribe=0.0, again=again) for again in range(4))
        for other in others:
            assert other.image.tobytes() == first.image.tobytes()
            assert (other.characters, other.regions) == (first.characters, first.regions)
            orders.add(other.turns == first.turns)
            lines.add(set(other.turns) == set(first.turns))
    assert orders == lines == {False, True}


def test_lesson_images_are_those_of_the_lessons():
    images = LessonImages(6, reading=2, seed=3)
    for index in range(len(images)):
        name, image = images[index]
        assert name == f"lesson/{index:06d}"
        lesson = draw_lesson(index, 3, reading=index < 2, transcribe=0.7, again=2)
        assert image.tobytes() == lesson.image.tobytes()
