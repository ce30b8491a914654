"""Pretraining images from a folder of image files."""

import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from atr.core.typed_json import check_distinct
from atr.datasets.decoding import decode

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def sample_pictures(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield a seeded sample of `count` images below the folder, as (relative path, RGB image).

    Links to files and folders are followed, each folder once; hidden files and folders are skipped. Control
    characters and bytes that are not UTF-8 are escaped in the paths. Raises ValueError naming the folder if
    it contains fewer images, a file that cannot be decoded, or a broken link.
    """
    folder = Path(folder)
    paths = sorted(_pictures(folder))
    if len(paths) < count:
        raise ValueError(f"{folder} holds {len(paths)} pictures, prepare.images asks for {count}")
    chosen = sorted(random.Random(seed).sample(paths, count))
    names = [_printable(path.relative_to(folder)) for path in chosen]
    check_distinct(f"{folder}: names of pictures", names)
    for path, name in zip(chosen, names, strict=True):
        yield name, decode(path, _printable(path))


def _pictures(folder: Path) -> Iterator[Path]:
    """Every image file below the folder, by suffix; raises OSError for a folder that cannot be read."""
    seen: set[str] = set()
    roots = [folder]
    for root in roots:  # links found on the way are appended, and so followed after all real folders
        for at, folders, files in os.walk(root, onerror=_refuse):
            real = os.path.realpath(at)
            folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
            if real not in seen:
                seen.add(real)
                roots += [Path(at, name) for name in folders if os.path.islink(Path(at, name))]
                yield from _in_folder(Path(at), files)


def _in_folder(at: Path, files: Sequence[str]) -> Iterator[Path]:
    for path in (at / name for name in files if not name.startswith(".")):
        if path.suffix.lower() in _SUFFIXES:
            if path.is_symlink() and not path.exists():
                raise ValueError(f"{_printable(path)} is a broken link, allowed: pictures or links to them")
            if path.is_file():  # reading a pipe would wait forever
                yield path


def _refuse(error: OSError) -> None:
    raise error


def _printable(path: Path) -> str:
    """The path as text that can be encoded in UTF-8 and printed on one line."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], path.as_posix())
