"""Sums of features over keys: the state, how keys enter it and what a chunk's queries see.

Every exponential is taken of a number that is at most zero. Queries and keys
are shifted by the largest of their own log-features. What that leaves of a key
is its log-scale, one number, which also takes the norm |M k|^2 / 2; pairs of a
query and a key are weighted by exp(log-scale - R_t), R_t the largest log-scale
that query t sees. One maximum over the whole sequence would let a future key
push the past below the smallest float. All of them cancel between numerator
and denominator, so they are constants to the gradient.

The shapes' letters are those of `ops.features`; besides, N chunks of C tokens
make a block.
"""

import math
from typing import Any

from keras import ops

from keras_darkformer.ops.backend import BASE, power, reshape, scan, split_at
from keras_darkformer.ops.features import (
    FeatureProjections,
    log_key_features,
    log_query_features,
)
from keras_darkformer.ops.partition import block_partition, shape_of, split_blocks

# (kv_state, key_state, log_scale); with a window of the exact kernel its keys,
# values and mask behind them.
State = tuple[Any, ...]

# Stands for log(0). Finite, so that differences of two of them are zero
# instead of NaN; far below any log-feature that can matter.
LOG_ZERO = -1e30
# The scale of a masked key, below that of a state without keys, and what the
# causal mask adds, far below both.
MASKED = 2 * LOG_ZERO
FUTURE = -1e35
# A denominator at or below this holds no key (every factor is at most 1).
TINY = 1e-30


def initial_state(
    batch_size: Any,
    num_key_value_heads: int,
    num_features: int,
    value_dim: int,
    *,
    sliding_window: int | None = None,
    head_dim: int | None = None,
    window_only: bool = False,
) -> State:
    """The state before the first token.

    Args:
        batch_size: int, or scalar int tensor.
        num_key_value_heads: int.
        num_features: int.
        value_dim: int.
        sliding_window: int W, keys that the exact kernel sees, or `None`.
        head_dim: int; needed with a window.
        window_only: bool. The window is all that is seen: its leaves alone.

    Returns:
        A tuple of float32 tensors: `kv_state` of shape `(b, k, m, v)` and
        `key_state` `(b, k, m)`, the sums over the tokens seen of features
        times values and of features, both scaled by `exp(-log_scale)`, and
        `log_scale` `(b, k)`, the running maximum of the log-features. With a
        window these hold the keys older than the last W, and there follow
        the last W themselves: keys `(b, W, k, h)`, values `(b, W, k, v)` and
        `(b, W)`, 1 where there is one and 0 where it is masked or missing.
    """
    heads = (batch_size, num_key_value_heads)
    sums = (
        ops.zeros((*heads, num_features, value_dim), dtype="float32"),
        ops.zeros((*heads, num_features), dtype="float32"),
        ops.full(heads, LOG_ZERO, dtype="float32"),
    )
    if sliding_window is None:
        return sums
    tokens = (batch_size, sliding_window, num_key_value_heads)
    last = (
        ops.zeros((*tokens, head_dim), dtype="float32"),
        ops.zeros((*tokens, value_dim), dtype="float32"),
        ops.zeros(tokens[:2], dtype="float32"),
    )
    return last if window_only else (*sums, *last)


# While many keys enter, numerator and denominator travel as one tensor: a column
# of ones appended to the values makes one product of two. Logarithms are to
# the base that the backend is fastest in.


def pack(
    state: State | None, key: Any, value: Any, projections: FeatureProjections
) -> tuple[Any, Any]:
    """Sums `(b, k, m, v + 1)` and log-scale `(b, k)` of a state, or of none."""
    if state is None:
        sizes = (key.shape[2], projections.num_features, value.shape[3])
        state = initial_state(ops.shape(key)[0], *sizes)
    kv_state, key_state, log_scale = (ops.cast(leaf, "float32") for leaf in state)
    sums = ops.concatenate([kv_state, key_state[..., None]], axis=-1)
    return sums, log_scale * (1 / math.log(BASE))


def unpack(packed: tuple[Any, Any]) -> State:
    """The state of its sums and log-scale."""
    sums, log_scale = packed
    kv_state, key_state = split_last(sums)
    return kv_state, key_state[..., 0], log_scale * math.log(BASE)


def with_ones(value: Any) -> Any:
    """`value` and a column of ones."""
    return ops.concatenate([value, ops.ones_like(value[..., :1])], axis=-1)


