"""Annotations of prepared images: the prompts to ask about each, and where its text is."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from atr.core.typed_json import check_distinct, read_records
from atr.datasets.prepared import IMAGE_MANIFEST, changed_file_error, check_listed, read_manifest

PROMPT_ANNOTATION = "prompts"
TEXT_ANNOTATION = "text_centres"


@dataclass(frozen=True)
class _Prompts:
    """A line of prompts.jsonl."""

    image: str
    prompts: list[str]


@dataclass(frozen=True)
class _TextCentres:
    """A line of text_centres.jsonl."""

    image: str
    text_centres: list[tuple[float, float]]


_Line = TypeVar("_Line", _Prompts, _TextCentres)


def load_prompts(folder: Path) -> dict[str, list[str]]:
    """The prompts that stage distill asks about each image of a prepared folder, by image id.

    Raises ValueError naming a file that is missing or was changed, or the line and key that are invalid.
    """
    return {line.image: line.prompts for line in _read(Path(folder), _Prompts, PROMPT_ANNOTATION)}


def load_text_centres(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Centre (x, y) of each written character, as fractions of the sides, by image id.

    Only drawn images have centres. Errors as in `load_prompts`.
    """
    return {line.image: line.text_centres for line in _read(Path(folder), _TextCentres, TEXT_ANNOTATION)}


def _read(folder: Path, kind: type[_Line], annotation: str) -> Iterable[_Line]:
    (manifest, _), path = read_manifest(folder), folder / f"{annotation}.jsonl"
    if not manifest.files:
        return []
    entries = [entry for entry in manifest.annotations if entry.file == path.name]
    if not entries:
        raise ValueError(f"{folder / IMAGE_MANIFEST} lists no {path.name}; the stage prepare writes it")
    check_listed(folder, entries[0], verify=True)
    lines = list(read_records(kind, path, exact=True))
    check_distinct(f"{path}: image", [line.image for line in lines])
    if len(lines) != sum(entry.images for entry in manifest.files):
        raise changed_file_error(path, folder / IMAGE_MANIFEST)
    return lines
