"""The paper's ten and OCRBench: prompts word for word, and answers scored by hand, on rows in schema."""

import random
import string
from types import SimpleNamespace

import pytest

from atr.benchmarks import load_benchmark
from atr.datasets import parquet

TEXT = {"textvqa", "docvqa", "infovqa", "chartqa", "mmbench", "ocrbench"}
GENERAL = {"ai2d", "gqa", "mmmu", "mmstar", "scienceqa"}
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def read(repository, name):
    """The examples of a benchmark, through the reader of its files."""
    source = load_benchmark(name).source
    rows = parquet.read_rows(parquet.find_files(str(repository), source.hub, source.files))
    if source.images:
        images = parquet.find_files(str(repository), source.hub, source.images)
        rows = parquet.join_images(rows, images, source.image_key)
    return list(load_benchmark(name).examples(rows))


def test_the_groups_are_the_papers():
    groups = {name: load_benchmark(name).group for name in TEXT | GENERAL}
    assert groups == dict.fromkeys(TEXT, "text") | dict.fromkeys(GENERAL, "general")


@pytest.mark.parametrize("name", sorted(TEXT | GENERAL))
def test_every_row_is_one_question_with_images_that_can_be_read(hub, repository, name):
    examples = read(repository, name)
    assert len(examples) == len(hub.DATASETS[name][2])
    assert all(image.read() for example in examples for image in example.images)