def split_last(sums: Any) -> tuple[Any, Any]:
    """All columns but the last, and the last."""
    return split_at(sums, sums.shape[-1] - 1, axis=-1)


def features_of_queries(query: Any, projections: FeatureProjections) -> Any:
    """`(b, t, n, h) -> (b, k, t * g, m)`, the largest feature of each query being 1."""
    logits = log_query_features(by_head(query, projections.num_heads), projections)
    return power(logits - ops.max(ops.stop_gradient(logits), axis=-1, keepdims=True))


def by_head(query: Any, kv_heads: int) -> Any:
    """`(b, t, n, h) -> (b, k, t * g, h)` in float32.

    The queries of a group stand beside one another, since they meet the same
    keys.
    """
    batch, length, num_heads, head_dim = shape_of(query)
    groups = num_heads // kv_heads
    query = reshape(ops.cast(query, "float32"), (batch, length, kv_heads, groups, head_dim))
    query = ops.transpose(query, (0, 2, 1, 3, 4))
    return reshape(query, (batch, kv_heads, length * groups, head_dim))


def features_of_keys(
    block: dict[str, Any], projections: FeatureProjections
) -> tuple[Any, Any, Any]:
    """Features `(b, k, s, m)` of keys, their log-scales `(b, k, s)`, values `(b, k, s, v)`.

    The largest feature of each key is 1; the features themselves are these
    times `BASE ** log_scale`. A masked key has no scale and no value, whatever
    stood there.
    """
    key, value = ops.cast(block["key"], "float32"), ops.cast(block["value"], "float32")
    key_mask = block.get("key_mask")
    if key_mask is not None:
        attended = key_mask[:, :, None, None]
        key, value = ops.where(attended, key, 0.0), ops.where(attended, value, 0.0)
    key, value = ops.transpose(key, (0, 2, 1, 3)), ops.transpose(value, (0, 2, 1, 3))
    logits, log_scale = log_key_features(key, projections)
    largest = ops.max(ops.stop_gradient(logits), axis=-1)
    # The scales are constants to the gradient: all of it goes the way of the
    # features, where a sum over them is all that the scales' own would need.
    constant = ops.stop_gradient(log_scale)
    features = power(logits - (largest + (constant - log_scale))[..., None])
    log_scale = ops.maximum(constant + largest, LOG_ZERO)
    if key_mask is not None:
        log_scale = ops.where(key_mask[:, None, :], log_scale, MASKED)
    return features, log_scale, value


def absorb(
    key: Any,
    value: Any,
    key_mask: Any,
    projections: FeatureProjections,
    packed: tuple[Any, Any],
    remat: bool | None,
) -> tuple[Any, Any]:
    """The state with all keys added, block by block."""
    blocks, tokens = block_partition(ops.shape(key)[1])
    inputs = split_blocks({"key": key, "value": value}, key_mask, blocks, tokens)

    def step(
        packed: tuple[Any, Any], block: dict[str, Any], projections: FeatureProjections
    ) -> tuple[Any, Any]:
        sums, log_scale = packed
        features, key_scale, value = features_of_keys(block, projections)
        new_scale = ops.maximum(log_scale, ops.max(key_scale, axis=-1))
        value = with_ones(value) * power(key_scale - new_scale[..., None])[..., None]
        decay = power(log_scale - new_scale)[..., None, None]
        return (sums * decay + ops.swapaxes(features, -1, -2) @ value, new_scale), ()

    return scan(step, packed, inputs, projections, remat=remat)[0]


def absorb_one(
    key: Any, value: Any, key_mask: Any, projections: FeatureProjections, state: State
) -> State:
    """One key more: little to compute, so what counts is the number of operations."""
    block = {"key": key, "value": value}
    if key_mask is not None:
        block["key_mask"] = ops.broadcast_to(ops.cast(key_mask, "bool"), ops.shape(key)[:2])
    features, key_scale, value = features_of_keys(block, projections)
    kv_state, key_state, log_scale = (ops.cast(leaf, "float32") for leaf in state)
    log_scale = log_scale * (1 / math.log(BASE))
    new_scale = ops.maximum(log_scale, key_scale[..., 0])
    decay = power(log_scale - new_scale)[..., None]
    features = features[:, :, 0] * power(key_scale - new_scale[..., None])
    kv_state = kv_state * decay[..., None] + features[..., None] * value
    key_state = key_state * decay + features
    return kv_state, key_state, new_scale * math.log(BASE)


