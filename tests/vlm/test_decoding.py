import pytest

from atr.reduction.peers.random import Random
from atr.vlm.decoding import decode_greedily
from atr.vlm.policy import Policy
from atr.vlm.prefix import split_prompts
from atr.vlm.reduce import prepare

FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
PROMPTS = ["<image> a", "<image> b c d", "k <image> e", "<image> f g", "<image> h i j k l", "<image> m"]
ENDS = [2, 5, 11, 17, 23, 29]
"""So many that answers of random weights end after different numbers of tokens."""


@pytest.fixture
def reduced(model, process, make_pictures):
    prepared = prepare(model, process(*PROMPTS, images=[make_pictures(1)] * len(PROMPTS)))
    return prepared.reduce(Random(0), Policy(0.5))


def options(**more):
    return {"do_sample": False, "max_new_tokens": 6, "eos_token_id": ENDS, "pad_token_id": 0, **more}


def until_the_end(ids_BL, start):
    """The ids of each row up to its first end behind the prompt of `start` tokens."""
    rows = []
    for row in ids_BL.tolist():
        ends = [place for place in range(start, len(row)) if row[place] in ENDS]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


@pytest.fixture(params=[True, False], ids=["shared", "separate"])
def split(request, model, reduced):
    return split_prompts(model, reduced, [0] * len(PROMPTS)) if request.param else None


@FAMILIES
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.7}, {"min_new_tokens": 3}])
def test_answers_are_those_of_generate(model, reduced, split, more):
    expected = until_the_end(model.generate(**reduced, **options(**more)), reduced["input_ids"].shape[1])
    assert len(set(map(len, expected))) > 1
    assert (
        model.generate(**reduced, **options(**more), custom_generate=decode_greedily, split=split) == expected
    )


def test_an_empty_cache_of_either_name_is_not_read(model, reduced, split):
    """generate of transformers 5.24 calls it `cache`."""

    def with_cache(*arguments, past_key_values, **inputs):
        return decode_greedily(*arguments, split=split, cache=past_key_values, **inputs)

    expected = model.generate(**reduced, **options(), custom_generate=decode_greedily, split=split)
    assert model.generate(**reduced, **options(), custom_generate=with_cache) == expected


def rows_read(model, monkeypatch, **given):
    """Prompts that are read in each step."""
    read, forward = [], model.model.language_model.forward
    monkeypatch.setattr(
        model.model.language_model,
        "forward",
        lambda **inputs: read.append(inputs["inputs_embeds"].shape[:2].numel()) or forward(**inputs),
    )
    ids = model.generate(**given, custom_generate=decode_greedily)
    monkeypatch.undo()
    return ids, read


def test_a_prompt_whose_answer_ended_is_not_read_any_more(model, reduced, split, monkeypatch):
    ids, read = rows_read(model, monkeypatch, **reduced, **options(), split=split)
    start = reduced["input_ids"].shape[1]
    lengths = [len(row) - start for row in ids]
    # The first token of an answer comes from the prompt; each other one from reading the one before it.
    steps = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    if split is None:
        assert read[1:] == steps
    else:  # padded to the prefix with the most answers that have not ended
        assert all(have >= need for have, need in zip(read[2:], steps, strict=True))
        assert read[-1] < len(PROMPTS)


def test_with_a_logits_processor_every_step_has_all_prompts(model, reduced, monkeypatch):
    _, read = rows_read(model, monkeypatch, **reduced, **options(repetition_penalty=1.7))
    assert set(read[1:]) == {len(PROMPTS)}
