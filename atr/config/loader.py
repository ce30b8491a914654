"""Checks a whole parameter file and gives each stage the parameters that it declares.

Nothing here imports a section, so that a stage depends only on its own ones. A `ParameterFile` lists the
sections of a file; that of params.yaml, in atr.config.stages, is looked up by name when a file is read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Never, TypeVar, get_type_hints

from pydantic import ValidationError

from atr.config.errors import ConfigError, abridge, describe_type, failure, from_validation, join, wrong_type
from atr.config.reading import read

if TYPE_CHECKING:
    from atr.config.distill import Distill
    from atr.config.evaluate import Evaluate
    from atr.config.extract import Extract
    from atr.config.intrinsic import Intrinsic
    from atr.config.latency import Latency
    from atr.config.prepare import Prepare
    from atr.config.presets import EncoderPreset, VlmPreset
    from atr.config.pretrain import Pretrain
    from atr.config.report import Report
    from atr.config.robustness import Robustness
    from atr.config.trainer import Trainer

Section = TypeVar("Section")


@dataclass(frozen=True)
class ParameterFile:
    """The keys of a parameter file, and the stages that read it."""

    path: str
    """Path in the project."""
    common: type
    """Dataclass of the keys outside any section."""
    sections: Mapping[str, type]
    """Dataclass of each section, in the order of the file."""
    stages: Mapping[str, Sequence[str]]
    """The parameters that each stage declares to DVC, and the only ones it gets: a key, or
    `section.field`."""
    resolve: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Checks values of several sections against each other and replaces names by presets; takes and returns
    all values by top-level key, and raises ConfigError."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The top-level keys."""
        return (*(field.name for field in fields(self.common)), *self.sections)


class SectionFields(SimpleNamespace):
    """The fields that a stage declares of a section it does not declare whole, read-only."""

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError(f"{name}: parameters are read-only")


class Params:
    """The parameters that one stage declares, read-only; an assertion fails if it reads another one."""

    seed: int
    encoder: EncoderPreset
    vlm: VlmPreset
    min_pixels: int | None
    max_pixels: int | None
    trainer: Trainer
    prepare: Prepare
    extract: Extract
    pretrain: Pretrain
    distill: Distill
    evaluate: Evaluate
    intrinsic: Intrinsic
    latency: Latency
    robustness: Robustness
    report: Report
    path: Path
    """The file they come from, absolute; for tracking only."""

    def __init__(
        self, stage: str, path: str | Path, declared: Mapping[str, Any], everything: Mapping[str, Any]
    ) -> None:
        self.__dict__.update(
            stage=stage, path=Path(path).resolve(), _declared=declared, _everything=everything, **declared
        )

    def __getattr__(self, name: str) -> Never:
        assert name not in self.__dict__.get("_everything", ()), (
            f"stage {self.__dict__['stage']} reads {name}, which it does not declare"
        )
        raise AttributeError(name)

    def __setattr__(self, name: str, value: object) -> Never:
        raise AttributeError(f"{name}: parameters are read-only")

    def raw(self) -> dict[str, Any]:
        """The declared parameters as plain nested dicts, presets by their names, for manifests and logs."""
        return {key: _plain(value) for key, value in self.__dict__["_declared"].items()}

    def flat(self) -> dict[str, Any]:
        """The declared parameters by dotted key."""
        return _flatten(self.raw())

    def whole_file(self) -> dict[str, Any]:
        """All parameters of the file by dotted key; for tracking only, as a stage uses those it declares."""
        return _flatten({key: _plain(value) for key, value in self.__dict__["_everything"].items()})

    def labels(self) -> dict[str, str]:
        """Names of the file's encoder and model, as tags of every MLflow run."""
        everything = self.__dict__["_everything"]
        return {key: everything[key].name for key in ("encoder", "vlm") if key in everything}


