"""The feature store: shards of encoder features on disk, and a manifest with their checksums.

    shard-00000.safetensors   "features" (n, N, D) bfloat16; the image ids as JSON in the metadata
    manifest.json             written last: a folder without it is not a store

Shard s holds the images [s * S, (s + 1) * S), so the bytes do not depend on the number of devices.

If images have grids of their own, the store is ragged: a shard has "features" (T, D) of the n images, one
after another, and "grids" (n, 2), the rows and columns of each; the manifest's `grid` and `tokens` are null.
Shapes: see atr.core.tokens; S images of a shard, T tokens of all of them.
"""

import errno
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from atr.core.files import read_json, sha256, whole_file, write_json
from atr.core.fingerprint import check_fingerprint
from atr.core.finite import are_finite
from atr.core.ragged import Grid, RaggedGrids
from atr.core.tower_layer import TowerLayer, check_layer
from atr.core.typed_json import ListedFile, check_distinct, parse_record, short, value_of

STORE_FORMAT = "atr-features-1"
RAGGED_FORMAT = "atr-features-2"
MANIFEST_FILE = "manifest.json"
STORE_DTYPE = torch.bfloat16

_AGAIN = ": run the extract stage again"
_DTYPE_NAME = str(STORE_DTYPE).removeprefix("torch.")


@dataclass(frozen=True)
class _Shard(ListedFile):
    """A listed shard; `tokens` of all its images together, in a ragged store alone."""

    tokens: int | None = None


@dataclass(frozen=True)
class _Manifest:
    """The fields of manifest.json; raises ValueError naming the invalid one."""

    format: str
    encoder: str
    layer: TowerLayer
    fingerprint: str | None
    preprocess: dict[str, Any] | None
    dtype: str
    tokens: int | None
    grid: Grid | None
    width: int
    images: int
    parameters: dict[str, Any]
    resolved: dict[str, Any]
    shards: list[_Shard]

    def __post_init__(self) -> None:
        if self.format not in (STORE_FORMAT, RAGGED_FORMAT):
            allowed = f"{STORE_FORMAT}, {RAGGED_FORMAT}"
            raise ValueError(f"format: {short(self.format)} is not allowed, allowed: {allowed}")
        if self.dtype != _DTYPE_NAME:
            raise ValueError(f"dtype: {short(self.dtype)} is not allowed, allowed: {_DTYPE_NAME}")
        check_layer(self.layer)
        check_fingerprint(self.fingerprint)
        if min((*(self.grid or ()), self.width)) < 1:
            raise ValueError(f"grid, width: {self.grid}, {self.width} are not allowed, allowed: 1 and more")
        self._check_tokens()
        check_distinct("shards", [shard.file for shard in self.shards])
        sizes = [shard.images for shard in self.shards]
        if sum(sizes) != self.images or not sizes:
            raise ValueError(f"the shards do not sum to {self.images} images")
        if set(sizes[:-1]) - {sizes[0]} or sizes[-1] > sizes[0]:
            raise ValueError(f"shards: {short(sizes)} images, allowed: equal counts, the last no larger")

    def _check_tokens(self) -> None:
        if (self.grid is None) != (self.format == RAGGED_FORMAT):
            raise ValueError(
                f"grid: {self.grid} is not allowed, allowed: null in {RAGGED_FORMAT}, rows and columns in "
                f"{STORE_FORMAT}"
            )
        if self.tokens != (self.grid and self.grid[0] * self.grid[1]):
            raise ValueError(f"tokens: {self.tokens} is not allowed, allowed: the cells of grid {self.grid}")
        for shard in self.shards:
            if self.grid is None and (shard.tokens is None or shard.tokens < shard.images):
                raise ValueError(
                    f"shards: {shard.file}: tokens: {shard.tokens} is not allowed, allowed: one and more for "
                    f"each of {shard.images} images"
                )


