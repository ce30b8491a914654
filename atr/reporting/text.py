"""Makes any text in the data safe to show on a page or in a figure."""

_ALLOWED = "\N{NO-BREAK SPACE}"
"""The one character in our own sentences that Unicode does not count as printable."""


def printable(text: str) -> str:
    """The text on one line; invisible characters, direction marks and lone surrogates become escapes."""
    return text if text.isprintable() else "".join(map(_character, text))


def shortened(text: str, most: int = 300) -> str:
    """The printable text, cut to `most` characters; results.jsonl has the full text."""
    shown = printable(text[: most + 1])
    return shown if len(text) <= most and len(shown) <= most else f"{shown[: most - 2]} …"


def _character(character: str) -> str:
    if character.isprintable() or character == _ALLOWED:
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode("ascii")
