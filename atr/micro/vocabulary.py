"""The words of the micro world's images, questions and answers."""

from atr.datasets.photographs import PHOTOGRAPHS

# fmt: off
WORDS = (
    "apple", "bread", "chair", "delta", "eagle", "flame", "grape", "house", "igloo", "jelly",
    "knife", "lemon", "mango", "night", "ocean", "piano", "queen", "river", "stone", "tiger",
    "umbra", "violet", "water", "xenon", "yacht", "zebra", "anchor", "basket", "candle", "dragon",
    "engine", "forest", "garden", "hammer", "island", "jacket", "kettle", "ladder", "magnet",
    "needle",
)
KEYS = (
    "name", "city", "date", "code", "room", "total", "price", "phone", "order", "model", "color",
    "size", "unit", "page", "bank", "team", "gate", "seat", "road", "plan",
)
LABELS = (
    "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec",
)
# fmt: on
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 40),
    "orange": (245, 140, 20),
    "purple": (140, 50, 180),
    "white": (250, 250, 250),
}
"""RGB of each colour of shapes; bars of charts have any of them but white."""
KINDS = ("circle", "square", "triangle")
SIDES = ("left", "right")
TRANSCRIBE = "transcribe"
"""The question that asks for a whole page; only lessons ask it."""

QUESTION_WORDS = (*KEYS, *LABELS, "sign", "colour", "kind", "count", "side", "digit", "scene", TRANSCRIBE)
ANSWER_WORDS = (*WORDS, *COLOURS, *KINDS, *SIDES, *PHOTOGRAPHS)
"""All words in answers; numbers are digits."""
VOCABULARY = (*QUESTION_WORDS, *ANSWER_WORDS)
"""The words of the tokenizer in the order of their ids, which follow special tokens and digits."""
