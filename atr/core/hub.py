"""Checkpoints in folders or on the Hugging Face hub: their revision, commit and content hash."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # documented, but not exported

from atr.core.files import digest, sha256


def split_revision(path: str) -> tuple[str, str | None]:
    """Split `org/name@revision` into hub id and revision; a folder or plain hub id has the revision None.

    >>> split_revision("org/name@v1.5"), split_revision("org/name")
    (('org/name', 'v1.5'), ('org/name', None))
    """
    if Path(path).is_dir() or "@" not in path:
        return path, None
    name, _, revision = path.rpartition("@")
    return name, revision


def pretrained_arguments(path: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a folder or a hub id with an optional revision."""
    name, revision = split_revision(path)
    return {"pretrained_model_name_or_path": name, "revision": revision or "main"}


def hub_commit(path: str) -> str | None:
    """Commit at which the hub's cache holds a hub id; None for a folder.

    Raises ValueError for a path that is neither a folder nor in the cache.
    """
    return None if Path(path).is_dir() else _snapshot(path).name


def checkpoint_version(path: str) -> dict[str, str | None]:
    """Commit and digest of a checkpoint, for the record of a result."""
    return {"commit": hub_commit(path), "digest": checkpoint_digest(path)}


def checkpoint_digest(path: str) -> str:
    """Hash of all files that a model, processor or selector is loaded from; for a hub id its commit too.

    Covers the names and contents of all files (weights, configurations, tokenizer, chat templates) except
    hidden ones and Markdown, which no loader reads. Raises ValueError for a path that is neither a folder nor
    in the hub's cache.
    """
    if Path(path).is_dir():
        return digest(files=_hash_files(Path(path), sha256))
    snapshot = _snapshot(path)
    return digest(commit=snapshot.name, files=_hash_files(snapshot, _blob_hash))


def _snapshot(path: str) -> Path:
    """Folder of the hub's cache, named by its commit, that holds the files of a hub id."""
    name, revision = split_revision(path)
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        raise ValueError(f"{path} is neither a folder nor in the hub's cache")
    return Path(config).parent


def _hash_files(folder: Path, hash_file: Callable[[Path], str]) -> dict[str, str]:
    """Hash of each file by its relative path; in threads, as hashing releases the GIL."""
    files = {str(file.relative_to(folder)): file for file in _loaded_files(folder)}
    with ThreadPoolExecutor() as pool:
        hashes: Any = pool.map(hash_file, files.values())
        hashes = tqdm(hashes, f"hash {folder.name}", len(files), delay=5)  # type: ignore[no-untyped-call]
        return dict(zip(files, hashes, strict=True))


def _loaded_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and file.suffix != ".md" and not is_hidden:
            yield file


def _blob_hash(file: Path) -> str:
    """Hash of a file; in the hub's cache, the name of the blob that the file links to."""
    return file.resolve().name if file.is_symlink() else sha256(file)
