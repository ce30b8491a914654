"""Prepared images on disk: parquet files of PNG bytes with a manifest, read one row group at a time."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from atr.core.files import read_json, sha256, whole_file, write_json
from atr.core.typed_json import ListedFile, check_distinct, parse_record
from atr.datasets.decoding import decode

MANIFEST, FORMAT = "manifest.json", 1
FILE_IMAGES = 1024
# Small row groups, so that one image costs the reading of a few.
GROUP_IMAGES = 32
SCHEMA = pa.schema([("id", pa.string()), ("image", pa.binary())])


@dataclass(frozen=True)
class _Prepare:
    """What is read of the section `prepare` that the images were made by."""

    source: str
    prompts: list[str]
    split: str


@dataclass(frozen=True)
class _Parameters:
    """What is read of the parameters that the images were made by."""

    seed: int
    prepare: _Prepare


@dataclass(frozen=True)
class _Manifest:
    """What a manifest has to say; raises ValueError naming the key that is not allowed."""

    format: int
    parameters: _Parameters
    files: list[ListedFile]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format: {self.format} is not allowed, allowed: {FORMAT}")
        check_distinct("files", [entry.file for entry in self.files])


def save_images(folder: Path, images: Iterable[tuple[str, Image.Image]], parameters: dict[str, Any]) -> None:
    """Write (id, image) pairs as parquet files and, last, the manifest that lists them.

    `parameters` are those of the stage prepare, or what is read of them: seed, prepare.source, .prompts and
    .split.
    """
    folder, rows = Path(folder), _encoded(images)
    files: list[dict[str, str | int]] = []
    while stretch := list(islice(rows, FILE_IMAGES)):
        path = folder / f"images-{len(files):05d}.parquet"
        with whole_file(path) as temporary:
            pq.write_table(
                pa.Table.from_pylist(stretch, SCHEMA),
                temporary,
                row_group_size=GROUP_IMAGES,
                compression="none",
            )
        files.append({"file": path.name, "images": len(stretch), "sha256": sha256(path)})
    write_json(folder / MANIFEST, {"format": FORMAT, "parameters": parameters, "files": files})


def _encoded(images: Iterable[tuple[str, Image.Image]]) -> Iterator[dict[str, str | bytes]]:
    for name, image in images:
        buffer = io.BytesIO()
        image.save(buffer, format="png", compress_level=1)
        yield {"id": name, "image": buffer.getvalue()}


class PreparedImages(Sequence[tuple[str, Image.Image]]):
    """The images of a prepared folder, in order: `images[i]` is (id, RGB image).

    Raises ValueError naming the file, and the row and id of a single image, if it is missing, of another
    number of images than listed, corrupt, or (with `verify`, which reads every file once) edited since. Of
    the processes that share a folder it is enough that one verifies it.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise ValueError(f"{self.folder / MANIFEST} is missing; the stage prepare writes it")
        content = read_json(self.folder / MANIFEST)
        listed = parse_record(_Manifest, content, str(self.folder / MANIFEST)).files
        self.parameters: dict[str, Any] = content["parameters"]
        self._digests = {entry.file: entry.sha256 for entry in listed}
        self.ids = [name for entry in listed for name in self._ids(entry, verify)]
        check_distinct(f"{self.folder / MANIFEST}: image ids", self.ids)
        self._places = [(entry.file, row) for entry in listed for row in range(entry.images)]
        self._indices = {name: index for index, name in enumerate(self.ids)}

    def _ids(self, entry: ListedFile, verify: bool) -> list[str]:
        path, manifest = self.folder / entry.file, self.folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{path} is missing, though {manifest} lists it")
        other = f"{path} is not the file that {manifest} lists: it was changed or cut off"
        if verify and sha256(path) != entry.sha256:
            raise ValueError(other)
        try:
            is_ours = pq.read_schema(path).equals(SCHEMA)
            names: list[str] = pq.read_table(path, columns=["id"])["id"].to_pylist() if is_ours else []
        except (pa.ArrowException, OSError) as error:
            raise ValueError(other) from error
        if len(names) != entry.images or None in names:
            raise ValueError(other)
        return names

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[str, Image.Image]:  # type: ignore[override]  # no slices
        file, row = self._places[index]
        contents = _row_group(self.folder / file, self._digests[file], row // GROUP_IMAGES)
        content = contents[row % GROUP_IMAGES]
        return self.ids[index], decode(content, f"{self.folder / file} row {row} (image {self.ids[index]})")

    def image(self, name: str) -> Image.Image:
        """The image with this id."""
        if name not in self._indices:
            raise ValueError(f"{self.folder} has no image {name}")
        return self[self._indices[name]][1]


@lru_cache(maxsize=4)
def _row_group(path: Path, digest: str, group: int) -> list[bytes]:
    # The digest tells a file from another one that has taken its place since.
    with pq.ParquetFile(path) as file:
        contents: list[bytes] = file.read_row_group(group, columns=["image"])["image"].to_pylist()
    return contents
