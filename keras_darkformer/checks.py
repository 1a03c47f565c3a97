"""Checks of single arguments: each error names the argument, what came and what was expected."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    """Whether a value is an int, not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def positive_integer(name: str, value: Any) -> int:
    """`value` as an int; a ValueError that names it if it is none or below 1."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return int(value)


def not_negative_integer(name: str, value: Any) -> int:
    """`value` as an int; a ValueError that names it if it is none or below 0."""
    if not is_integer(value) or value < 0:
        raise ValueError(f"`{name}` must be an integer, 0 or more. Received: {name}={value!r}")
    return int(value)


def optional_integer(name: str, value: Any) -> int | None:
    """`None`, or as `positive_integer`."""
    return None if value is None else positive_integer(name, value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value`; a ValueError that names it and the choices if it is none of them."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {tuple(choices)}. Received: {name}={value!r}")
    return value