def clear_store(folder: Path) -> None:
    """Remove the store in `folder`, the manifest first, so that an interrupted run leaves no store."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for shard in folder.glob("shard-*.safetensors"):
        shard.unlink()


class ShardWriter:
    """Collects features until a shard is full, then writes it atomically; holds one shard in memory.

    `shards` lists the manifest entries of the shards written so far.
    """

    def __init__(self, folder: Path, images: int, shard_images: int) -> None:
        self.folder = folder
        self.images = images
        self.shard_images = shard_images
        self.shards: list[dict[str, Any]] = []
        self._ids: list[str] = []
        self._buffer_SND: Tensor | None = None

    def add(self, first: int, ids: Sequence[str], features_BND: Tensor) -> None:
        """Add the features of the consecutive images `first`, `first + 1`, ..., all of one shard.

        Raises ValueError naming an image whose features are not finite, and OSError naming a shard that
        cannot be written.
        """
        number, offset = divmod(first, self.shard_images)
        end = offset + len(ids)
        assert offset == len(self._ids) and end <= self.shard_images, "batches must fill shards in order"
        # Cast before the check: rounding a large float32 to bfloat16 may give infinity.
        features_BND = features_BND.to(STORE_DTYPE)
        if not are_finite(features_BND):
            broken = ids[int(features_BND.isfinite().flatten(1).all(1).int().argmin())]
            raise ValueError(f"image {broken}: the encoder's features are not finite")
        if self._buffer_SND is None:
            self._buffer_SND = torch.empty(self.shard_images, *features_BND.shape[1:], dtype=STORE_DTYPE)
        self._buffer_SND[offset:end] = features_BND
        self._ids.extend(ids)
        if end == self.shard_images or first + len(ids) == self.images:
            self._write(number, self._buffer_SND[:end])

    def _write(self, number: int, features_SND: Tensor) -> None:
        self.shards.append(_save_shard(self.folder, number, self._ids, {"features": features_SND}))
        self._ids = []


class RaggedShardWriter:
    """As ShardWriter, for images with grids of their own."""

    def __init__(self, folder: Path, images: int, shard_images: int) -> None:
        self.folder = folder
        self.images = images
        self.shard_images = shard_images
        self.shards: list[dict[str, Any]] = []
        self._ids: list[str] = []
        self._features: list[Tensor] = []
        self._grids: list[Grid] = []

    def add(self, first: int, ids: Sequence[str], features: Sequence[Tensor], grids: Sequence[Grid]) -> None:
        """As `ShardWriter.add`, with features_ND and grid of each image; ValueError if the two do not fit."""
        number, offset = divmod(first, self.shard_images)
        end = offset + len(ids)
        assert offset == len(self._ids) and end <= self.shard_images, "batches must fill shards in order"
        for name, features_ND, (rows, columns) in zip(ids, features, grids, strict=True):
            if len(features_ND) != rows * columns:
                raise ValueError(f"image {name}: {len(features_ND)} features for a grid {rows} x {columns}")
            features_ND = features_ND.to(STORE_DTYPE, copy=True)  # not a view that holds a whole batch
            if not are_finite(features_ND):
                raise ValueError(f"image {name}: the encoder's features are not finite")
            self._features.append(features_ND)
        self._ids.extend(ids)
        self._grids.extend(grids)
        if end == self.shard_images or first + len(ids) == self.images:
            self._write(number)

    def _write(self, number: int) -> None:
        tensors = {"features": torch.cat(self._features), "grids": torch.tensor(self._grids)}
        # Freed before saving, which takes memory of its own: a shard may be of several GB.
        ids, self._ids, self._features, self._grids = self._ids, [], [], []
        shard = _save_shard(self.folder, number, ids, tensors)
        self.shards.append(shard | {"tokens": len(tensors["features"])})


def _save_shard(folder: Path, number: int, ids: Sequence[str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a shard and return its entry in the manifest."""
    path = folder / f"shard-{number:05d}.safetensors"
    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"ids": json.dumps(ids)})
        except SafetensorError as error:  # raised for a full disk
            raise OSError(errno.EIO, str(error)) from error
    return {"file": path.name, "images": len(ids), "sha256": sha256(path)}


