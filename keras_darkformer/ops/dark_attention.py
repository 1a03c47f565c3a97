"""Attention with the dark kernel: estimated in linear time, and exactly."""

from typing import Any

import keras
from keras import ops

from keras_darkformer.ops.features import fold_projections
from keras_darkformer.ops.linear_attention import State, accumulate_state, linear_attention


def dark_attention(
    query: Any,
    key: Any,
    value: Any,
    geometry: Any,
    projection: Any,
    *,
    log_weight: Any = None,
    causal: bool = False,
    key_mask: Any = None,
    initial_state: State | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """DARKFormer attention, in time and memory linear in the length.

    With `x^ = h^(-1/4) x`, `M` the geometry and `Sigma = M'M`, softmax
    attention's `exp(q . k / sqrt(h))` becomes the dark kernel
    `exp(q^' Sigma k^)`, and the dark kernel becomes the product of positive
    random features whose directions are drawn from `N(0, Sigma)`:

        phi_j(x) = m^(-1/2) exp(w_j . M x^ - |M x^|^2 / 2),    w_j ~ N(0, I)
        output_t = sum_s phi(q_t) . phi(k_s) v_s / sum_s phi(q_t) . phi(k_s)

    With `M = I` this is Performer (FAVOR+). Grouped-query heads: query head i
    uses key/value head `i // (n / k)`.

    One function serves bidirectional, cross and causal attention and
    generation: a sequence fed in pieces, each with the state the last one
    returned, gives the outputs of the whole.

    Masked keys count for nothing, whatever they hold. A query that has no key
    to attend to gives zeros, and passes no gradient.

    All is computed in float32. Features of one query and one key that differ
    by more than about 80 in the logarithm underflow: scale the geometry down
    for queries and keys that large.

    Args:
        query: float tensor of shape `(b, t, n, h)`.
        key: float tensor of shape `(b, s, k, h)`, n a multiple of k.
        value: float tensor of shape `(b, s, k, v)`.
        geometry: M, of shape `(k, r, h)`.
        projection: W, of shape `(k, m, r)`, or `(m, r)` shared by the heads;
            see `draw_projection`.
        log_weight: optional, of shape `(k, m)`: added to the log-features of
            both queries and keys.
        causal: bool. Query t attends to keys up to t; t and s must be equal.
        key_mask: optional bool tensor of shape `(b, s)`, true = attend.
        initial_state: optional state returned by an earlier call: the keys
            seen before these.
        return_state: bool. Also return the state after these keys.
        chunk_size: optional int, tokens handled at once in the causal form.
            It changes speed and memory, not the result.

    Returns:
        The output, of shape `(b, t, n, v)` and the inputs' dtype. With
        `return_state`, `(output, state)`: the state is a tuple of float32
        tensors of shapes `(b, k, m, v)`, `(b, k, m)` and `(b, k)`, whatever
        the length.

    Raises:
        ValueError: if shapes do not fit; the message names the argument.

    Example:

    >>> q, k, v = (np.random.normal(size=(1, 100, 2, 8)) for _ in range(3))
    >>> geometry = np.stack([np.eye(8)] * 2)
    >>> projection = draw_projection(64, 8, seed=0)
    >>> output = dark_attention(q, k, v, geometry, projection, causal=True)
    >>> output.shape
    (1, 100, 2, 8)

    In pieces:

    >>> first, state = dark_attention(
    ...     q[:, :60], k[:, :60], v[:, :60], geometry, projection,
    ...     causal=True, return_state=True)
    >>> rest = dark_attention(
    ...     q[:, 60:], k[:, 60:], v[:, 60:], geometry, projection,
    ...     causal=True, initial_state=state)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
        - [Rethinking Attention with Performers](https://arxiv.org/abs/2009.14794)
        - [Transformers are RNNs](https://arxiv.org/abs/2006.16236), for the state
    """
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    geometry, projection = ops.convert_to_tensor(geometry), ops.convert_to_tensor(projection)
    _check_attention(query, key, value, geometry, causal=causal, key_mask=key_mask)
    _check_features(geometry, projection, log_weight)
    if initial_state is not None:
        _check_state(initial_state, key.shape[2], projection.shape[-2], value.shape[3])
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(
            f"`chunk_size` must be a positive integer or None. Received: {chunk_size!r}"
        )
    output, state = linear_attention(
        query,
        key,
        value,
        fold_projections(geometry, projection, log_weight),
        causal=causal,
        key_mask=key_mask,
        state=initial_state,
        chunk_size=chunk_size,
    )
    output = ops.cast(output, _output_dtype(query, key, value))
    return (output, state) if return_state else output


def dark_attention_state(
    key: Any,
    value: Any,
    geometry: Any,
    projection: Any,
    *,
    log_weight: Any = None,
    key_mask: Any = None,
    initial_state: State | None = None,
) -> State:
    """The state `dark_attention` would return, without the cost of its output.

    Args:
        key: float tensor of shape `(b, s, k, h)`.
        value: float tensor of shape `(b, s, k, v)`.
        geometry: M, of shape `(k, r, h)`.
        projection: W, of shape `(k, m, r)` or `(m, r)`.
        log_weight: optional, of shape `(k, m)`.
        key_mask: optional bool tensor of shape `(b, s)`, true = enters the state.
        initial_state: optional state of the keys before these.

    Returns:
        The state, as described at `dark_attention`.

    Raises:
        ValueError: if shapes do not fit; the message names the argument.
    """
    key, value = ops.convert_to_tensor(key), ops.convert_to_tensor(value)
    geometry, projection = ops.convert_to_tensor(geometry), ops.convert_to_tensor(projection)
    _check_attention(key, key, value, geometry, causal=False, key_mask=key_mask)
    _check_features(geometry, projection, log_weight)
    if initial_state is not None:
        _check_state(initial_state, key.shape[2], projection.shape[-2], value.shape[3])
    projections = fold_projections(geometry, projection, log_weight)
    return accumulate_state(key, value, projections, key_mask=key_mask, state=initial_state)


def exact_dark_attention(
    query: Any,
    key: Any,
    value: Any,
    geometry: Any,
    *,
    causal: bool = False,
    key_mask: Any = None,
) -> Any:
    """Attention with the dark kernel itself, which the features estimate.

    Softmax attention between `M q` and `M k`, scaled by `h^(-1/2)`, through
    `keras.ops.dot_product_attention`: quadratic in the length, and flash
    attention where Keras has it. With `M = I` it is ordinary attention.

    Args:
        query: float tensor of shape `(b, t, n, h)`.
        key: float tensor of shape `(b, s, k, h)`, n a multiple of k.
        value: float tensor of shape `(b, s, k, v)`.
        geometry: M, of shape `(k, r, h)`.
        causal: bool. Query t attends to keys up to t; t and s must be equal.
        key_mask: optional bool tensor of shape `(b, s)`, true = attend.

    Returns:
        A tensor of shape `(b, t, n, v)` and the inputs' dtype. A query with
        no key to attend to gives zeros, and passes no gradient.

    Raises:
        ValueError: if shapes do not fit; the message names the argument.

    Example:

    >>> q, k, v = (np.random.normal(size=(1, 100, 2, 8)) for _ in range(3))
    >>> exact_dark_attention(q, k, v, np.stack([np.eye(8)] * 2), causal=True).shape
    (1, 100, 2, 8)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
    """
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    geometry = ops.convert_to_tensor(geometry)
    _check_attention(query, key, value, geometry, causal=causal, key_mask=key_mask)
    dtype = _output_dtype(query, key, value)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    query = ops.cast(apply_geometry(query, geometry), dtype)
    key = ops.cast(apply_geometry(key, geometry), dtype)
    # The backends' fused kernels want one size for all three.
    width = max(geometry.shape[1], value_dim)
    query, key, value = (_widen(x, width) for x in (query, key, ops.cast(value, dtype)))
    mask, alive = None, None
    if key_mask is not None:
        key_mask = ops.cast(key_mask, "bool")
        mask = key_mask[:, None, None, :]
        alive = ops.any(key_mask, axis=-1)[:, None]
        if causal:
            index = ops.arange(ops.shape(key)[1], dtype="int32")
            mask = ops.logical_and(mask, index[None, :] <= index[:, None])
            alive = ops.cumsum(ops.cast(key_mask, "int32"), axis=-1) > 0
        # A row without keys has no softmax: let it see all, then wipe it.
        mask = ops.logical_or(mask, ops.logical_not(alive)[:, None, :, None])
    output = ops.dot_product_attention(
        query, key, value, mask=mask, scale=head_dim**-0.5, is_causal=causal and mask is None
    )[..., :value_dim]
    if alive is not None:
        output = ops.where(alive[:, :, None, None], output, 0.0)
    return ops.cast(output, dtype)


def apply_geometry(inputs: Any, geometry: Any) -> Any:
    """`M x` in float32: `(b, t, n, h) -> (b, t, n, r)`, head i by M of head i // (n / k)."""
    shape = tuple(ops.shape(inputs))
    kv_heads, rank, head_dim = geometry.shape
    inputs = ops.reshape(inputs, (*shape[:2], kv_heads, shape[2] // kv_heads, head_dim))
    outputs = ops.einsum(
        "btkgh,krh->btkgr", ops.cast(inputs, "float32"), ops.cast(geometry, "float32")
    )
    return ops.reshape(outputs, (*shape[:3], rank))


def _widen(x: Any, width: int) -> Any:
    missing = width - x.shape[-1]
    return ops.pad(x, [(0, 0), (0, 0), (0, 0), (0, missing)]) if missing else x


def _output_dtype(*tensors: Any) -> str:
    return keras.backend.result_type(*(x.dtype for x in tensors))


def _check_attention(
    query: Any, key: Any, value: Any, geometry: Any, *, causal: bool, key_mask: Any
) -> None:
    for name, x, axes in (
        ("query", query, "(batch, query_length, num_query_heads, head_dim)"),
        ("key", key, "(batch, key_length, num_key_value_heads, head_dim)"),
        ("value", value, "(batch, key_length, num_key_value_heads, value_dim)"),
        ("geometry", geometry, "(num_key_value_heads, rank, head_dim)"),
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
    if (geometry.shape[0], geometry.shape[2]) != (kv_heads, head_dim):
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
        if len(shape) != 2 or any(map(_differ, shape, (key.shape[0], key.shape[1]))):
            raise ValueError(
                "`key_mask` must have shape (batch, key_length) = "
                f"({key.shape[0]}, {key.shape[1]}). Received: shape {shape}"
            )


def _check_features(geometry: Any, projection: Any, log_weight: Any) -> None:
    kv_heads, rank, _ = geometry.shape
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


def _check_state(state: State, kv_heads: int, num_features: int, value_dim: int) -> None:
    expected = ((kv_heads, num_features, value_dim), (kv_heads, num_features), (kv_heads,))
    received = tuple(tuple(x.shape) for x in state)
    if tuple(shape[1:] for shape in received) != expected:
        raise ValueError(
            "`initial_state` must be a state returned with these sizes: a tuple of shapes "
            f"{tuple(('batch', *shape) for shape in expected)}. Received: shapes {received}"
        )


def _differ(a: int | None, b: int | None) -> bool:
    return a is not None and b is not None and a != b


def _show(x: Any) -> str:
    return f"shape {tuple(x.shape)}"
