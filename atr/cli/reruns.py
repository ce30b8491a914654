"""`atr reruns`: which stages DVC runs again after a change of a file, from the resolved dvc.yaml."""

import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atr import config


def rerun_lines(files: Sequence[str]) -> list[str]:
    """One line for each group of files that the same stages depend on: these, and the stages behind them.

    Without files, all code of the repository and its parameter file; of a folder, all that lies in it. Raises
    ValueError for a file that does not exist or is outside the project, and where DVC reads no dvc.yaml; and
    ConfigError for a params.yaml that cannot be used.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    for file in files:
        if not Path(file).exists():
            raise ValueError(f"{file}: no such file, allowed: a file of the project")
    if Path("params.yaml").is_file():
        config.flat()  # DVC does not say which list of cells is none
    try:
        with Repo() as repo:
            root = Path(repo.root_dir)
            direct = stages_of_files(repo.index.stages, root)
            after = {stage.addressing: _behind(repo.index.graph, stage) for stage in repo.index.stages}
    except DvcException as error:
        raise ValueError(str(error)) from error
    for file in files:
        if not Path(file).resolve().is_relative_to(root):
            raise ValueError(f"{file}: outside {root}, allowed: a file of the project")
    cells = _cells(after)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in files or _code(root):
        path = Path(file).resolve().relative_to(root).as_posix()
        stages = {stage for dep, users in direct.items() if _covers(dep, path) for stage in users}
        later = {stage for name in stages for stage in after[name]} - stages
        groups[", ".join(_joined(stages, cells)), ", ".join(_joined(later, cells))].append(path)
    return [_line(paths, stages, later) for (stages, later), paths in groups.items()]


def stages_of_files(stages: Iterable[Any], root: Path) -> dict[str, set[str]]:
    """The stages by the path, relative to the project, of each file or folder they depend on."""
    users: dict[str, set[str]] = defaultdict(set)
    for stage in stages:
        for dep in stage.deps:
            users[Path(dep.fs_path).relative_to(root).as_posix()].add(stage.addressing)
    return users


def _covers(dep: str, path: str) -> bool:
    """Whether a change of a file or folder can change a dependency: one lies in the other."""
    return Path(path).is_relative_to(dep) or Path(dep).is_relative_to(path)


def _behind(graph: Any, stage: Any) -> set[str]:
    """The stages that depend on a stage, directly or through others."""
    found: set[str] = set()
    todo = [stage]
    while todo:
        for user in graph.predecessors(todo.pop()):
            if user.addressing not in found:
                found.add(user.addressing)
                todo.append(user)
    return found


def _cells(stages: Iterable[str]) -> Mapping[str, set[str]]:
    """The cells of each stage that has several."""
    cells: dict[str, set[str]] = defaultdict(set)
    for stage in stages:
        cells[stage.partition("@")[0]].add(stage)
    return cells


def _joined(stages: Iterable[str], cells: Mapping[str, set[str]]) -> list[str]:
    """Names of stages, all cells of one under its own name."""
    chosen = set(stages)
    whole = {name for name, members in cells.items() if members <= chosen}
    rest = {stage for stage in chosen if stage.partition("@")[0] not in whole}
    return sorted(whole | rest)


def _code(root: Path) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "atr", "params.yaml"], cwd=root, check=True, capture_output=True, text=True
    )
    return [str(root / name) for name in listed.stdout.splitlines()]


def _line(paths: Sequence[str], stages: str, later: str) -> str:
    behind = f"; behind them, if their outputs change: {later}" if later else ""
    return f"{', '.join(paths)}: {stages or 'nothing'}{behind}"
