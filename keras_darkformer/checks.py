"""Checks of single arguments: each error names the argument, what came and what was expected."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def is_integer(value: Any) -> bool:
    """Whether a value is an integer and not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def positive_integer(name: str, value: Any) -> int:
    """Returns `value` as an int; raises a ValueError unless it is an integer of at least 1."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return int(value)


def not_negative_integer(name: str, value: Any) -> int:
    """Returns `value` as an int; raises a ValueError unless it is an integer of at least 0."""
    if not is_integer(value) or value < 0:
        raise ValueError(f"`{name}` must be an integer, 0 or more. Received: {name}={value!r}")
    return int(value)


def optional_integer(name: str, value: Any) -> int | None:
    """Like `positive_integer`, but also accepts `None`."""
    return None if value is None else positive_integer(name, value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """Returns `value`; raises a ValueError unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {tuple(choices)}. Received: {name}={value!r}")
    return value
