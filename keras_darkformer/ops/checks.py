"""Checks of arguments: each error names the argument, what came and what was expected."""

from typing import Any

import numpy as np


def positive_integer(name: str, value: Any) -> int:
    """`value` as an int; a ValueError that names it if it is none or below 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return int(value)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value`; a ValueError that names it and the choices if it is none of them."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}. Received: {name}={value!r}")
    return value


def check_attention(
    query: Any, key: Any, value: Any, geometry: Any, *, causal: bool, key_mask: Any
) -> None:
    """Shapes of all but the features; `query` and `geometry` may be `None`."""
    if query is None:
        query = key
    for name, x, axes in (
        ("key", key, "(batch, key_length, num_key_value_heads, head_dim)"),
        ("query", query, "(batch, query_length, num_query_heads, head_dim)"),
        ("value", value, "(batch, key_length, num_key_value_heads, value_dim)"),
        ("geometry", geometry, "(num_key_value_heads, rank, head_dim)"),
    ):
        if x is None:
            continue
        if len(x.shape) != axes.count(",") + 1:
            raise ValueError(f"`{name}` must have shape {axes}. Received: {_show(x)}")
    kv_heads, head_dim = key.shape[2], key.shape[3]
    if query.shape[3] != head_dim:
        raise ValueError(
            "`query` and `key` must have the same head_dim. "
            f"Received: query {_show(query)}, key {_show(key)}"
        )
    if query.shape[2] % kv_heads:
        raise ValueError(
            "The heads of `query` must be a multiple of the heads of `key`. "
            f"Received: query {_show(query)}, key {_show(key)}"
        )
    if value.shape[2] != kv_heads or _differ(value.shape[1], key.shape[1]):
        raise ValueError(
            "`value` must have the length and the heads of `key`. "
            f"Received: value {_show(value)}, key {_show(key)}"
        )
    if geometry is not None and (geometry.shape[0], geometry.shape[2]) != (kv_heads, head_dim):
        raise ValueError(
            "`geometry` must have shape (num_key_value_heads, rank, head_dim) = "
            f"({kv_heads}, rank, {head_dim}). Received: {_show(geometry)}"
        )
    if key.shape[1] == 0 or query.shape[1] == 0:
        raise ValueError(
            "`query` and `key` must have at least one token. "
            f"Received: query {_show(query)}, key {_show(key)}"
        )
    if causal and _differ(query.shape[1], key.shape[1]):
        raise ValueError(
            "With `causal=True`, `query` and `key` must have the same length; what came "
            f"before goes into `initial_state`. Received: query {_show(query)}, key {_show(key)}"
        )
    if key_mask is not None:
        shape = tuple(key_mask.shape)
        batch_size, length = key.shape[:2]
        if (
            len(shape) != 2
            or _differ(shape[1], length)
            or (shape[0] != 1 and _differ(shape[0], batch_size))
        ):
            raise ValueError(
                "`key_mask` must have shape (batch, key_length) = "
                f"({batch_size}, {length}). Received: shape {shape}"
            )


def check_features(geometry: Any, projection: Any, log_weight: Any, key: Any) -> None:
    """Shapes of the projection and of its weights; `geometry` may be `None`."""
    kv_heads, head_dim = key.shape[2:]
    rank = head_dim if geometry is None else geometry.shape[1]
    shape = tuple(projection.shape)
    if len(shape) not in (2, 3) or shape[-1] != rank or (len(shape) == 3 and shape[0] != kv_heads):
        raise ValueError(
            "`projection` must have shape (num_features, rank) or (num_key_value_heads, "
            f"num_features, rank) with rank {rank} and {kv_heads} heads. Received: shape {shape}"
        )
    if log_weight is not None and tuple(log_weight.shape) != (kv_heads, shape[-2]):
        raise ValueError(
            "`log_weight` must have shape (num_key_value_heads, num_features) = "
            f"({kv_heads}, {shape[-2]}). Received: shape {tuple(log_weight.shape)}"
        )


def check_state(state: Any, key: Any, value: Any, num_features: int) -> None:
    """Shapes of a recurrent state that these keys and values go on from."""
    heads = (key.shape[0], key.shape[2])
    expected = ((*heads, num_features, value.shape[3]), (*heads, num_features), heads)
    received = tuple(tuple(x.shape) for x in state)
    if len(received) != len(expected) or any(
        len(a) != len(b) or any(map(_differ, a, b)) for a, b in zip(received, expected, strict=True)
    ):
        raise ValueError(
            "`initial_state` must be a state returned for these sizes, a tuple of shapes "
            f"{expected}. Received: shapes {received}"
        )


def _differ(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and a != b


def _show(x: Any) -> str:
    return f"shape {tuple(x.shape)}"
