"""Sums of features over keys: how keys enter them and what a chunk's queries see.

Every exponential is taken of a number that is at most zero. Each query and each key is shifted by
the largest of its own log-features. For a key, this shift goes into its log-scale, one number that
also includes the norm |M k|^2 / 2. Pairs of a query and a key are weighted by exp(log-scale - R_t),
where R_t is the largest log-scale that query t sees. One maximum over the whole sequence would let
a future key push the past below the smallest float. All shifts cancel between numerator and
denominator, so they are constants for the gradient.

Shapes use the letters of `ops.features`; in addition, N chunks of C tokens make a block.
"""

import math
from typing import NamedTuple

import keras
from keras import ops

from keras_darkformer.ops.backend import (
    BASE,
    cast,
    columns,
    inner,
    largest,
    power,
    product,
    reshape,
    split_at,
)
from keras_darkformer.ops.features import (
    TO_BASE,
    FoldedFeatures,
    log_key_features,
    log_query_features,
    log_query_scale,
)
from keras_darkformer.ops.partition import shape_of
from keras_darkformer.ops.state import LOG_ZERO, State
from keras_darkformer.types import Tensor

# MASKED is the scale of a masked key, below that of a state without keys. FUTURE is what the causal
# mask adds, far below both.
MASKED = 2 * LOG_ZERO
FUTURE = -1e35
# A denominator at or below this holds no key (every factor is at most 1).
TINY = 1e-30


class KeyFeatures(NamedTuple):
    """Keys as the sums take them: their features are `features * BASE ** log_scale`.

    Attributes:
        features: `(b, k, s, m)`, the largest of each key being 1, in the dtype of products.
        log_scale: `(b, k, s)`.
        value: `(b, k, s, v)`.
    """

    features: Tensor
    log_scale: Tensor
    value: Tensor


class Sums(NamedTuple):
    """A state while many keys enter it.

    Numerator and denominator are one tensor: with a column of ones appended to the values, two
    products become one. The scale is to the base in which the backend is fastest.

    Attributes:
        both: `(b, k, m, v + 1)`.
        log_scale: `(b, k)`.
    """

    both: Tensor
    log_scale: Tensor


def pack(state: State) -> Sums:
    """A state as `Sums`."""
    both = ops.concatenate([state.kv_state, state.key_state[..., None]], axis=-1)
    return Sums(both, state.log_scale * TO_BASE)


def unpack(sums: Sums) -> State:
    """`Sums` as a state."""
    kv_state, key_state = split_last(sums.both)
    return State(kv_state, key_state[..., 0], sums.log_scale * math.log(BASE))


def with_ones(value: Tensor) -> Tensor:
    """`value` and a column of ones."""
    return ops.concatenate([value, ops.ones_like(value[..., :1])], axis=-1)


def split_last(sums: Tensor) -> tuple[Tensor, Tensor]:
    """All columns but the last, and the last."""
    return split_at(sums, sums.shape[-1] - 1, axis=-1)


def by_head(query: Tensor, kv_heads: int) -> Tensor:
    """`(b, t, n, h) -> (b, k, t * g, h)` in float32.

    The queries of a group are next to each other, since they see the same keys.
    """
    batch, length, num_heads, head_dim = shape_of(query)
    groups = num_heads // kv_heads
    query = reshape(ops.cast(query, "float32"), (batch, length, kv_heads, groups, head_dim))
    query = ops.transpose(query, (0, 2, 1, 3, 4))
    return reshape(query, (batch, kv_heads, length * groups, head_dim))


