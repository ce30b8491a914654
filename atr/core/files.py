"""Atomic files: every output of a stage is written by these functions, and appears whole or not at all."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LOCK = ".lock"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that replaces it if the block succeeds.

    Raises OSError naming `path` when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        with _temporary_beside(path) as temporary:
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that replaces it if the block succeeds."""
    path = Path(path)
    with _temporary_beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        if path.exists():
            # Removing the old folder in place takes long; a kill meanwhile would lose both old and new.
            os.replace(path, temporary.with_name(f"{path.name}.former"))
        os.replace(temporary, path)


@contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in a folder beside `path` that this process keeps locked.

    First removes what killed processes left beside `path`. The system releases a process's lock however the
    process ends, also on another machine or in another container, so an unlocked folder is a leftover.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in path.parent.glob(".*.part"):
        _remove_leftover(part)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with open(part / "unlocked", "x") as lock:
            with suppress(OSError):  # on a file system without locks, leftovers stay
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.replace(part / "unlocked", part / _LOCK)
            yield part / path.name
    finally:
        _remove(part)


def _remove_leftover(part: Path) -> None:
    """Remove a temporary folder whose process has ended."""
    with suppress(OSError), open(part / _LOCK, "r+") as lock:  # locked, not yet locked, or removed meanwhile
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(part)


def _remove(part: Path) -> None:
    """Remove a temporary folder, the lock last: it alone tells a leftover from a folder in use."""
    for content in part.glob("*"):
        if content.is_dir():
            shutil.rmtree(content, ignore_errors=True)
        elif content.name != _LOCK:
            content.unlink(missing_ok=True)
    shutil.rmtree(part, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text to `path` atomically."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted keys, so that equal content gives equal bytes; raises ValueError for NaN."""
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises ValueError naming the file if it is missing or invalid."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def plain_name(name: object) -> str:
    """Return `name` if it can be part of a file name or a metric's name.

    Raises ValueError for a name that could leave its folder or that MLflow refuses.
    """
    if not (isinstance(name, str) and re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name)):
        shown = repr(name)[:80]
        raise ValueError(f"{shown} is no name, allowed: at most 64 small letters, digits, '_' and '-'")
    return name


def digest(**depends_on: Any) -> str:
    """Hash of JSON values; names unfinished work by all that it depends on, so that none is resumed stale."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, pattern: str = "*") -> str:
    """Hash of the names and contents of all files under a folder that match `pattern`."""
    files = sorted(path for path in Path(folder).rglob(pattern) if path.is_file())
    return digest(files={path.relative_to(folder).as_posix(): sha256(path) for path in files})
