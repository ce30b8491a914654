"""`atr families`: the table of supported model types, for the terminal and as docs/families.md."""

from textwrap import fill

from atr.vlm.families import supported_types
from atr.vlm.families.checked import checked_types
from atr.vlm.families.summary import Summary, built_in_types, find_others, summarise_family

COLUMNS = (
    "model type",
    "patches in a token",
    "layout of an image",
    "inputs also need",
    "reducers also get",
    "refused",
    "removed is masked",
    "proven in transformers",
)
_WIDTH = 110
"""Characters of a line of the page."""

PAGE = """# Model families

This page is the output of `atr families --markdown`, which runs a tiny random copy of each model type.
*Proven* means that the tests hold the type to the equality checks of `atr check-family`: with all tokens
kept the model answers bit for bit as if untouched, and without half of them as if they were masked.

{table}

- *Patches in a token*: what the language model is fed as one token, with the default configuration of the
  type; checkpoints may merge more (SmolVLM 16).
- *Layout of an image*: the grids of tokens that an image becomes. Tags are tokens of the text between the
  runs of an image's placeholders; `newline: follow` removes them with their run, as newlines with their
  row.
- *Inputs also need*: token types, which the processor makes. Without them inputs with images are refused,
  as some models would answer wrongly without a word. Every family needs `input_ids`, `attention_mask` and
  the processor's pixels and sizes.
- *Reducers also get*: beside the features that the model reads, the states of a numbered layer of the tower
  (layers), the attention weights and keys of its last layer, the pixels. A reducer that needs more is
  refused.
- *Removed is masked*: whether removing a token is the same function as masking it, by the type's default
  configuration; a checkpoint may have another window. Where it is not, a warning says so once.

## Other model types

These have what `reduce` needs; it serves them on your machine once `atr check-family TYPE` has proven them
there:

{untried}

These do not name `mm_encoder_outputs`, would ignore it without a word, and are refused by name:

{without}"""


def family_lines() -> list[str]:
    """The table for a terminal: all supported types, and those that `atr check-family` has proven here."""
    names = dict.fromkeys([*supported_types(), *sorted(checked_types())])
    rows = [COLUMNS, *(_cells(summarise_family(name)) for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def page() -> str:
    """The page docs/families.md, of the built-in types."""
    names = built_in_types()
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(summarise_family(name)) for name in names)]
    others = find_others(names)
    untried, without = (fill(", ".join(names), _WIDTH) for names in (others.untried, others.without))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return PAGE.format(table=table, untried=untried, without=without)


def _cells(summary: Summary) -> tuple[str, ...]:
    return (
        summary.model_type,
        summary.patches,
        summary.layout,
        summary.needs or "-",
        summary.scores or "-",
        summary.refused or "-",
        summary.removed,
        summary.proven,
    )
