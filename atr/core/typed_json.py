"""Parses JSON into dataclasses; refuses, in one line, a value that does not match its field's type.

Field types may be str, int, float (which accepts integers), bool, None, Any, other dataclasses, and lists,
tuples, dicts and unions of these. NaN, infinity and text that is not valid Unicode match no type.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from inspect import formatannotation
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Record = TypeVar("Record")

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_record(kind: type[Record], content: Any, where: str, exact: bool = False) -> Record:
    """Convert a decoded JSON object to the dataclass `kind`; `where` names its place in error messages.

    With `exact`, every field and no other key must be present; otherwise fields with a default may be missing
    and unknown keys are ignored. Raises ValueError naming the place, the key and what is allowed.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {short(content)} is not allowed, allowed: a JSON object")
    known, values = _fields(cast(Any, kind)), {}
    for key, (field, hint) in known.items():
        if key in content:
            values[key] = value_of(hint, content[key], f"{where}: {key}")
        elif exact or _is_required(field):
            raise ValueError(f"{where}: {key} is missing, allowed: {_name(hint)}")
    if exact and (unknown := sorted(content.keys() - known)):
        raise ValueError(f"{where}: {short(unknown[0])} is an unknown key, allowed: {', '.join(known)}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def read_records(kind: type[Record], path: Path, exact: bool = False) -> Iterator[Record]:
    """Read a JSON-lines file; raises ValueError as `parse_record`, with the file and line."""
    # splitlines() would also break at Unicode line separators, which are allowed inside a JSON string.
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        where = f"{path} line {number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
            raise ValueError(f"{where} is not valid JSON: {error}") from None
        yield parse_record(kind, content, where, exact)


def value_of(hint: Any, value: Any, where: str) -> Any:
    """Convert a decoded JSON value to the type `hint`; raises ValueError as `parse_record`."""
    if (allowed := _scalars(hint)) is not None:
        if type(value) in allowed and _is_sound(value):
            return value
        raise _refused(hint, value, where)
    if hint is Any:
        return value
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return parse_record(hint, value, where)
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        (other,) = (part for part in parts if part is not NoneType)
        return value_of(other, value, where)
    if origin is dict and isinstance(value, dict):
        return {key: value_of(parts[1], item, f"{where}[{short(key)}]") for key, item in value.items()}
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(parts):
        return tuple(value_of(part, item, where) for part, item in zip(parts, value, strict=True))
    if origin in (list, Sequence) and isinstance(value, list):
        allowed = _scalars(parts[0])
        # Nearly all lists are sound; only an item that is not needs its place.
        if allowed is not None and all(type(item) in allowed and _is_sound(item) for item in value):
            return value
        return [value_of(parts[0], item, f"{where}[{place}]") for place, item in enumerate(value)]
    raise _refused(hint, value, where)


def short(value: object) -> str:
    """The value as printable ASCII of at most 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class ListedFile:
    """A file listed in a manifest: its name in the manifest's folder, number of images, and checksum.

    Only plain names are allowed, so that no manifest refers to a file outside its folder. Links are followed,
    as the caches of DVC and of the hub consist of links.
    """

    file: str
    images: int
    sha256: str

    def __post_init__(self) -> None:
        if not _PLAIN_NAME.fullmatch(self.file):
            allowed = "a plain file name, of letters, digits, '.', '_' and '-', in the manifest's own folder"
            raise ValueError(f"file: {short(self.file)} is not allowed, allowed: {allowed}")
        if self.images < 1:
            raise ValueError(f"images: {self.images} is not allowed, allowed: 1 and more")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256: {short(self.sha256)} is not allowed, allowed: 64 hex digits")


def check_distinct(key: str, names: Sequence[str]) -> None:
    """Raise ValueError naming the key and the first name that occurs twice."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{key}: {short(twice[0])} occurs twice, allowed: distinct names")


def _refused(hint: Any, value: Any, where: str) -> ValueError:
    return ValueError(f"{where}: {short(value)} is not allowed, allowed: {_name(hint)}")


def _name(hint: Any) -> str:
    """The type in Python's notation, without module names."""
    return re.sub(r"\w+\.", "", formatannotation(hint))


@cache
def _fields(kind: Any) -> dict[str, tuple[Field[Any], Any]]:
    hints = get_type_hints(kind)
    return {field.name: (field, hints[field.name]) for field in fields(kind) if field.init}


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


@cache
def _scalars(hint: Any) -> frozenset[type] | None:
    """The value types that a scalar type, or a union of scalar types, allows; None for any other type."""
    if get_origin(hint) in (Union, UnionType):
        parts = [_scalars(part) for part in get_args(hint)]
        return None if None in parts else frozenset[type]().union(*filter(None, parts))
    if hint is float:
        return frozenset({float, int})
    return frozenset({hint}) if hint in (str, int, bool, NoneType) else None


def _is_sound(value: object) -> bool:
    """Whether a number is finite, or a text is valid Unicode."""
    if isinstance(value, float):
        return math.isfinite(value)
    # A JSON escape can be half of a surrogate pair, which is not valid Unicode.
    return not isinstance(value, str) or value.isascii() or not _SURROGATE.search(value)
