"""Attention with the dark kernel, estimated by random features in linear time."""

from keras_darkformer.memory import Memory
from keras_darkformer.ops.attention import are_few, attend
from keras_darkformer.ops.backend import numbers, tensors
from keras_darkformer.ops.checks import (
    check_attention,
    check_far_offset,
    check_parameters,
)
from keras_darkformer.ops.features import (
    DarkParameters,
    FoldedFeatures,
    fold,
    fold_query_scale,
)
from keras_darkformer.ops.state import AttentionState
from keras_darkformer.types import Tensor


def dark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Tensor,
    projection: Tensor,
    *,
    query_geometry: Tensor = None,
    log_weight: Tensor = None,
    query_shift: Tensor = None,
    key_shift: Tensor = None,
    sliding_window: int | None = None,
    num_sinks: int = 0,
    cache_size: int = 0,
    far_offset: Tensor = None,
    causal: bool = False,
    key_mask: Tensor = None,
    write_mask: Tensor = None,
    initial_state: AttentionState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    remat: bool | None = None,
) -> Tensor:
    """DARKFormer attention, in time and memory linear in the length.

    Let `x^ = h^(-1/4) x`, let M be the geometry, and let `Sigma = M'M`. The dark kernel
    `exp(q^' Sigma k^)` replaces softmax attention's `exp(q . k / sqrt(h))`. It is estimated by
    products of positive random features whose directions are drawn from `N(0, Sigma)`:

        phi_j(x) = m^(-1/2) exp(w_j . M x^ - |M x^|^2 / 2),    w_j ~ N(0, I)
        output_t = sum_s phi(q_t) . phi(k_s) v_s / sum_s phi(q_t) . phi(k_s)

    With `M = I` this is Performer (FAVOR+). With grouped-query heads, query head i uses key/value
    head `i // (n / k)`.

    The same function serves bidirectional, cross and causal attention, and generation: a sequence
    passed in pieces, each with the state that the previous one returned, gives the outputs of the
    whole.

    The features can be fitted to data in two ways. Directions may be drawn from a distribution
    other than `N(0, I)`, which leaves the kernel unchanged if half the logarithm of the density
    ratio is passed as `log_weight` (see `proposal_log_weight`). Queries and keys may be centred:
    with shifts b and c, the kernel is `exp((q^ - b)' Sigma (k^ - c) + b . k^)`, which is softmax's
    for `Sigma = I`.

    With an exact memory, each query attends to the keys in it with softmax's own
    `exp(q . k / sqrt(h))`, and to all others, the far part, through features. Both parts share one
    normaliser, and `far_offset` shifts the logarithm of the far part's weights. The memory holds
    the first `num_sinks` tokens, on which trained models put much of their attention; the last
    `sliding_window` tokens; and, for each key/value head, the `cache_size` tokens in between that
    received most attention while they were in the window. Its size does not depend on the length.
    With `projection=None` there are no features, and hence no far part.

    Masked keys have no effect, whatever they hold. A query with no key to attend to gives zeros and
    passes no gradient. The batch and the sequences may be empty.

    All is computed in float32, but on an accelerator bfloat16 inputs of more than one token have
    their features and values multiplied in bfloat16. If all of a query's products with the keys'
    features are smaller than the largest possible one by more than about 69 in the logarithm, they
    count as zero. For queries and keys that large, scale the geometry down.

    Args:
        query: float tensor of shape `(b, t, n, h)`; integers are cast to float, here and below.
        key: float tensor of shape `(b, s, k, h)`, n a multiple of k.
        value: float tensor of shape `(b, s, k, v)`.
        geometry: M, of shape `(k, r, h)`; `None` for the identity, which is Performer and saves a
            product per key.
        projection: W, of shape `(k, m, r)`, or `(m, r)` shared by the heads; see `draw_projection`.
            `None` for an exact memory alone.
        query_geometry: optional, of shape `(k, r, h)`: a separate geometry for the queries. The
            kernel is then `exp(q^' M_q' M_k k^)`.
        log_weight: optional, of shape `(k, m)`: added to the log-features of both queries and keys.
        query_shift: optional `b`, of shape `(k, h)`, on the scale of `q^`.
        key_shift: optional `c`, of shape `(k, h)`, on the scale of `k^`.
        sliding_window: optional int W. Query t attends exactly to keys t - W + 1 to t; needs
            `causal=True`.
        num_sinks: int S. Queries also attend exactly to the first S unmasked keys of their row;
            needs `causal=True`.
        cache_size: int G. Queries also attend exactly to G of the keys that have left the window;
            needs a `sliding_window`. The attention a key receives is the sum of its softmax
            weights, over sinks and window, from all queries that see it in the window.
        far_offset: optional, of shape `(n,)`; needs an exact memory and features. -1e30 removes the
            far part.
        causal: bool. Query t attends to keys up to t; t and s must be equal.
        key_mask: optional bool tensor of shape `(b, s)` or `(1, s)`, true = attend.
        write_mask: optional bool tensor of shape `(b, s)` or `(1, s)`, true = enters the returned
            state; needs `causal=True`. `None` for all tokens that may be attended to. With an exact
            memory, tokens left out at the end of a row leave no trace. Those left out before others
            take a place in the window, but are neither sinks nor kept.
        initial_state: optional state returned by an earlier call, for the keys before these.
        return_state: bool. Also return the state after these keys.
        chunk_size: optional int, tokens handled at once in the causal form. It changes speed and
            memory, not the result; `None` picks it by head size and grouping.
        remat: optional bool. Whether the backward pass recomputes the features of each block of the
            sequence instead of keeping them. Measured on CPU with long sequences: on JAX it takes a
            quarter of the memory and is no slower, so it is the default there (`None`). On
            TensorFlow it takes two fifths of the memory and up to a fifth more time, on torch half
            to four fifths of the memory and 1.3 to 2.2 times the time. Second derivatives work on
            every backend.

    Returns:
        The output, of shape `(b, t, n, v)` and the inputs' dtype. With `return_state`,
        `(output, state)`. The state is a `State` of float32 tensors of shapes `(b, k, m, v)`,
        `(b, k, m)` and `(b, k)`, whatever the length. With an exact memory it is a `MemoryState`,
        which also holds keys `(b, k, x, h)` and values `(b, k, x, v)`. See `initial_state`.

    Raises:
        ValueError: if a shape does not fit, an option is out of range, or an option needs another
            one; the message names the argument.

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
        - [StreamingLLM](https://arxiv.org/abs/2309.17453), for sinks
        - [H2O](https://arxiv.org/abs/2306.14048), for keeping keys by the attention they receive
    """
    query, key, value = numbers(query, key, value)
    key_mask, write_mask = tensors(key_mask, write_mask)
    check_attention(query, key, value, causal=causal, key_mask=key_mask)
    parameters = DarkParameters(
        *numbers(geometry, projection, query_geometry, log_weight, query_shift, key_shift)
    )
    memory = Memory(sliding_window, num_sinks, cache_size)
    memory.check()
    check_parameters(parameters, key, memory)
    return attend(
        query,
        key,
        value,
        folded(parameters, query, key, memory, far_offset, goes_on=initial_state is not None),
        memory=memory,
        causal=causal,
        key_mask=key_mask,
        write_mask=write_mask,
        initial_state=initial_state,
        return_state=return_state,
        chunk_size=chunk_size,
        remat=remat,
    )


def folded(
    parameters: DarkParameters,
    query: Tensor,
    key: Tensor,
    memory: Memory,
    far_offset: Tensor,
    *,
    goes_on: bool = False,
) -> FoldedFeatures | None:
    """The parameters folded for these queries and keys; `goes_on` if they follow a state."""
    (far_offset,) = numbers(far_offset)
    has_features = parameters.projection is not None
    check_far_offset(far_offset, has_features and bool(memory), query.shape[2])
    if not has_features:
        return None
    sizes = key.shape[2], key.shape[3]
    factored = goes_on and are_few(query, parameters.projection.shape[-2])
    features = fold(parameters, *sizes, factored=factored)
    if not memory:
        return features
    scale = fold_query_scale(parameters, *sizes, query.shape[2], far_offset)
    return features._replace(query_scale=scale)
