"""The feature store: shards of encoder features on disk, and a manifest with their checksums.

    shard-00000.safetensors   "features" (n, N, D) bfloat16; the image ids as JSON in the metadata
    manifest.json             written last: a folder without it is not a store

Shard s holds the images [s * S, (s + 1) * S), so the bytes do not depend on the number of devices.
Shapes: see atr.core.tokens; S images of a shard.
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
from atr.core.typed_json import ListedFile, check_distinct, parse_record, short, value_of

STORE_FORMAT = "atr-features-1"
MANIFEST_FILE = "manifest.json"
STORE_DTYPE = torch.bfloat16

_AGAIN = ": run the extract stage again"
_DTYPE_NAME = str(STORE_DTYPE).removeprefix("torch.")


@dataclass(frozen=True)
class _Manifest:
    """The fields of manifest.json; raises ValueError naming the invalid one."""

    format: str
    encoder: str
    layer: int
    fingerprint: str | None
    preprocess: dict[str, Any] | None
    dtype: str
    tokens: int
    grid: tuple[int, int]
    width: int
    images: int
    parameters: dict[str, Any]
    resolved: dict[str, Any]
    shards: list[ListedFile]

    def __post_init__(self) -> None:
        if self.format != STORE_FORMAT:
            raise ValueError(f"format: {short(self.format)} is not allowed, allowed: {STORE_FORMAT}")
        if self.dtype != _DTYPE_NAME:
            raise ValueError(f"dtype: {short(self.dtype)} is not allowed, allowed: {_DTYPE_NAME}")
        check_fingerprint(self.fingerprint)
        if min(*self.grid, self.width) < 1:
            raise ValueError(f"grid, width: {self.grid}, {self.width} are not allowed, allowed: 1 and more")
        if self.tokens != self.grid[0] * self.grid[1]:
            raise ValueError(f"tokens: {self.tokens} is not allowed, allowed: the cells of grid {self.grid}")
        check_distinct("shards", [shard.file for shard in self.shards])
        sizes = [shard.images for shard in self.shards]
        if sum(sizes) != self.images or not sizes:
            raise ValueError(f"the shards do not sum to {self.images} images")
        if set(sizes[:-1]) - {sizes[0]} or sizes[-1] > sizes[0]:
            raise ValueError(f"shards: {short(sizes)} images, allowed: equal counts, the last no larger")


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
        path = self.folder / f"shard-{number:05d}.safetensors"
        with whole_file(path) as temporary:
            try:
                save_file({"features": features_SND}, temporary, metadata={"ids": json.dumps(self._ids)})
            except SafetensorError as error:  # raised for a full disk
                raise OSError(errno.EIO, str(error)) from error
        self.shards.append({"file": path.name, "images": len(self._ids), "sha256": sha256(path)})
        self._ids = []


def write_manifest(
    folder: Path,
    *,
    encoder: str,
    layer: int,
    grid: tuple[int, int],
    width: int,
    fingerprint: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    resolved: Mapping[str, Any] | None = None,
) -> None:
    """Complete a store; `shards` in any order, `parameters` as `FeatureStore.open` will expect them.

    `fingerprint` is that of the encoder's tower, `preprocess` is `describe_preprocessing` of its image
    processor (None if unknown); `resolved` holds precision, device and version of the checkpoint.
    """
    write_json(
        folder / MANIFEST_FILE,
        {
            "format": STORE_FORMAT,
            "encoder": encoder,
            "layer": layer,
            "dtype": _DTYPE_NAME,
            "tokens": grid[0] * grid[1],
            "grid": list(grid),
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
        self._mapped: dict[int, Tensor] = {}

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
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of an image's tokens."""
        rows, columns = self.manifest["grid"]
        return rows, columns

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

    def _map(self, number: int) -> Tensor:
        path, images = self._shard(number)
        try:
            with safe_open(path, framework="pt") as file:
                features_SND: Tensor = file.get_tensor("features")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a readable shard: {error}") from error
        shape = (images, self.manifest["tokens"], self.manifest["width"])
        if features_SND.shape != shape or features_SND.dtype != STORE_DTYPE:
            raise ValueError(f"{path}: features are {tuple(features_SND.shape)}, the manifest says {shape}")
        return features_SND

    def _ids(self, number: int) -> list[str]:
        path, images = self._shard(number)
        try:
            with safe_open(path, framework="pt") as file:
                decoded = json.loads(file.metadata()["ids"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable shard: {error}") from error
        ids: list[str] = value_of(list[str], decoded, f"{path}: ids")
        if len(ids) != images:
            raise ValueError(f"{path}: has {len(ids)} image ids, the manifest says {images}")
        return ids

    def _shard(self, number: int) -> tuple[Path, int]:
        shard = self.manifest["shards"][number]
        return self.folder / shard["file"], shard["images"]


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