def _flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in raw.items():
        table |= (
            {f"{key}.{name}": item for name, item in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    return table


def _plain(value: Any) -> Any:
    """A section as a dict, a preset as its name."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, SectionFields):
        return dict(vars(value))
    # Only presets have a name; importing their class would make every stage depend on it.
    return value.name if hasattr(value, "name") else asdict(value)


def pipeline() -> ParameterFile:
    """The description of params.yaml; looked up by name, so that no stage depends on all that it imports."""
    file: ParameterFile = import_module("atr.config.stages").PIPELINE
    return file


def load(stage: str, path: str | Path = "", file: ParameterFile | None = None) -> Params:
    """Check the whole file and return the sections that the stage declares.

    By default this is params.yaml in the current folder. Raises ConfigError, one line with key, value and
    what is allowed, if the file cannot be used.
    """
    file = file or pipeline()
    everything = validate(path or file.path, file)
    return Params(stage, path or file.path, _declared(file.stages[stage], everything), everything)


def _declared(keys: Iterable[str], everything: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that the keys name; if keys name single fields of a section, only these fields."""
    declared: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        if name:
            known = vars(declared.get(section, SectionFields()))
            declared[section] = SectionFields(**known, **{name: getattr(everything[section], name)})
        else:
            declared[section] = everything[section]
    return declared


def load_or_exit(stage: str, path: str | Path = "", file: ParameterFile | None = None) -> Params:
    """Return what `load` does; if it raises ConfigError, print its line to stderr and exit with 2."""
    try:
        return load(stage, path, file)
    except ConfigError as error:
        print(f"atr {stage}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def flat(path: str | Path = "params.yaml") -> dict[str, Any]:
    """All parameters of params.yaml by dotted key."""
    return _flatten({key: _plain(value) for key, value in validate(path, pipeline()).items()})


def validate(path: str | Path, file: ParameterFile) -> dict[str, Any]:
    """Check the file and return all its parameters by top-level key; raises ConfigError."""
    tree = read(path)
    for key, value in tree.items():
        if key not in file.keys:
            raise failure(key, value, "is an unknown section", join(file.keys))
    for key in file.keys:
        if key not in tree:
            raise ConfigError(f"{key}: missing from {path}, allowed: a value for each of {join(file.keys)}")
    common: Any = build(file.common, "", {field.name: tree[field.name] for field in fields(file.common)})
    sections: dict[str, Any] = {
        name: build(kind, f"{name}.", tree[name]) for name, kind in file.sections.items()
    }
    return file.resolve({**vars(common), **sections})


def build(kind: type[Section], prefix: str, values: Any) -> Section:
    """A section's dataclass from its plain values; prefix: "<section>." or empty. Raises ConfigError."""
    hints = get_type_hints(kind, include_extras=True)
    allowed = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix[:-1]}: {abridge(values)} is not a section, allowed: {join(allowed)}")
    for name, value in values.items():
        if name not in allowed:
            raise failure(f"{prefix}{name}", value, "is an unknown key", join(allowed))
        if not _is_literal(value):
            written_out = f"{describe_type(hints[name])}, written out"
            raise failure(f"{prefix}{name}", value, "is not a value", written_out)
        if _is_nested(value):
            raise wrong_type(f"{prefix}{name}", value, hints[name])
    try:
        return kind(**{name: _unquoted(value, hints[name]) for name, value in values.items()})
    except ValidationError as error:
        raise from_validation(error, kind, prefix) from None


def _is_nested(value: object) -> bool:
    """Whether a value is nested deeper than a list, which no key allows."""
    inner = value if isinstance(value, list) else []
    return isinstance(value, Mapping) or any(isinstance(item, Mapping | list) for item in inner)


def _is_literal(value: object) -> bool:
    """Whether a value is neither an interpolation, whose changes DVC does not see, nor OmegaConf's `???`."""
    if isinstance(value, list):
        return all(map(_is_literal, value))
    return "${" not in str(value) and value != "???"


def _unquoted(value: Any, hint: Any) -> Any:
    """Convert quoted numbers in fields that take no text."""
    kind = describe_type(hint)
    if isinstance(value, list) and kind in ("list[int]", "list[float]"):
        return [_unquoted(item, float if "float" in kind else int) for item in value]
    if isinstance(value, str) and kind in ("int", "float", "int | None", "int | merged | None"):
        try:
            return float(value) if kind == "float" else int(value)
        except ValueError:
            return value
    return value
