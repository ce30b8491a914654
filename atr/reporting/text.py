"""Text of the data as a page or a picture may show it: any model may answer anything."""

_KEPT = "\N{NO-BREAK SPACE}"
"""Of what Unicode calls not printable, the one that our own sentences hold."""


def printable(text: str) -> str:
    """The text on one line; what cannot be seen, or turns the direction of what follows, by its number.

    No lone surrogate is left, which JSON may hold and no file can.
    """
    return text if text.isprintable() else "".join(map(_character, text))


def shortened(text: str, most: int = 300) -> str:
    """The printable text, cut where it is longer; results.jsonl has all of it."""
    shown = printable(text[: most + 1])
    return shown if len(text) <= most and len(shown) <= most else f"{shown[: most - 2]} …"


def _character(character: str) -> str:
    if character.isprintable() or character == _KEPT:
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")