def write_manifest(
    folder: Path,
    *,
    encoder: str,
    layer: TowerLayer,
    grid: Grid | None,
    width: int,
    fingerprint: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    resolved: Mapping[str, Any] | None = None,
) -> None:
    """Complete a store; `shards` in any order, `parameters` as `FeatureStore.open` will expect them.

    `grid` is None for a ragged store, whose images have grids of their own.
    `fingerprint` is that of the encoder's tower, `preprocess` is `describe_preprocessing` of its image
    processor (None if unknown); `resolved` holds precision, device and version of the checkpoint.
    """
    write_json(
        folder / MANIFEST_FILE,
        {
            "format": STORE_FORMAT if grid else RAGGED_FORMAT,
            "encoder": encoder,
            "layer": layer,
            "dtype": _DTYPE_NAME,
            "tokens": grid and grid[0] * grid[1],
            "grid": grid and list(grid),
            "width": width,
            "fingerprint": fingerprint,
            "preprocess": None if preprocess is None else dict(preprocess),
            "images": sum(shard["images"] for shard in shards),
            "parameters": dict(parameters),
            "resolved": dict(resolved or {}),
            "shards": sorted(shards, key=lambda shard: shard["file"]),
        },
    )


class FeatureStore(Dataset[Tensor]):
    """A finished store: `store[i]` is features_ND of image i, memory-mapped."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._mapped: dict[int, Tensor | tuple[Tensor, ...]] = {}

    @classmethod
    def open(cls, folder: Path, expect: Mapping[str, Any] | None = None, verify: bool = True) -> Self:
        """Open the store in `folder`; `expect` gives values that its parameters must have.

        Raises ValueError for a missing or invalid manifest, a parameter with another value, a shard that is
        missing, truncated, of another shape or without ids, and with `verify`, which reads every file once, a
        shard that has changed since. One of the processes that share a store should verify it.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder / MANIFEST_FILE)
        for key, expected in (expect or {}).items():
            value = manifest["parameters"].get(key)
            if value != expected:
                raise ValueError(
                    f"{folder / MANIFEST_FILE}: {key} is {value!r}, expected {expected!r}{_AGAIN}"
                )
        _check_present(folder, manifest["shards"])
        if verify:
            _verify(folder, manifest["shards"])
        store = cls(folder, manifest)
        for number in range(len(manifest["shards"])):
            store._map(number)
        check_distinct(f"{folder / MANIFEST_FILE}: image ids", store.ids)
        return store

    @property
    def is_ragged(self) -> bool:
        """Whether images have grids of their own."""
        return self.manifest["grid"] is None

    @property
    def grid(self) -> Grid:
        """(rows, columns) of every image's tokens; raises ValueError for a ragged store."""
        if self.is_ragged:
            raise ValueError(f"{self.folder}: has no one grid, as its images have grids of their own")
        rows, columns = self.manifest["grid"]
        return rows, columns

    @cached_property
    def grids(self) -> list[Grid]:
        """The grid of each image."""
        if not self.is_ragged:
            return [self.grid] * len(self)
        return [grid for number in range(len(self.manifest["shards"])) for grid in self._grids(number)]

    def grid_of(self, position: int) -> Grid:
        """The grid of one image."""
        return self.grids[position]

    @property
    def typical_grid(self) -> Grid:
        """The grid of the image with the median number of tokens; that of all if the store is not ragged."""
        ordered = sorted(self.grids, key=lambda grid: (grid[0] * grid[1], grid))
        return ordered[(len(ordered) - 1) // 2]

    @property
    def width(self) -> int:
        """Length D of a feature."""
        return int(self.manifest["width"])

    @cached_property
    def ids(self) -> list[str]:
        """Image ids in the order of the store."""
        return [name for number in range(len(self.manifest["shards"])) for name in self._ids(number)]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.ids)}

    def index(self, image: str) -> int:
        """Index of an image id; raises ValueError if the store does not hold it."""
        if image not in self._positions:
            raise ValueError(f"{self.folder}: no features of image {image!r}{_AGAIN}")
        return self._positions[image]

    def __len__(self) -> int:
        """Number of images."""
        return int(self.manifest["images"])

    def __getitem__(self, position: int) -> Tensor:
        """features_ND of one image, bfloat16."""
        if not 0 <= position < len(self):
            raise IndexError(position)
        # All shards but the last have the size of the first.
        number, offset = divmod(position, self.manifest["shards"][0]["images"])
        if number not in self._mapped:
            self._mapped[number] = self._map(number)
        return self._mapped[number][offset]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the mapped shards; loader workers map them again and share the page cache."""
        return type(self), (self.folder, self.manifest)

    def _map(self, number: int) -> Tensor | tuple[Tensor, ...]:
        """features_SND of a shard, or the features_ND of each image of a ragged one."""
        shard, path = self.manifest["shards"][number], self._path(number)
        features = self._tensor(number, "features")
        sizes = [shard["tokens"]] if self.is_ragged else [shard["images"], self.manifest["tokens"]]
        shape = (*sizes, self.manifest["width"])
        if features.shape != shape or features.dtype != STORE_DTYPE:
            raise ValueError(f"{path}: features are {tuple(features.shape)}, the manifest says {shape}")
        if not self.is_ragged:
            return features
        return RaggedGrids(tuple(self._grids(number))).split(features, dim=0)

    def _grids(self, number: int) -> list[Grid]:
        """The grids of a ragged shard's images."""
        shard, path = self.manifest["shards"][number], self._path(number)
        grids_S2 = self._tensor(number, "grids")
        shape = (shard["images"], 2)
        if grids_S2.shape != shape or grids_S2.dtype != torch.int64:
            raise ValueError(f"{path}: grids are {tuple(grids_S2.shape)}, the manifest says {shape}")
        grids = [(rows, columns) for rows, columns in grids_S2.tolist()]
        tokens = sum(rows * columns for rows, columns in grids)
        if min(map(min, grids)) < 1 or tokens != shard["tokens"]:
            raise ValueError(f"{path}: grids of {tokens} tokens, the manifest says {shard['tokens']}")
        return grids

    def _tensor(self, number: int, name: str) -> Tensor:
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a readable shard: {error}") from error
        return tensor

    def _ids(self, number: int) -> list[str]:
        path, images = self._path(number), self.manifest["shards"][number]["images"]
        try:
            with safe_open(path, framework="pt") as file:
                decoded = json.loads(file.metadata()["ids"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable shard: {error}") from error
        ids: list[str] = value_of(list[str], decoded, f"{path}: ids")
        if len(ids) != images:
            raise ValueError(f"{path}: has {len(ids)} image ids, the manifest says {images}")
        return ids

    def _path(self, number: int) -> Path:
        return self.folder / str(self.manifest["shards"][number]["file"])


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path} is missing: the store is not complete, run the extract stage")
    manifest: dict[str, Any] = read_json(path)
    try:
        parse_record(_Manifest, manifest, str(path))
    except ValueError as error:
        raise ValueError(f"{error}{_AGAIN}") from None
    return manifest


def _check_present(folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    for shard in shards:
        if not (folder / shard["file"]).is_file():
            raise ValueError(f"{folder / shard['file']} is missing{_AGAIN}")


def _verify(folder: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Compare the hash of every shard; in threads, as hashing releases the GIL."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256, (folder / shard["file"] for shard in shards))
        for shard, digest in zip(shards, tqdm(digests, "verify", len(shards), delay=5), strict=True):
            if digest != shard["sha256"]:
                path = folder / shard["file"]
                raise ValueError(f"{path} differs from the manifest's checksum (truncated or edited){_AGAIN}")
