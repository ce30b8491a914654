"""Datasets as parquet files, on the hub or in a folder; the images of a row are read lazily.

pyarrow and huggingface_hub suffice; the package `datasets` would copy every file into a cache of its own and
add a dozen dependencies.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from atr.core.hub import split_revision

HUB = "hub"
_HINT = "hint"
"""The only column in which null is allowed: not every question has a hint."""
_IMAGE = re.compile(r"image(_\d+)?")
"""Names of image columns in the benchmarks' datasets."""
_BINARY = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
    pa.types.is_null,
)


@dataclass(frozen=True)
class ImageCell:
    """The image in a cell of a parquet file, read on demand."""

    path: Path
    row: int
    column: str

    def __str__(self) -> str:
        """File, row and column, for error messages."""
        return f"{self.path.name} row {self.row} column {self.column}"

    def read(self) -> bytes:
        """Read the encoded image; raises ValueError naming file, row and column if the cell is empty."""
        group, offset = _place(self.path, self.row)
        cell = _cells(self.path, group, self.column)[offset]
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if not content:
            raise ValueError(f"{self} holds no image")
        return bytes(content)


class TableRow(dict[str, Any]):
    """The values of one row by column.

    `row[column]` raises ValueError naming file and row if the column is missing, or is null and not `hint`.
    """

    def __init__(self, path: Path, number: int, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._place = f"{path} row {number}"

    def __getitem__(self, column: str) -> Any:
        value = super().__getitem__(column)
        if value is None and column != _HINT:
            raise ValueError(f"{self._place}: {column} is null, allowed: a value")
        return value

    def __missing__(self, column: str) -> Any:
        raise ValueError(f"{self._place}: there is no column {column}, there are {', '.join(self)}")


def find_files(repository: str, dataset: str, pattern: str) -> list[Path]:
    """Find the parquet files of a dataset that match a glob pattern, in order; download them if on the hub.

    `repository` is "hub", where the id may end in a revision (`org/name@revision`), or a folder that contains
    the dataset under its hub id, as after `hf download --repo-type dataset ID --local-dir FOLDER/ID`. Raises
    ValueError naming the missing files.
    """
    folder = (
        _download(dataset, pattern) if repository == HUB else Path(repository) / split_revision(dataset)[0]
    )
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise ValueError(f"{folder / pattern}: no such parquet files of dataset {dataset}")
    for path in paths:
        # File names on the hub contain the number of files: validation-00000-of-00003.parquet.
        count = re.search(r"-of-(\d+)", path.name)
        if count and int(count[1]) != len(paths):
            raise ValueError(f"{folder / pattern}: {len(paths)} of {int(count[1])} files are present")
    return paths


def resolve_commits(repository: str, datasets: Iterable[str]) -> dict[str, str]:
    """The commit at which each dataset was read from the hub; empty if `repository` is a folder."""
    from huggingface_hub import snapshot_download

    if repository != HUB:
        return {}
    named = {dataset: split_revision(dataset) for dataset in datasets}
    return {
        dataset: Path(
            snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
        ).name
        for dataset, (name, revision) in named.items()
    }


def _download(dataset: str, pattern: str) -> Path:
    """Download the files unless they are cached; return their folder in the hub's cache."""
    from huggingface_hub import snapshot_download

    name, revision = split_revision(dataset)
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=pattern))
    except Exception as error:  # hub, transport and offline errors have no common base class
        raise ValueError(
            f"dataset {dataset} cannot be read from the hub, download it to FOLDER/{dataset} and set "
            f"prepare.repository to FOLDER: {error}"
        ) from error


def read_rows(paths: Sequence[Path], columns: Collection[str] | None = None) -> Iterator[TableRow]:
    """Yield the rows of the files in order, with an ImageCell in each image column.

    All columns are read unless `columns` names some. Raises ValueError naming the file if it is not parquet,
    lacks one of the columns, or has a column `image` (`image_1` and so on) that contains no images.
    """
    for path in paths:
        schema = _metadata(path).schema.to_arrow_schema()
        names = schema.names if columns is None else columns
        if missing := [name for name in names if name not in schema.names]:
            raise ValueError(f"{path} has no column {missing[0]}, it has {', '.join(schema.names)}")
        images = [name for name in names if _holds_images(schema.field(name).type)]
        if wrong := [name for name in names if _IMAGE.fullmatch(name) and name not in images]:
            raise ValueError(
                f"{path}: column {wrong[0]} is {schema.field(wrong[0]).type}, allowed: one image a row, as "
                "binary or as a struct whose field bytes is binary"
            )
        table = pq.read_table(path, columns=[name for name in names if name not in images])
        for number, values in enumerate(table.to_pylist()):
            yield TableRow(
                path, number, values | {column: ImageCell(path, number, column) for column in images}
            )


def join_images(table: Iterable[TableRow], paths: Sequence[Path], key: str) -> Iterator[TableRow]:
    """Add column `image` to rows, from the files of images whose `id` is the row's value in column `key`."""
    images = {row["id"]: row["image"] for row in read_rows(paths, ("id", "image"))}
    for row in table:
        if row[key] not in images:
            raise ValueError(f"{paths[0]}: no image has the id {row[key]!r}, the {key} of a row")
        row["image"] = images[row[key]]
        yield row


def _metadata(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from None


def _holds_images(kind: pa.DataType) -> bool:
    """Whether a column contains images: structs with a field `bytes` as on the hub, or bytes alone.

    The bytes may have any binary type and be dictionary-encoded. A column of type null has empty cells only.
    """
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_images(kind.field(place).type)
    if pa.types.is_dictionary(kind):
        return _holds_images(kind.value_type)
    return any(is_kind(kind) for is_kind in _BINARY)


@lru_cache(maxsize=64)
def _groups(path: Path) -> list[int]:
    metadata = _metadata(path)
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _place(path: Path, row: int) -> tuple[int, int]:
    """Index of a row's row group, and the row's offset in it."""
    for group, count in enumerate(_groups(path)):
        if row < count:
            return group, row
        row -= count
    raise AssertionError(f"{path} has no such row")


@lru_cache(maxsize=4)
def _cells(path: Path, group: int, column: str) -> list[Any]:
    """One column of one row group, cached, as consecutive questions need consecutive rows."""
    with pq.ParquetFile(path) as file:
        cells: list[Any] = file.read_row_group(group, columns=[column])[column].to_pylist()
    return cells
