"""`atr reruns`: which stages DVC reruns after a change to a file, from the resolved dvc.yaml."""

import subprocess
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atr import config


def rerun_lines(files: Sequence[str]) -> list[str]:
    """One line per group of files that the same stages depend on: these stages, and the ones downstream.

    Without `files`, all files of the package and params.yaml; for a folder, all that lies in it. Raises
    ValueError for a file that does not exist or is outside the project and for a dvc.yaml that DVC cannot
    read, and ConfigError for an invalid params.yaml.
    """
    for file in files:
        if not Path(file).exists():
            raise ValueError(f"{file}: no such file, allowed: a file of the project")
    root, users, downstream = _pipeline()
    for file in files:
        if not Path(file).resolve().is_relative_to(root):
            raise ValueError(f"{file}: outside {root}, allowed: a file of the project")
    cells = _cells(downstream)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in files or _code(root):
        path = Path(file).resolve().relative_to(root).as_posix()
        stages = {stage for dep, names in users.items() if _covers(dep, path) for stage in names}
        later = {stage for name in stages for stage in downstream[name]} - stages
        groups[", ".join(_merge_cells(stages, cells)), ", ".join(_merge_cells(later, cells))].append(path)
    return [_line(paths, stages, later) for (stages, later), paths in groups.items()]


def _pipeline() -> tuple[Path, dict[str, set[str]], dict[str, set[str]]]:
    """The project's folder, the stages of each dependency, and the stages downstream of each stage."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    if Path("params.yaml").is_file():
        config.flat()  # because DVC does not name the list that is invalid
    try:
        with Repo() as repo:
            root, stages, graph = Path(repo.root_dir), repo.index.stages, repo.index.graph
            downstream = {stage.addressing: _downstream(graph, stage) for stage in stages}
            return root, stages_of_files(stages, root), downstream
    except DvcException as error:
        raise ValueError(str(error)) from error


def stages_of_files(stages: Iterable[Any], root: Path) -> dict[str, set[str]]:
    """The stages that depend on each file or folder, by its path relative to the project."""
    users: dict[str, set[str]] = defaultdict(set)
    for stage in stages:
        for dep in stage.deps:
            users[Path(dep.fs_path).relative_to(root).as_posix()].add(stage.addressing)
    return users


def _covers(dep: str, path: str) -> bool:
    """Whether a change of a file or folder can change a dependency: one lies in the other."""
    return Path(path).is_relative_to(dep) or Path(dep).is_relative_to(path)


def _downstream(graph: Any, stage: Any) -> set[str]:
    """The stages that depend on a stage, directly or through others."""
    names: set[str] = set()
    todo = [stage]
    while todo:
        for user in graph.predecessors(todo.pop()):
            if user.addressing not in names:
                names.add(user.addressing)
                todo.append(user)
    return names


def _cells(stages: Iterable[str]) -> Mapping[str, set[str]]:
    """The cells of each stage; a stage without a matrix is its only cell."""
    cells: dict[str, set[str]] = defaultdict(set)
    for stage in stages:
        cells[stage.partition("@")[0]].add(stage)
    return cells


def _merge_cells(stages: Iterable[str], cells: Mapping[str, set[str]]) -> list[str]:
    """Sorted names of stages; a stage is named once if all its cells are among them."""
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
    downstream = f"; downstream, if their outputs change: {later}" if later else ""
    return f"{', '.join(paths)}: {stages or 'nothing'}{downstream}"