PROMPTS = {
    "textvqa": f"What brand is number 0?\n{SHORT}",
    "docvqa": f"What is the date, 0?\n{SHORT}",
    "infovqa": f"How many?\n{SHORT}",
    "chartqa": "Which value?\nAnswer the question with a single word.",
    "ocrbench": "What is written in the image?",
    "mmbench": "Look at the fruit. Which is it, 0? There are several options:\nA. apple\nB. pear\nC. plum\n\n"
    + LETTER,
    "ai2d": f"Which eats grass?\nA. fox\nB. hare\nC. owl\n{LETTER}",
    "gqa": f"Is it overcast?\n{SHORT}",
    "mmmu": f"Compare <image 1> with <image 2>.\nA. the first\nB. <image 3>\n\n{LETTER}",
    "mmstar": "What is it?\nOptions: A: a cat, B: a dog, C: an owl, D: a hare\n" + LETTER.rstrip("."),
    "scienceqa": f"Which is colder?\nA. ice\nB. tea\n{LETTER}",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_prompt_word_for_word(repository, name):
    assert read(repository, name)[0].question == PROMPTS[name]


def test_hints_and_open_questions(repository):
    assert read(repository, "scienceqa")[1].question == f"Context: Both are water.\n{PROMPTS['scienceqa']}"
    assert read(repository, "mmbench")[1].question.startswith(
        "Which is it, 1? There are several options:\nA. "
    )
    assert read(repository, "mmmu")[1].question == f"How long is it? <image 1>\n\n{SHORT}"


def test_images_of_a_question_in_the_order_of_their_numbers(hub, repository):
    first, second, third = read(repository, "mmmu")
    assert [image.read() for image in first.images] == [hub.png(70 + n) for n in (1, 2, 3)]
    assert [[image.read() for image in example.images] for example in (second, third)] == [
        [hub.png(78)], [hub.png(79)],
    ]  # fmt: skip
    assert (first.choices, second.choices) == (["the first", "<image 3>"], [])
    assert (first.answers, second.answers) == (["B"], ["24/7", "3.429"])


def test_rotations_of_a_question_are_a_unit(repository):
    units = {}
    for example in read(repository, "mmbench"):
        units.setdefault(example.unit, []).append(example)
    assert sorted(units) == ["0", "1", "2", "3"] and {len(unit) for unit in units.values()} == {3}
    for unit in units.values():
        assert {example.choices["ABC".index(example.answers[0])] for example in unit} == {"apple"}
        assert len({tuple(example.choices) for example in unit}) == 3


SCORED = [
    ("textvqa", "a Nokia", ["nokia"] * 3 + ["x"] * 7, [], 0.9),
    ("docvqa", "11/1/1988", ["11/1/1989", "1989"], [], 8 / 9),
    ("docvqa", "no", ["11/1/1989"], [], 0.0),
    ("docvqa", "no", ["nose"], [], 0.0),  # lmms-eval gives a distance of one half 0.5
    ("infovqa", "5 %", ["5%"], [], 2 / 3),
    ("infovqa", "no", ["nose"], [], 0.0),
    ("chartqa", "14.7", ["14"], [], 1.0),
    ("chartqa", "14.71", ["14"], [], 0.0),
    ("chartqa", "yes", ["Yes"], [], 1.0),
    ("ai2d", "B", ["B"], ["fox", "hare"], 1.0),
    ("ai2d", " B. hare", ["B"], ["fox", "hare"], 1.0),
    ("ai2d", "(b)", ["B"], ["fox", "hare"], 1.0),
    ("ai2d", "hare", ["B"], ["fox", "hare"], 0.0),
    ("ai2d", "A. B", ["B"], ["fox", "hare"], 0.0),
    ("gqa", "No.", ["no"], [], 1.0),
    ("gqa", "no, it is clear", ["no"], [], 0.0),
    ("mmstar", "A", ["A"], [], 1.0),
    ("mmstar", "a: a cat", ["A"], [], 1.0),
    ("mmstar", "(C)", ["C"], [], 1.0),
    ("mmstar", "Option D", ["D"], [], 1.0),
    ("mmstar", "The answer is B.", ["B"], [], 1.0),
    ("mmstar", "It is B", ["B"], [], 0.0),
    ("mmstar", "Answer: B", ["B"], [], 0.0),
    ("mmstar", "", ["B"], [], 0.0),
    ("scienceqa", "a", ["A"], ["ice", "tea"], 1.0),
    ("scienceqa", "A. ice", ["A"], ["ice", "tea"], 1.0),
    ("scienceqa", "(A)", ["A"], ["ice", "tea"], 0.0),
    ("scienceqa", "ice", ["A"], ["ice", "tea"], 0.0),
]


@pytest.mark.parametrize("name, prediction, answers, choices, expected", SCORED)
def test_scores_by_hand(name, prediction, answers, choices, expected):
    question = SimpleNamespace(answers=answers, choices=choices)
    assert load_benchmark(name).score(prediction, question) == pytest.approx(expected)


OCRBENCH = [
    ("Regular Text Recognition/IIIT5K/0000", "It says CENTRE.", ["centre"], 1.0),
    ("Regular Text Recognition/IIIT5K/0000", "cent re", ["centre"], 0.0),
    ("Regular Text Recognition/IIIT5K/0000", "the\nCentre", ["The centre"], 1.0),
    ("Regular Text Recognition/IIIT5K/0000", "the\n centre", ["the centre"], 0.0),  # two blanks
    ("Doc-oriented VQA/docVQA/0600", "5 May", ["1 June", " may\n"], 1.0),
    ("Doc-oriented VQA/docVQA/0600", "", ["may"], 0.0),
    ("Key Information Extraction/SROIE/0700", "RM 12.50", ["12.50", "12.5"], 1.0),
    ("Handwritten Mathematical Expression Recognition/HME100k/0999", "x ^ { 2 }\n+ A", ["x^{2} + A"], 1.0),
    ("Handwritten Mathematical Expression Recognition/HME100k/0999", "x ^ { 2 } + a", ["x^{2} + A"], 0.0),
    ("Handwritten Mathematical Expression Recognition/HME100k/0999", "= x^{2} + A .", ["x ^ {2} + A"], 1.0),
]


def ocrbench(kind, prediction, answers):
    return load_benchmark("ocrbench").score(
        prediction, SimpleNamespace(id=f"ocrbench/{kind}", answers=answers)
    )


@pytest.mark.parametrize("kind, prediction, answers, expected", OCRBENCH)
def test_ocrbench_by_hand(kind, prediction, answers, expected):
    assert ocrbench(kind, prediction, answers) == expected


def contained(dataset, prediction, answers):
    """The official rule, letter by letter: no str method of the benchmark's own is used."""
    gap = set(string.whitespace)

    def letters(text):
        while text and text[0] in gap:
            text = text[1:]
        while text and text[-1] in gap:
            text = text[:-1]
        if dataset == "HME100k":
            return [letter for letter in text if letter not in " \n"]
        return [
            " " if letter == "\n" else letter.swapcase() if letter.isupper() else letter for letter in text
        ]

    said = letters(prediction)
    return any(
        said[place : place + len(answer)] == answer
        for answer in map(letters, answers)
        for place in range(len(said) - len(answer) + 1)
    )


@pytest.mark.parametrize("dataset", ["HME100k", "svt", "textVQA"])
def test_ocrbench_is_the_official_rule_on_random_texts(dataset):
    draw = random.Random(dataset)
    scores = []
    for _ in range(3000):
        prediction = "".join(draw.choices("aAb \n\t", k=draw.randrange(9)))
        answers = [
            "".join(draw.choices("aAb \n", k=draw.randrange(1, 4))) for _ in range(draw.randrange(1, 3))
        ]
        scores.append(ocrbench(f"Kind/{dataset}/0001", prediction, answers))
        assert scores[-1] == contained(dataset, prediction, answers), (prediction, answers)
    assert 0 < sum(scores) < len(scores)


def test_an_id_of_ocrbench_says_what_kind_of_text_it_asks_about(hub, repository):
    rows = hub.DATASETS["ocrbench"][2]
    assert [example.id for example in read(repository, "ocrbench")] == [
        f"{row['question_type']}/{row['dataset']}/{number:04d}" for number, row in enumerate(rows)
    ]
