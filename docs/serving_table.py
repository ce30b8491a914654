"""Writes the table of docs/peers.md that says which reducers serve which model families, from the code.

python docs/serving_table.py
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from atr.core import catalog, serving

PAGE = Path(__file__).with_name("peers.md")
START, END = "<!-- written by docs/serving_table.py -->\n", "<!-- end -->\n"
NEEDS = {
    "attention": {"attention_BN", "first_attention_BN"},
    "keys": {"keys_BND"},
    "pixels": {"pixels_BCHW"},
    "grid": {"grid"},
    "projected": {"projected_BND"},
    "question": {"text_BD"},
}
"""Columns of fields, any of which a reducer may need."""


def main() -> None:
    """Replace what stands between the two marks of the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + "\n".join(lines()) + "\n" + END + rest.partition(END)[2], "utf-8")


def lines() -> Iterator[str]:
    """The table, a row for each reducer, and the model types that its columns stand for."""
    header = ["reducer", *NEEDS, "merges", "inside", *serving.FAMILY_KINDS.values()]
    yield _row(header)
    yield _row(["---"] * len(header))
    for name in catalog.reducers():
        yield _row([name, *_needs(name), *(_serves(name, kind) for kind in serving.FAMILY_KINDS)])
    yield ""
    for kind, title in serving.FAMILY_KINDS.items():
        yield f"- *{title}*: {_listed(name for name, own in serving.FAMILIES.items() if own == kind)}."
    yield f"- *some* by attention and keys: {_listed(serving.observed_types())}."
    yield f"- *some* that merge: all but {_listed(serving.SEVERAL_LAYERS)}."


def _needs(name: str) -> Iterator[str]:
    traits = catalog.reducer_traits(name)
    for fields in NEEDS.values():
        yield "x" if fields & set(traits.needs) else ""
    yield "x" if traits.merges else ""
    yield "x" if traits.inside_llm else ""


def _serves(name: str, kind: str) -> str:
    """Whether a reducer serves the families of a kind."""
    served = {not serving.serves(name, family) for family, own in serving.FAMILIES.items() if own == kind}
    return "some" if len(served) > 1 else "yes" if served == {True} else "no"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
