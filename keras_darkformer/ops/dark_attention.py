"""Attention with the dark kernel, estimated by random features in linear time."""

import math
from typing import Any

import keras
from keras import ops

from keras_darkformer.checks import positive_integer
from keras_darkformer.ops.checks import (
    check_attention,
    check_direct_features,
    check_features,
    check_state,
    check_window,
)
from keras_darkformer.ops.features import (
    FeatureMap,
    FeatureProjections,
    Window,
    direct_projections,
    fold_projections,
    fold_window,
)
from keras_darkformer.ops.linear_attention import accumulate_state, linear_attention
from keras_darkformer.ops.sums import State


def dark_attention(
    query: Any,
    key: Any,
    value: Any,
    geometry: Any,
    projection: Any,
    *,
    query_geometry: Any = None,
    log_weight: Any = None,
    query_shift: Any = None,
    key_shift: Any = None,
    sliding_window: int | None = None,
    window_only: bool = False,
    far_offset: Any = None,
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

    What fits the features to data leaves the kernel as it is. Directions may be
    drawn from another distribution than `N(0, I)`, with the logarithm of the
    density ratio as `log_weight` (see `proposal_log_weight`). Queries and keys
    may be centred, exactly: with `b` and `c` their shifts, the kernel is
    `exp((q^ - b)' Sigma (k^ - c) + b . k^)`, softmax's for `Sigma = I`.

    With `sliding_window`, each query meets its last `sliding_window` keys with
    softmax's own `exp(q . k / sqrt(h))`, and only those further back through
    features; both parts share one normaliser, and `far_offset` shifts the
    logarithm of the far part's weights.

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
        query_geometry: optional, of shape `(k, r, h)`: a geometry of the
            queries' own; the kernel is then `exp(q^' M_q' M_k k^)`.
        log_weight: optional, of shape `(k, m)`: added to the log-features of
            both queries and keys.
        query_shift: optional `b`, of shape `(k, h)`, on the scale of `q^`.
        key_shift: optional `c`, of shape `(k, h)`, on the scale of `k^`.
        sliding_window: optional int W. Query t meets keys t - W + 1 to t
            exactly; needs `causal=True`.
        window_only: bool. With `sliding_window`: leave the far part out, to
            measure the window alone.
        far_offset: optional, of shape `(n,)`, with `sliding_window`.
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
        the length; a sliding window adds its keys `(b, W, k, h)`, values
        `(b, W, k, v)` and which of them there are, `(b, W)` (with
        `window_only` these are all).

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
        - [LoLCATs](https://arxiv.org/abs/2410.10254), for window and features
          under one normaliser
    """
    query, key, value, key_mask = tensors(query, key, value, key_mask)
    check_attention(query, key, value, causal=causal, key_mask=key_mask)
    feature_map = checked_feature_map(
        key, geometry, projection, query_geometry, log_weight, query_shift, key_shift
    )
    window = checked_window(
        feature_map, query, key, sliding_window, window_only, far_offset, causal=causal
    )
    factored = initial_state is not None and _few(query, feature_map.projection)
    return _attend(
        query,
        key,
        value,
        fold_projections(feature_map, *key.shape[2:], factored=factored),
        window=window,
        causal=causal,
        key_mask=key_mask,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
        remat=remat,
    )


def dark_attention_state(
    key: Any,
    value: Any,
    geometry: Any,
    projection: Any,
    *,
    query_geometry: Any = None,
    log_weight: Any = None,
    query_shift: Any = None,
    key_shift: Any = None,
    sliding_window: int | None = None,
    window_only: bool = False,
    key_mask: Any = None,
    initial_state: State | None = None,
) -> State:
    """The state `dark_attention` would return, without the cost of its output.

    Args:
        key: float tensor of shape `(b, s, k, h)`.
        value: float tensor of shape `(b, s, k, v)`.
        geometry: M, of shape `(k, r, h)`, or `None` for the identity.
        projection: W, of shape `(k, m, r)` or `(m, r)`.
        key_mask: optional bool tensor of shape `(b, s)`, true = enters the
            state. With a sliding window, masked keys behind all others leave
            no trace; before others they take a place in the window.
        initial_state: optional state of the keys before these.
        query_geometry, log_weight, query_shift, key_shift, sliding_window,
            window_only: as for `dark_attention`.

    Returns:
        The state, as described at `dark_attention`.

    Raises:
        ValueError: if shapes do not fit; the message names the argument.
    """
    key, value, key_mask = tensors(key, value, key_mask)
    check_attention(None, key, value, causal=False, key_mask=key_mask)
    feature_map = checked_feature_map(
        key, geometry, projection, query_geometry, log_weight, query_shift, key_shift
    )
    window = checked_window(feature_map, None, key, sliding_window, window_only, None, causal=True)
    factored = initial_state is not None and _few(key, feature_map.projection)
    projections = fold_projections(feature_map, *key.shape[2:], factored=factored)
    return _accumulate(key, value, projections, window, key_mask, initial_state)


def feature_attention(
    query: Any,
    key: Any,
    value: Any,
    query_kernel: Any,
    key_kernel: Any,
    key_bias: Any,
    *,
    causal: bool = False,
    key_mask: Any = None,
    initial_state: State | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    remat: bool | None = None,
) -> Any:
    """Attention with exponential features of any kernel, in linear time.

        phi_q[j](q) = exp(q . A_q[:, j])
        phi_k[j](k) = exp(k . A_k[:, j] + a_j)
        output_t = sum_s phi_q(q_t) . phi_k(k_s) v_s / sum_s phi_q(q_t) . phi_k(k_s)

    The form of features that are fitted or learned rather than drawn:
    `DarkFeatureMap.calibrate(method="clusters")` makes such, and with
    `A_k = A_q = [W', -W']` they are Hedgehog's.

    Args:
        query: float tensor of shape `(b, t, n, h)`.
        key: float tensor of shape `(b, s, k, h)`, n a multiple of k.
        value: float tensor of shape `(b, s, k, v)`.
        query_kernel: `A_q`, of shape `(k, h, m)`.
        key_kernel: `A_k`, of shape `(k, h, m)`.
        key_bias: `a`, of shape `(k, m)`.
        causal, key_mask, initial_state, return_state, chunk_size, remat: as
            for `dark_attention`.

    Returns:
        As `dark_attention`.

    Raises:
        ValueError: if shapes do not fit; the message names the argument.

    Example:

    >>> q, k, v = (np.random.normal(size=(1, 100, 2, 8)) for _ in range(3))
    >>> kernel = np.random.normal(size=(2, 8, 16))
    >>> feature_attention(q, k, v, kernel, kernel, np.zeros((2, 16)), causal=True).shape
    (1, 100, 2, 8)

    References:
        - [The Hedgehog & the Porcupine](https://arxiv.org/abs/2402.04347)
    """
    query, key, value, key_mask = tensors(query, key, value, key_mask)
    check_attention(query, key, value, causal=causal, key_mask=key_mask)
    query_kernel, key_kernel, key_bias = tensors(query_kernel, key_kernel, key_bias)
    check_direct_features(query_kernel, key_kernel, key_bias, key)
    return _attend(
        query,
        key,
        value,
        direct_projections(query_kernel, key_kernel, key_bias),
        window=None,
        causal=causal,
        key_mask=key_mask,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
        remat=remat,
    )


def feature_attention_state(
    key: Any,
    value: Any,
    key_kernel: Any,
    key_bias: Any,
    *,
    key_mask: Any = None,
    initial_state: State | None = None,
) -> State:
    """The state `feature_attention` would return, without the cost of its output.

    Args:
        key: float tensor of shape `(b, s, k, h)`.
        value: float tensor of shape `(b, s, k, v)`.
        key_kernel: `A_k`, of shape `(k, h, m)`.
        key_bias: `a`, of shape `(k, m)`.
        key_mask: optional bool tensor of shape `(b, s)`, true = enters the state.
        initial_state: optional state of the keys before these.

    Returns:
        The state, as described at `dark_attention`.

    Raises:
        ValueError: if shapes do not fit; the message names the argument.
    """
    key, value, key_mask = tensors(key, value, key_mask)
    check_attention(None, key, value, causal=False, key_mask=key_mask)
    key_kernel, key_bias = tensors(key_kernel, key_bias)
    check_direct_features(key_kernel, key_kernel, key_bias, key)
    projections = direct_projections(key_kernel, key_kernel, key_bias)
    return _accumulate(key, value, projections, None, key_mask, initial_state)


def _attend(
    query: Any,
    key: Any,
    value: Any,
    projections: FeatureProjections,
    *,
    window: Window | None,
    causal: bool,
    key_mask: Any,
    initial_state: State | None,
    return_state: bool,
    chunk_size: int | None,
    remat: bool | None,
) -> Any:
    if initial_state is not None:
        check_state(initial_state, key, value, projections.num_features, window)
    if chunk_size is not None:
        chunk_size = positive_integer("chunk_size", chunk_size)
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
        window=window,
        with_state=return_state,
    )
    output = ops.cast(output, output_dtype(query, key, value))
    return (output, state) if return_state else output


def _accumulate(
    key: Any,
    value: Any,
    projections: FeatureProjections,
    window: Window | None,
    key_mask: Any,
    initial_state: State | None,
) -> State:
    if initial_state is not None:
        check_state(initial_state, key, value, projections.num_features, window)
    return accumulate_state(
        key, value, projections, key_mask=key_mask, state=initial_state, window=window
    )


def checked_feature_map(key: Any, *arrays: Any) -> FeatureMap:
    """The fields of a `FeatureMap` as tensors, once they are known to fit the keys."""
    feature_map = FeatureMap(*tensors(*arrays))
    check_features(feature_map, key)
    return feature_map


def checked_window(
    feature_map: FeatureMap,
    query: Any,
    key: Any,
    sliding_window: int | None,
    window_only: bool,
    far_offset: Any,
    *,
    causal: bool,
) -> Window | None:
    """What a sliding window needs of a feature map; `query` is `None` where only a state is."""
    (far_offset,) = tensors(far_offset)
    check_window(sliding_window, window_only, far_offset, query, causal)
    if sliding_window is None:
        return None
    kv_heads, head_dim = key.shape[2:]
    num_query_heads = kv_heads if query is None else query.shape[2]
    return fold_window(
        feature_map,
        kv_heads,
        head_dim,
        num_query_heads,
        sliding_window,
        far_offset,
        only=window_only,
    )


def tensors(*arrays: Any) -> tuple[Any, ...]:
    """Arrays as tensors; `None` stays."""
    return tuple(None if x is None else ops.convert_to_tensor(x) for x in arrays)


def _few(inputs: Any, projection: Any) -> bool:
    """Whether folding M and W would cost more than applying both to these tokens."""
    sizes = inputs.shape[:3]
    return None not in sizes and math.prod(sizes) < projection.shape[-2]


def output_dtype(*tensors: Any) -> str:
    """The dtype attention on these tensors is returned in."""
    return keras.backend.result_type(*(x.dtype for x in tensors))
