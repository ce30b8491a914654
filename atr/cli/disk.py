"""Free disk space, and whether DVC's cache holds a second copy of each output."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(".dvc/cache")
"""DVC's default cache."""


@dataclass(frozen=True)
class Disks:
    """The disks of the outputs and of DVC's cache, before anything is written."""

    data: Path
    """Folder of the outputs; may not exist yet."""
    cache: Path
    """Folder of DVC's cache; may not exist yet."""
    linked: bool
    """Whether outputs are links into the cache, so that both share their bytes."""
    data_free: int
    """Free bytes."""
    cache_free: int
    """Free bytes."""
    one_disk: bool
    """Whether both folders are on one file system."""


def inspect_disks(data: Path, root: Path = Path()) -> Disks:
    """The disks of `data` and of the cache of the DVC repository in `root`.

    Raises ValueError naming DVC's configuration if it cannot be read.
    """
    cache, types = _cache(root)
    return Disks(
        data=data,
        cache=cache,
        linked="symlink" in types or ("hardlink" in types and _hard_links(data, cache)),
        data_free=shutil.disk_usage(_existing(data)).free,
        cache_free=shutil.disk_usage(_existing(cache)).free,
        one_disk=_existing(data).stat().st_dev == _existing(cache).stat().st_dev,
    )


def _cache(root: Path) -> tuple[Path, list[str]]:
    """Folder and link types of DVC's cache, from all levels of its configuration."""
    from dvc.config import Config
    from dvc.exceptions import DvcException

    folder = root / CACHE.parent
    try:
        cache = Config(dvc_dir=str(folder))["cache"]
    except DvcException as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())}") from error
    # DVC makes configured folders absolute, relative to their configuration file.
    return Path(folder, cache.get("dir", CACHE.name)), list(cache.get("type") or ())


def _hard_links(here: Path, there: Path) -> bool:
    """Whether a file here can be hard-linked there; tested, as bind mounts of one disk refuse links."""
    try:
        with (
            tempfile.NamedTemporaryFile(dir=_existing(here), prefix=".atr-") as file,
            tempfile.TemporaryDirectory(dir=_existing(there), prefix=".atr-") as folder,
        ):
            os.link(file.name, Path(folder, "link"))
    except OSError:
        return False
    return True


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.exists())
