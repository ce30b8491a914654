import pytest
import torch

from atr.micro.drawing import SIZE
from atr.micro.model import build_model, build_processor
from atr.micro.scoring import generate_answers, score_benchmark
from atr.micro.vocabulary import VOCABULARY
from atr.micro.world import sample


@pytest.fixture(scope="module")
def processor():
    return build_processor(VOCABULARY, SIZE)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return build_model(processor, SIZE, width=64, layers=1).eval()


def test_a_saved_model_answers_the_same_when_loaded(model, processor, tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    samples = [sample("docs", "train", index, 0) for index in range(5)]
    images, questions = [s.image for s in samples], [s.turns[0][0] for s in samples]
    said = generate_answers(model, processor, images, questions, batch_size=2)
    assert len(said) == 5
    assert generate_answers(loaded, AutoProcessor.from_pretrained(tmp_path), images, questions) == said


def test_a_score_is_the_fraction_of_right_first_answers(monkeypatch):
    samples = [sample("docs", "evaluate", index, 0) for index in range(4)]
    replies = [samples[0].turns[0][1], "wrong", samples[2].turns[0][1], samples[3].turns[0][1]]

    def generate(model, processor, images, questions, shorten):
        assert [*questions] == [drawn.turns[0][0] for drawn in samples]
        assert [image.tobytes() for image in images] == [drawn.image.tobytes() for drawn in samples]
        return replies

    monkeypatch.setattr("atr.micro.scoring.generate_answers", generate)
    assert score_benchmark(None, None, "docs", "evaluate", 4, 0) == 0.75
