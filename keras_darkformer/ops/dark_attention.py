"""Attention with the dark kernel, estimated by random features in linear time."""

import math
from typing import Any

import keras
from keras import ops

from keras_darkformer.ops.checks import (
    check_attention,
    check_features,
    check_state,
    positive_integer,
)
from keras_darkformer.ops.features import (
    FeatureProjections,
    apply_geometry,
    fold_projections,
    plain_projections,
)
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
    remat: bool | None = None,
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

    All is computed in float32. Where all of a query's products with the keys'
    features are smaller than the largest conceivable one by more than about 69
    in the logarithm, they count as none: scale the geometry down for queries
    and keys that large.

    Args:
        query: float tensor of shape `(b, t, n, h)`.
        key: float tensor of shape `(b, s, k, h)`, n a multiple of k.
        value: float tensor of shape `(b, s, k, v)`.
        geometry: M, of shape `(k, r, h)`; `None` for the identity, which is
            Performer and saves a product per key.
        projection: W, of shape `(k, m, r)`, or `(m, r)` shared by the heads;
            see `draw_projection`.
        log_weight: optional, of shape `(k, m)`: added to the log-features of
            both queries and keys.
        causal: bool. Query t attends to keys up to t; t and s must be equal.
        key_mask: optional bool tensor of shape `(b, s)` or `(1, s)`, true = attend.
        initial_state: optional state returned by an earlier call: the keys
            seen before these.
        return_state: bool. Also return the state after these keys.
        chunk_size: optional int, tokens handled at once in the causal form.
            It changes speed and memory, not the result; `None` picks it by
            head size and grouping.
        remat: bool. Whether the backward pass computes each block of the
            sequence anew instead of keeping its features. Measured on CPU:
            on JAX it halves the memory of long sequences and is no slower, so
            it is the default there (`None`); on torch it saves a third of the
            memory for nearly half more time; on TensorFlow XLA undoes it.

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
    projection = ops.convert_to_tensor(projection)
    geometry = None if geometry is None else ops.convert_to_tensor(geometry)
    if key_mask is not None:
        key_mask = ops.convert_to_tensor(key_mask)
    check_attention(query, key, value, geometry, causal=causal, key_mask=key_mask)
    check_features(geometry, projection, log_weight, key)
    if initial_state is not None:
        check_state(initial_state, key, value, projection.shape[-2])
    if chunk_size is not None:
        chunk_size = positive_integer("chunk_size", chunk_size)
    dtype = output_dtype(query, key, value)
    query, key, projections = _project(
        query, key, geometry, projection, log_weight, unfold=initial_state is not None
    )
    output, state = linear_attention(
        query,
        key,
        value,
        projections,
        causal=causal,
        key_mask=key_mask,
        state=initial_state,
        chunk_size=chunk_size,
        remat=remat,
    )
    output = ops.cast(output, dtype)
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
        geometry: M, of shape `(k, r, h)`, or `None` for the identity.
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
    projection = ops.convert_to_tensor(projection)
    geometry = None if geometry is None else ops.convert_to_tensor(geometry)
    if key_mask is not None:
        key_mask = ops.convert_to_tensor(key_mask)
    check_attention(None, key, value, geometry, causal=False, key_mask=key_mask)
    check_features(geometry, projection, log_weight, key)
    if initial_state is not None:
        check_state(initial_state, key, value, projection.shape[-2])
    _, key, projections = _project(
        None, key, geometry, projection, log_weight, unfold=initial_state is not None
    )
    return accumulate_state(key, value, projections, key_mask=key_mask, state=initial_state)


def _project(
    query: Any, key: Any, geometry: Any, projection: Any, log_weight: Any, *, unfold: bool
) -> tuple[Any, Any, FeatureProjections]:
    """Queries and keys, and what makes log-features of them.

    In generation, with so few queries that folding M and W would cost more
    than all the rest, they are applied one after the other.
    """
    num_heads, head_dim = key.shape[2:]
    if geometry is not None:
        queries = key if query is None else query
        sizes = (queries.shape[0], queries.shape[1], queries.shape[2] // num_heads)
        if not unfold or None in sizes or math.prod(sizes) >= projection.shape[-2]:
            return query, key, fold_projections(geometry, projection, log_weight)
        query = None if query is None else apply_geometry(query, geometry)
        key = apply_geometry(key, geometry)
    return query, key, plain_projections(projection, num_heads, head_dim, log_weight)


def output_dtype(*tensors: Any) -> str:
    """The dtype attention on these tensors is returned in."""
    return keras.backend.result_type(*(x.dtype for x in tensors))
