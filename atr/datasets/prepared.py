"""Prepared images on disk: parquet files of PNG images with a manifest, read one row group at a time."""

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from atr.core.files import read_json, sha256, whole_file, write_json, write_text
from atr.core.threads import map_ahead
from atr.core.typed_json import ListedFile, check_distinct, parse_record
from atr.datasets.decoding import decode, read_size

IMAGE_MANIFEST = "manifest.json"
_FORMAT = 1
_FILE_IMAGES = 1024
# Small row groups: reading one image reads its whole group.
_GROUP_IMAGES = 32
# Compressing an image takes about as long as drawing the next one.
_THREADS = 2
_SCHEMA = pa.schema([("id", pa.string()), ("image", pa.binary())])


@dataclass(frozen=True)
class _Prepare:
    """The parameters of section `prepare` that readers of a manifest use."""

    source: str = ""
    """Where pretraining images come from; empty for the images of questions."""


@dataclass(frozen=True)
class _Parameters:
    """Required parameters of stage prepare."""

    seed: int
    prepare: _Prepare


@dataclass(frozen=True)
class Manifest:
    """The manifest of a prepared folder; raises ValueError naming the key that is not allowed."""

    format: int
    parameters: _Parameters
    files: list[ListedFile]
    """Parquet files of images, in their order."""
    annotations: list[ListedFile] = field(default_factory=list)
    """Files with one line per image; see atr.datasets.annotations."""

    def __post_init__(self) -> None:
        if self.format != _FORMAT:
            raise ValueError(f"format: {self.format} is not allowed, allowed: {_FORMAT}")
        check_distinct("files", [entry.file for entry in (*self.files, *self.annotations)])


def save_images(
    folder: Path,
    images: Iterable[tuple[str, Image.Image] | tuple[str, Image.Image, Any]],
    parameters: dict[str, Any],
    annotation: str = "",
) -> None:
    """Write images, given as (id, image), as parquet files and, last, the manifest that lists them.

    With the name of an annotation, images are given as (id, image, value), and the values are written to
    `<annotation>.jsonl`. `parameters` are those of stage prepare; seed and prepare are required.
    """
    folder, lines = Path(folder), list[str]()
    rows = _encode(images, annotation, lines)
    files: list[dict[str, str | int]] = []
    while chunk := list(islice(rows, _FILE_IMAGES)):
        path = folder / f"images-{len(files):05d}.parquet"
        with whole_file(path) as temporary:
            pq.write_table(
                pa.Table.from_pylist(chunk, _SCHEMA),
                temporary,
                row_group_size=_GROUP_IMAGES,
                compression="none",
            )
        files.append(_listed(path, len(chunk)))
    manifest = {"format": _FORMAT, "parameters": parameters, "files": files}
    if lines:
        path = folder / f"{annotation}.jsonl"
        write_text(path, "".join(lines))
        manifest["annotations"] = [_listed(path, len(lines))]
    write_json(folder / IMAGE_MANIFEST, manifest)


def _encode(
    images: Iterable[tuple[str, Image.Image] | tuple[str, Image.Image, Any]],
    annotation: str,
    lines: list[str],
) -> Iterator[dict[str, str | bytes]]:
    """Rows of _SCHEMA, compressed in threads while the next images are made.

    Appends the line of each image's annotation to `lines` on the way.
    """

    def named() -> Iterator[tuple[str, Image.Image]]:
        for name, image, *values in images:
            for value in values:
                lines.append(json.dumps({"image": name, annotation: value}, ensure_ascii=False) + "\n")
            yield name, image

    return map_ahead(_row, named(), _THREADS)


def _row(named: tuple[str, Image.Image]) -> dict[str, str | bytes]:
    name, image = named
    buffer = io.BytesIO()
    image.save(buffer, format="png", compress_level=1)
    return {"id": name, "image": buffer.getvalue()}


