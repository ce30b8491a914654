"""Checkpoints by folder or hub id: which revision of the hub's is loaded, and which content came."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # their own, in their docs

from atr.core.files import digest, sha256


def split_revision(path: str) -> tuple[str, str | None]:
    """A folder or hub id, and the revision that is written behind it: `org/name@revision`.

    >>> split("org/name@v1.5"), split("org/name")
    (('org/name', 'v1.5'), ('org/name', None))
    """
    if Path(path).is_dir() or "@" not in path:
        return path, None
    name, _, revision = path.rpartition("@")
    return name, revision


def pretrained_arguments(path: str) -> dict[str, Any]:
    """The arguments by which `from_pretrained` loads a folder, or a hub id at its revision."""
    name, revision = split_revision(path)
    return {"pretrained_model_name_or_path": name, "revision": revision or "main"}


def hub_commit(path: str) -> str | None:
    """The commit that a hub id was loaded at, by the hub's cache; None for a folder, which has none.

    Raises ValueError for what is neither a folder nor in the cache.
    """
    return None if Path(path).is_dir() else _snapshot(path).name


def checkpoint_version(path: str) -> dict[str, str | None]:
    """Commit and digest of a checkpoint, for results to record."""
    return {"commit": hub_commit(path), "digest": checkpoint_digest(path)}


def checkpoint_digest(path: str) -> str:
    """Hash of all that a model, processor or selector is loaded from: of a hub id its commit too.

    Names and content of all files count, whatever they hold: shards and their index, configurations,
    tokenizer, chat templates. Hidden files and Markdown do not, as no loader reads them. Raises ValueError
    for what is neither a folder nor in the hub's cache.
    """
    if Path(path).is_dir():
        return digest(files=_digests(Path(path), sha256))
    snapshot = _snapshot(path)
    return digest(commit=snapshot.name, files=_digests(snapshot, _blob))


def _snapshot(path: str) -> Path:
    """The folder of the hub's cache, named by the commit, that holds what was loaded of a hub id."""
    name, revision = split_revision(path)
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise ValueError(f"{path} is neither a folder nor in the hub's cache")
    return Path(found).parent


def _digests(folder: Path, content: Callable[[Path], str]) -> dict[str, str]:
    """The content's hash of each file by its place in the folder; hashing releases the interpreter."""
    files = {str(file.relative_to(folder)): file for file in _files(folder)}
    with ThreadPoolExecutor() as pool:
        hashes: Any = pool.map(content, files.values())
        hashes = tqdm(hashes, f"hash {folder.name}", len(files), delay=5)  # type: ignore[no-untyped-call]
        return dict(zip(files, hashes, strict=True))


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and file.suffix != ".md" and not is_hidden:
            yield file


def _blob(file: Path) -> str:
    """The hub's cache links a file to a blob that is named by the hash of its content."""
    return file.resolve().name if file.is_symlink() else sha256(file)