def features_of_queries(
    query: Tensor, features: FoldedFeatures, *, scaled: bool = False, dtype: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Features `(b, k, t * g, m)`, the largest of each query being 1.

    Args:
        query: `(b, k, t * g, h)`, from `by_head`.
        features: `FoldedFeatures`.
        scaled: whether to return the queries' own scales, which cancel if there are only features.
        dtype: dtype of the features.

    Returns:
        The features, and their log-scales `(b, k, t * g)` or `None`.
    """
    logits = log_query_features(query, features)
    if not scaled:
        of_queries = power(logits - largest(ops.stop_gradient(logits), -1, keepdims=True))
        return cast(of_queries, dtype), None
    assert features.query_scale is not None
    log_scale = log_query_scale(query, features.query_scale)
    top, constant = largest(ops.stop_gradient(logits), -1), ops.stop_gradient(log_scale)
    # Constants for the gradient, as the keys' scales are.
    of_queries = power(logits - (top + (constant - log_scale))[..., None])
    return cast(of_queries, dtype), ops.maximum(constant + top, LOG_ZERO)


def features_of_keys(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    features: FoldedFeatures,
    *,
    dtype: str = "float32",
) -> KeyFeatures:
    """Keys `(b, s, k, h)` and values `(b, s, k, v)` as the sums take them; see `features_by_head`.

    `key_mask` is bool `(b, s)` or `None`.
    """
    key, value = (ops.transpose(ops.cast(x, "float32"), (0, 2, 1, 3)) for x in (key, value))
    key_mask = None if key_mask is None else key_mask[:, None]
    return features_by_head(key, value, key_mask, features, dtype=dtype)


def features_by_head(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    features: FoldedFeatures,
    *,
    dtype: str = "float32",
) -> KeyFeatures:
    """Keys `(b, k, s, h)` and values `(b, k, s, v)` as the sums take them.

    `key_mask` is bool `(b, 1 or k, s)` or `None`. A masked key has no scale and no value, whatever
    it held.
    """
    if key_mask is not None:
        key, value = (ops.where(key_mask[..., None], x, 0.0) for x in (key, value))
    logits, log_scale = log_key_features(key, features)
    top = largest(ops.stop_gradient(logits), -1)
    # The scales are constants for the gradient. All of it flows through the features, since that of
    # the scales would only be a sum over these.
    constant = ops.stop_gradient(log_scale)
    of_keys = power(logits - (top + (constant - log_scale))[..., None])
    log_scale = ops.maximum(constant + top, LOG_ZERO)
    if key_mask is not None:
        log_scale = ops.where(key_mask, log_scale, MASKED)
    return KeyFeatures(cast(of_keys, dtype), log_scale, value)


def add_keys(sums: Sums, keys: KeyFeatures, mask: Tensor = None) -> Sums:
    """The sums with these keys added, or only those in `mask`, bool `(b, 1 or k, s)`."""
    key_scale = keys.log_scale
    if mask is not None:
        key_scale = ops.where(mask, key_scale, MASKED)
    new_scale = ops.maximum(sums.log_scale, largest(key_scale, -1))
    value = with_ones(keys.value) * power(key_scale - new_scale[..., None])[..., None]
    decay = power(sums.log_scale - new_scale)[..., None, None]
    added = product(ops.swapaxes(keys.features, -1, -2), value)
    return Sums(sums.both * decay + added, new_scale)


def add_key(state: State, keys: KeyFeatures) -> State:
    """The state with one more key, in as few operations as possible."""
    kv_state, key_state, log_scale = state
    log_scale = log_scale * TO_BASE
    new_scale = ops.maximum(log_scale, keys.log_scale[..., 0])
    decay = power(log_scale - new_scale)[..., None]
    features = keys.features[:, :, 0] * power(keys.log_scale - new_scale[..., None])
    kv_state = kv_state * decay[..., None] + features[..., None] * keys.value
    return State(kv_state, key_state * decay + features, new_scale * math.log(BASE))


def chunked_sums(
    query: Tensor,
    keys: KeyFeatures,
    sums: Sums,
    groups: int,
    chunks: Tensor,
    chunk: int,
    masks: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Sums]:
    """N chunks at once: pairs inside each chunk directly, everything older by its state.

    Args:
        query: `(b, k, N * C * g, m)`, features of queries.
        keys: `KeyFeatures` of the block.
        sums: `Sums` before the block.
        groups: g.
        chunks: N.
        chunk: C.
        masks: `future` of C and of N + 1.

    Returns:
        What each query sees, `(b, k, N, C, g, v + 1)`; its log-scale R, `(b, k, N, C)`; and the
        sums after the block.
    """
    batch, kv_heads, _, num_features = shape_of(query)
    value_dim, dtype = keys.value.shape[-1] + 1, keras.backend.standardize_dtype(query.dtype)
    query = reshape(query, (batch, kv_heads, chunks, chunk * groups, num_features))
    key = reshape(keys.features, (batch, kv_heads, chunks, chunk, num_features))
    value = reshape(with_ones(keys.value), (batch, kv_heads, chunks, chunk, value_dim))
    key_scale = reshape(keys.log_scale, (batch, kv_heads, chunks, chunk))

    # Maxima in each chunk by itself, and of the states at the marks between chunks. The first mark
    # is before the block and the last one after it.
    near_logits, within = _running_maximum(key_scale, masks[0])
    marks = ops.concatenate([sums.log_scale[..., None], within[..., -1]], axis=-1)
    mark_logits, reached = _running_maximum(marks, masks[1])
    before = reached[..., :-1, None]
    scale = ops.maximum(within, before)  # R_t, (b, k, N, C)

    # States at every mark, by one product with the decays between marks.
    update = value * power(key_scale - within[..., -1:])[..., None]
    update = product(ops.swapaxes(key, -1, -2), update)  # (b, k, N, m, v)
    states = ops.concatenate([sums.both[:, :, None], update], axis=2)
    states = reshape(states, (batch, kv_heads, chunks + 1, num_features * value_dim))
    states = power(mark_logits - reached[..., None]) @ states
    states = reshape(states, (batch, kv_heads, chunks + 1, num_features, value_dim))

    states, last = split_at(states, chunks, axis=2)
    last = last[:, :, 0]
    far = product(query, states)
    far = reshape(far, (batch, kv_heads, chunks, chunk, groups, value_dim))
    far = far * power(before - scale)[..., None, None]

    scores = cast(inner(query, key), "float32")
    scores = reshape(scores, (batch, kv_heads, chunks, chunk, groups, chunk))
    scores = scores * power(near_logits - scale[..., None])[..., None, :]
    scores = reshape(scores, (batch, kv_heads, chunks, chunk * groups, chunk))
    near = product(cast(scores, dtype), value)
    near = reshape(near, (batch, kv_heads, chunks, chunk, groups, value_dim))
    return near + far, scale, Sums(last, reached[..., -1])


def future(size: Tensor) -> Tensor:
    """`(size, size)`: leaves no weight to `j > t` when added to the logarithm at (t, j)."""
    index = ops.arange(size, dtype="int32")
    return log_mask(index[None, :] <= index[:, None])


def log_mask(visible: Tensor) -> Tensor:
    """A mask to add to logarithms: 0 where visible, `FUTURE` elsewhere.

    Python numbers alone would make a tensor of Keras' `floatx`, which may be any dtype.
    """
    return ops.cast(ops.logical_not(visible), "float32") * FUTURE


def _running_maximum(log_scale: Tensor, future: Tensor) -> tuple[Tensor, Tensor]:
    """For `x`, `(..., L)`: the `x_j` that t sees, `(..., L, L)`, and their maximum, `(..., L)`.

    L is short, and `keras.ops` has no cumulative maximum. The maximum is a constant for the
    gradient.
    """
    logits = log_scale[..., None, :] + future
    return logits, largest(ops.stop_gradient(logits), -1)


def normalize(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; rows that saw no key are zero, and so is their gradient."""
    alive = denominator > TINY
    denominator = ops.where(alive, denominator, 1.0)
    # Dividing by the denominator's value first keeps its square, which the gradient of a quotient
    # contains, from underflowing. The numerator is multiplied only once, which saves a pass over
    # all outputs.
    scale = 1.0 / ops.stop_gradient(denominator)
    inverse = scale * ops.where(alive, 1.0 / (denominator * scale), 0.0)
    return numerator * columns(inverse, numerator.shape[-1])