def _listed(path: Path, images: int) -> dict[str, str | int]:
    return {"file": path.name, "images": images, "sha256": sha256(path)}


def read_manifest(folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of a prepared folder, and its parameters as they were written; errors as `Manifest`."""
    path = Path(folder) / IMAGE_MANIFEST
    if not path.is_file():
        raise ValueError(f"{path} is missing; the stage prepare writes it")
    content = read_json(path)
    return parse_record(Manifest, content, str(path)), content["parameters"]


def check_listed(folder: Path, entry: ListedFile, verify: bool) -> None:
    """Raise ValueError if a file that the manifest lists is missing or, with `verify`, was changed."""
    path, manifest = folder / entry.file, folder / IMAGE_MANIFEST
    if not path.is_file():
        raise ValueError(f"{path} is missing, though {manifest} lists it")
    if verify and sha256(path) != entry.sha256:
        raise changed_file_error(path, manifest)


def changed_file_error(path: Path, manifest: Path) -> ValueError:
    """The error for a file that differs from the one its manifest lists."""
    return ValueError(f"{path} is not the file that {manifest} lists: it was changed or cut off")


class PreparedImages(Sequence[tuple[str, Image.Image]]):
    """The images of a prepared folder, in order: `images[i]` is (id, RGB image).

    Raises ValueError naming the file (and, for one image, row and id) if it is missing or corrupt, has
    another number of images than listed or, with `verify`, another checksum. Verifying reads every file once;
    of several processes that share a folder, one is enough.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        manifest, self.parameters = read_manifest(self.folder)
        listed = manifest.files
        self._digests = {entry.file: entry.sha256 for entry in listed}
        self.ids = [name for entry in listed for name in self._ids(entry, verify)]
        check_distinct(f"{self.folder / IMAGE_MANIFEST}: image ids", self.ids)
        self._places = [(entry.file, row) for entry in listed for row in range(entry.images)]
        self._indices = {name: index for index, name in enumerate(self.ids)}

    def _ids(self, entry: ListedFile, verify: bool) -> list[str]:
        check_listed(self.folder, entry, verify)
        path, manifest = self.folder / entry.file, self.folder / IMAGE_MANIFEST
        try:
            is_ours = pq.read_schema(path).equals(_SCHEMA)
            names: list[str] = pq.read_table(path, columns=["id"])["id"].to_pylist() if is_ours else []
        except (pa.ArrowException, OSError) as error:
            raise changed_file_error(path, manifest) from error
        if len(names) != entry.images or None in names:
            raise changed_file_error(path, manifest)
        return names

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[str, Image.Image]:  # type: ignore[override]  # no slices
        content, place = self._content(index)
        return self.ids[index], decode(content, place)

    def _content(self, index: int) -> tuple[bytes, str]:
        """The file of an image, and the place of it that errors name."""
        file, row = self._places[index]
        contents = _row_group(self.folder / file, self._digests[file], row // _GROUP_IMAGES)
        return contents[row % _GROUP_IMAGES], f"{self.folder / file} row {row} (image {self.ids[index]})"

    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each image; every file is read, and no image decoded."""
        return [read_size(*self._content(index)) for index in range(len(self))]

    def image(self, name: str) -> Image.Image:
        """The image with this id."""
        return self[self._index(name)][1]

    def size(self, name: str) -> tuple[int, int]:
        """(width, height) of the image with this id, which is not decoded."""
        return read_size(*self._content(self._index(name)))

    def _index(self, name: str) -> int:
        if name not in self._indices:
            raise ValueError(f"{self.folder} has no image {name}")
        return self._indices[name]


@lru_cache(maxsize=4)
def _row_group(path: Path, digest: str, group: int) -> list[bytes]:
    # The digest is part of the cache's key, so that a replaced file is read again.
    with pq.ParquetFile(path) as file:
        contents: list[bytes] = file.read_row_group(group, columns=["image"])["image"].to_pylist()
    return contents