def chunked_sums(
    query: Any,
    block: dict[str, Any],
    projections: FeatureProjections,
    packed: tuple[Any, Any],
    groups: int,
    chunks: Any,
    chunk: int,
    masks: tuple[Any, Any],
) -> tuple[Any, Any, tuple[Any, Any]]:
    """N chunks at once: near pairs inside each chunk, everything older by its state.

    Args:
        query: `(b, k, N * C * g, m)`, features of queries.
        block: key, value and key mask.
        projections: `FeatureProjections`.
        packed: the state before the block.
        groups: g.
        chunks: N.
        chunk: C.
        masks: `future` of C and of N + 1.

    Returns:
        What each query sees, `(b, k, N, C, g, v + 1)`; its log-scale R,
        `(b, k, N, C)`; the state behind the block.
    """
    key, key_scale, value = features_of_keys(block, projections)
    batch, kv_heads, _, num_features = shape_of(query)
    value_dim = value.shape[-1] + 1
    query = reshape(query, (batch, kv_heads, chunks, chunk * groups, num_features))
    key = reshape(key, (batch, kv_heads, chunks, chunk, num_features))
    value = reshape(with_ones(value), (batch, kv_heads, chunks, chunk, value_dim))
    key_scale = reshape(key_scale, (batch, kv_heads, chunks, chunk))

    sums, log_scale = packed
    # Of each chunk by itself, and of the states at the marks between chunks,
    # the first being that before the block and the last that behind it.
    near_logits, within = _running_maximum(key_scale, masks[0])
    marks = ops.concatenate([log_scale[..., None], within[..., -1]], axis=-1)
    mark_logits, reached = _running_maximum(marks, masks[1])
    before = reached[..., :-1, None]
    scale = ops.maximum(within, before)  # R_t, (b, k, N, C)

    # States at every mark, by one product with the decays between marks.
    update = value * power(key_scale - within[..., -1:])[..., None]
    update = ops.swapaxes(key, -1, -2) @ update  # (b, k, N, m, v)
    states = ops.concatenate([sums[:, :, None], update], axis=2)
    states = reshape(states, (batch, kv_heads, chunks + 1, num_features * value_dim))
    states = power(mark_logits - reached[..., None]) @ states
    states = reshape(states, (batch, kv_heads, chunks + 1, num_features, value_dim))

    if isinstance(chunks, int):  # the gradient of slices fills tensors with zeros
        states, last = split_at(states, chunks, axis=2)
        last = last[:, :, 0]
    else:
        states, last = states[:, :, :-1], states[:, :, -1]
    far = query @ states
    far = reshape(far, (batch, kv_heads, chunks, chunk, groups, value_dim))
    far = far * power(before - scale)[..., None, None]

    scores = query @ ops.swapaxes(key, -1, -2)
    scores = reshape(scores, (batch, kv_heads, chunks, chunk, groups, chunk))
    scores = scores * power(near_logits - scale[..., None])[..., None, :]
    scores = reshape(scores, (batch, kv_heads, chunks, chunk * groups, chunk))
    near = scores @ value
    near = reshape(near, (batch, kv_heads, chunks, chunk, groups, value_dim))
    return near + far, scale, (last, reached[..., -1])


def future(size: Any) -> Any:
    """`(size, size)`: what leaves no weight to `j > t` when added to the logarithm at (t, j)."""
    index = ops.arange(size, dtype="int32")
    return ops.where(index[None, :] > index[:, None], FUTURE, 0.0)


def _running_maximum(log_scale: Any, future: Any) -> tuple[Any, Any]:
    """Of `x`, `(..., L)`: the `x_j` that t sees, `(..., L, L)`, and their maximum, `(..., L)`.

    L is short, and `keras.ops` has no cumulative maximum. It is a constant to
    the gradient.
    """
    logits = log_scale[..., None, :] + future
    return logits, ops.max(ops.stop_gradient(logits), axis=-1)


def normalize(numerator: Any, denominator: Any) -> Any:
    """Their quotient; rows that saw no key are zero, gradient included."""
    alive = denominator > TINY
    denominator = ops.where(alive, denominator, 1.0)
    # Dividing both by the denominator's value first keeps its square, which
    # the gradient of a quotient holds, from underflowing.
    scale = 1.0 / ops.stop_gradient(denominator)
    return (numerator * scale) * ops.where(alive, 1.0 / (denominator * scale), 0.0)
