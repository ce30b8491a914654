"""The one-line errors of parameter files: key, value, and what is allowed."""

from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

OUT_OF_RANGE = "is out of range"
UNKNOWN = "is unknown"
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
_RULE = "atr_rule"


class ConfigError(ValueError):
    """A parameter file cannot be used; one line: key, value, what is allowed."""


def abridge(value: object) -> str:
    """The value's repr on one line of at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def join(names: Collection[object]) -> str:
    """The names, separated by commas."""
    return ", ".join(map(str, names))


def failure(key: str, value: object, problem: str, allowed: str) -> ConfigError:
    """The error of one key; `problem` is a predicate, e.g. OUT_OF_RANGE."""
    return ConfigError(f"{key}: {abridge(value)} {problem}, allowed: {allowed}")


def refusal(value: object, allowed: str, key: str = "", problem: str = OUT_OF_RANGE) -> PydanticCustomError:
    """The error that a validator raises; a validator of several fields names the `key`."""
    context = {"key": key, "value": value, "problem": problem, "allowed": allowed}
    return PydanticCustomError(_RULE, "{allowed}", context)


def wrong_type(key: str, value: object, hint: Any) -> ConfigError:
    """The error for a value that does not match its field's type."""
    return failure(key, value, "has a wrong type", describe_type(hint))


def from_validation(error: ValidationError, kind: type, prefix: str) -> ConfigError:
    """The first error of a section's validation, as one line; prefix: "<section>." or empty."""
    first = error.errors(include_url=False)[0]
    value = first["input"]
    if first["type"] == _RULE:
        rule = first["ctx"]
        key = rule["key"] or first["loc"][0]
        return failure(f"{prefix}{key}", rule["value"], rule["problem"], rule["allowed"])
    name = str(first["loc"][0])
    hint = get_type_hints(kind, include_extras=True)[name]
    if first["type"] == "missing":
        return ConfigError(f"{prefix}{name}: missing, allowed: {describe_type(hint)}")
    if first["type"] in _BOUNDS:
        return failure(f"{prefix}{name}", value, OUT_OF_RANGE, _bounds(kind, name))
    if first["type"] == "literal_error":
        return failure(f"{prefix}{name}", value, UNKNOWN, join(choices(hint)))
    return wrong_type(f"{prefix}{name}", value, hint)


def choices(hint: Any) -> tuple[Any, ...]:
    """The values of a field whose type is a Literal; empty for any other type."""
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(plain) if get_origin(plain) is Literal else ()


def describe_type(hint: Any) -> str:
    """A field's type in words: `int`, `list[float]`, `int | None`, or its choices."""
    if get_origin(hint) is Annotated:
        return describe_type(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return join(get_args(hint))
    if get_origin(hint) is list:
        return f"list[{describe_type(get_args(hint)[0])}]"
    if get_args(hint):
        return " | ".join(describe_type(part) for part in get_args(hint))
    return "None" if hint is type(None) else str(getattr(hint, "__name__", hint))


def _bounds(kind: Any, name: str) -> str:
    """The range of a number, e.g. `0 < keep < 1`; starts with `null, or` if the field may be null."""
    text = name
    for bound in kind.__pydantic_fields__[name].metadata:
        for attribute, form in (("ge", "{} <= {}"), ("gt", "{} < {}")):
            if (limit := getattr(bound, attribute, None)) is not None:
                text = form.format(limit, text)
        for attribute, form in (("le", "{} <= {}"), ("lt", "{} < {}")):
            if (limit := getattr(bound, attribute, None)) is not None:
                text = form.format(text, limit)
    is_optional = type(None) in get_args(kind.__pydantic_fields__[name].annotation)
    return f"null, or {text}" if is_optional else text
