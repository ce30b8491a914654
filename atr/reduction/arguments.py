"""Checks of the arguments that reducers share; each raises a one-line ValueError."""

from decimal import Decimal

IMPLEMENTATIONS = ("paper", "release")
"""What a reducer follows where a paper and its released code differ."""


def check_budget(budget: int, tokens: int) -> None:
    """Raise ValueError unless 0 <= budget <= tokens."""
    if not 0 <= budget <= tokens:
        raise ValueError(f"budget: {budget} is out of range, allowed: 0 to {tokens} tokens")


def check_fraction(key: str, value: float) -> None:
    """Raise ValueError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{key}: {value} is out of range, allowed: a fraction 0 <= {key} <= 1")


def check_implementation(key: str, value: str) -> None:
    """Raise ValueError unless the value is one of IMPLEMENTATIONS."""
    if value not in IMPLEMENTATIONS:
        raise ValueError(f"{key}: {value!r} is unknown, allowed: {', '.join(IMPLEMENTATIONS)}")


def check_least(key: str, value: float, least: int) -> None:
    """Raise ValueError unless value >= least."""
    if not value >= least:
        raise ValueError(f"{key}: {value} is out of range, allowed: {least} or more")


def part_of(fraction: float, budget: int) -> int:
    """The fraction of a budget, rounded down in decimal arithmetic: 0.29 of 100 is 29, in floats 28.99..."""
    return int(Decimal(str(fraction)) * budget)
