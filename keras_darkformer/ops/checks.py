"""Checks of shapes: each error names the argument, what came and what was expected."""

from typing import TYPE_CHECKING

from keras_darkformer.memory import Memory
from keras_darkformer.types import Shape, Tensor

if TYPE_CHECKING:
    from keras_darkformer.ops.features import DarkParameters


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, key_mask: Tensor
) -> None:
    """Checks the shapes of everything except the features."""
    for name, x, axes in (
        ("key", key, "(batch, key_length, num_key_value_heads, head_dim)"),
        ("query", query, "(batch, query_length, num_query_heads, head_dim)"),
        ("value", value, "(batch, key_length, num_key_value_heads, value_dim)"),
    ):
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
    if causal and _differ(query.shape[1], key.shape[1]):
        raise ValueError(
            "With `causal=True`, `query` and `key` must have the same length; earlier "
            f"tokens go into `initial_state`. Received: query {_show(query)}, key {_show(key)}"
        )
    check_mask("key_mask", key_mask, key)


def check_mask(name: str, mask: Tensor, key: Tensor) -> None:
    """Checks the shape of a key mask, which may be `None`."""
    if mask is None:
        return
    shape = tuple(mask.shape)
    batch_size, length = key.shape[:2]
    if (
        len(shape) != 2
        or _differ(shape[1], length)
        or (shape[0] != 1 and _differ(shape[0], batch_size))
    ):
        raise ValueError(
            f"`{name}` must have shape (batch, key_length) = "
            f"({batch_size}, {length}). Received: shape {shape}"
        )


def check_geometry(name: str, geometry: Tensor, kv_heads: int, head_dim: int) -> None:
    """Checks the shape of a geometry, which may be `None`."""
    shape = None if geometry is None else tuple(geometry.shape)
    if shape is not None and (len(shape) != 3 or (shape[0], shape[2]) != (kv_heads, head_dim)):
        raise ValueError(
            f"`{name}` must have shape (num_key_value_heads, rank, head_dim) = "
            f"({kv_heads}, rank, {head_dim}). Received: shape {shape}"
        )


def check_parameters(parameters: "DarkParameters", key: Tensor, memory: Memory) -> None:
    """Checks the parameters of a dark feature map, all `None` for an exact memory alone."""
    if parameters.projection is None:
        given = [name for name, x in parameters._asdict().items() if x is not None]
        if given:
            raise ValueError(
                f"`{given[0]}` needs a `projection`: without one there are no features. "
                "Received: projection=None"
            )
        if not memory:
            raise ValueError(
                "`projection` may be `None` beside a `sliding_window` or `num_sinks` only. "
                "Received: projection=None, neither of them"
            )
        return
    kv_heads, head_dim = key.shape[2:]
    geometry, projection, query_geometry, log_weight, query_shift, key_shift = parameters
    check_geometry("geometry", geometry, kv_heads, head_dim)
    check_geometry("query_geometry", query_geometry, kv_heads, head_dim)
    rank = head_dim if geometry is None else geometry.shape[1]
    if query_geometry is not None and query_geometry.shape[1] != rank:
        raise ValueError(
            f"`query_geometry` must have the rank of `geometry`, {rank}. "
            f"Received: {_show(query_geometry)}"
        )
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
    for name, shift in (("query_shift", query_shift), ("key_shift", key_shift)):
        if shift is not None and tuple(shift.shape) != (kv_heads, head_dim):
            raise ValueError(
                f"`{name}` must have shape (num_key_value_heads, head_dim) = "
                f"({kv_heads}, {head_dim}). Received: shape {tuple(shift.shape)}"
            )


def check_causal(memory: Memory, write_mask: Tensor, *, causal: bool) -> None:
    """Raises a ValueError for options that need causal attention, in a call that is not."""
    if memory and not causal:
        raise ValueError(
            "`sliding_window` and `num_sinks` need `causal=True`: they hold tokens before a "
            f"query. Received: {memory}, causal=False"
        )
    if write_mask is not None and not causal:
        raise ValueError("`write_mask` needs `causal=True`. Received: causal=False")


def check_far_offset(far_offset: Tensor, has_far: bool, num_query_heads: int) -> None:
    """Checks an offset, which needs features beside an exact memory."""
    if far_offset is None:
        return
    if not has_far:
        raise ValueError(
            "`far_offset` needs a `sliding_window` or `num_sinks`, and features. "
            "Received: neither of the two, or projection=None"
        )
    if tuple(far_offset.shape) != (num_query_heads,):
        raise ValueError(
            f"`far_offset` must have shape (num_query_heads,) = ({num_query_heads},). "
            f"Received: shape {tuple(far_offset.shape)}"
        )


def shapes_differ(a: Shape, b: Shape) -> bool:
    """Whether two shapes are certain to differ; a size that is `None` is unknown."""
    return len(a) != len(b) or any(map(_differ, a, b))


def _differ(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and a != b


def _show(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}"
