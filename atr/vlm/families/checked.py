"""Model types outside the table that `atr check-family` has proven on this machine, per transformers version.

They are kept in a small file of the user's cache folder; a damaged file counts as empty.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from atr.core.files import read_json, write_json

_ON_TRIAL: set[str] = set()


def checked_file() -> Path:
    """The file with the proven types, in the folder that XDG_CACHE_HOME names or in ~/.cache."""
    # The specification has a relative path ignored.
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "atr" / "checked-families.json"


def checked_types() -> frozenset[str]:
    """Model types proven in the installed version of transformers, and those on trial in this process."""
    return frozenset(_read().get(version("transformers"), [])) | _ON_TRIAL


def check_writable() -> None:
    """Write the file as it is; raises OSError naming the file where nothing could be recorded."""
    write_json(checked_file(), _read())


def record_checked(model_type: str) -> None:
    """Add a type to those proven in the installed version of transformers; raises OSError naming the file."""
    proven, installed = _read(), version("transformers")
    proven[installed] = sorted({*proven.get(installed, []), model_type})
    write_json(checked_file(), proven)


@contextmanager
def on_trial(model_type: str) -> Iterator[None]:
    """Let the rule admit a type while it is being proven."""
    added = model_type not in _ON_TRIAL
    _ON_TRIAL.add(model_type)
    try:
        yield
    finally:
        if added:
            _ON_TRIAL.discard(model_type)


def _read() -> dict[str, list[str]]:
    """The proven types of each version; what is no such mapping is left out."""
    try:
        content = read_json(checked_file())
    except (ValueError, OSError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        str(key): [name for name in names if isinstance(name, str)]
        for key, names in content.items()
        if isinstance(names, list)
    }
