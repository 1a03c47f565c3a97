"""Attention with exponential features, in time and memory linear in the length.

One operation in three equal forms, all of them behind `linear_attention`:

- parallel: every query sees every key (bidirectional and cross attention);
- chunked: causal, by blocks of chunks, a state carried from block to block;
- recurrent: one token against the state, which is the parallel form with one
  key.

Every exponential is taken of a number that is at most zero. Queries are
shifted by the maximum over their features; keys by a running maximum R_t over
the tokens seen so far, since one maximum over the whole sequence would let a
future key push the past below the smallest float. Maxima cancel between
numerator and denominator, so they are constants to the gradient.

The shapes' letters are those of `ops.features`; besides, N chunks of C tokens
make a block.
"""

from typing import Any

import keras
from keras import ops

from keras_darkformer.ops.backend import scan
from keras_darkformer.ops.features import (
    FeatureProjections,
    log_key_features,
    log_query_features,
)

State = tuple[Any, Any, Any]

# Stands for log(0). Finite, so that differences of two of them are zero
# instead of NaN; far below any log-feature that can matter.
LOG_ZERO = -1e30
# A denominator at or below this holds no key (every factor is at most 1).
TINY = 1e-30
# Tokens per block of the causal form. Larger blocks need more memory, smaller
# ones more steps.
BLOCK_LENGTH = 1024


def initial_state(
    batch_size: Any, num_key_value_heads: int, num_features: int, value_dim: int
) -> State:
    """The state before the first token.

    Args:
        batch_size: int, or scalar int tensor.
        num_key_value_heads: int.
        num_features: int.
        value_dim: int.

    Returns:
        A tuple of float32 tensors: `kv_state` of shape `(b, k, m, v)` and
        `key_state` `(b, k, m)`, the sums over the tokens seen of features
        times values and of features, both scaled by `exp(-log_scale)`, and
        `log_scale` `(b, k)`, the running maximum of the log-features.
    """
    heads = (batch_size, num_key_value_heads)
    return (
        ops.zeros((*heads, num_features, value_dim), dtype="float32"),
        ops.zeros((*heads, num_features), dtype="float32"),
        ops.full(heads, LOG_ZERO, dtype="float32"),
    )


def linear_attention(
    query: Any,
    key: Any,
    value: Any,
    projections: FeatureProjections,
    *,
    causal: bool = False,
    key_mask: Any = None,
    state: State | None = None,
    chunk_size: int | None = None,
) -> tuple[Any, State]:
    """Attention with weights `phi_q(q_t) . phi_k(k_s)`, normalised over s.

    Args:
        query: `(b, t, n, h)`, any float dtype, as key and value.
        key: `(b, s, k, h)`.
        value: `(b, s, k, v)`.
        projections: `FeatureProjections`, float32.
        causal: bool. Query t sees the keys up to t; needs t == s.
        key_mask: `(b, s)`, true = attend, or `None`.
        state: what came before, as returned by an earlier call, or `None`.
        chunk_size: int, tokens per chunk of the causal form, or `None`.

    Returns:
        `(output, state)`: `(b, t, n, v)` in float32, and the state after the
        last key.
    """
    query = ops.cast(query, "float32")
    key, value, key_mask, packed = _prepare(key, value, key_mask, projections, state)
    if causal and key.shape[1] != 1:
        output, packed = _chunked(query, key, value, key_mask, projections, packed, chunk_size)
    else:
        packed = _absorb(key, value, key_mask, projections, packed)
        output = _read(query, projections, packed)
    return output, _unpack(packed)


def accumulate_state(
    key: Any,
    value: Any,
    projections: FeatureProjections,
    *,
    key_mask: Any = None,
    state: State | None = None,
) -> State:
    """The state after more keys, without reading it: `linear_attention` less its output."""
    key, value, key_mask, packed = _prepare(key, value, key_mask, projections, state)
    return _unpack(_absorb(key, value, key_mask, projections, packed))


# Inside, numerator and denominator travel as one tensor: a column of ones
# appended to the values makes one product of two.


def _prepare(
    key: Any, value: Any, key_mask: Any, projections: FeatureProjections, state: State | None
) -> tuple[Any, Any, Any, tuple[Any, Any]]:
    """Float32 keys and `[value, 1]`, zero where masked whatever stood there; packed state."""
    key, value = ops.cast(key, "float32"), ops.cast(value, "float32")
    if state is None:
        num_features = projections.key_kernel.shape[-1]
        state = initial_state(ops.shape(key)[0], key.shape[2], num_features, value.shape[3])
    value = ops.concatenate([value, ops.ones_like(value[..., :1])], axis=-1)
    if key_mask is not None:
        key_mask = ops.broadcast_to(ops.cast(key_mask, "bool"), _shape(key)[:2])
        attended = key_mask[:, :, None, None]
        key, value = ops.where(attended, key, 0.0), ops.where(attended, value, 0.0)
    kv_state, key_state, log_scale = (ops.cast(leaf, "float32") for leaf in state)
    sums = ops.concatenate([kv_state, key_state[..., None]], axis=-1)
    return key, value, key_mask, (sums, log_scale)


def _unpack(packed: tuple[Any, Any]) -> State:
    sums, log_scale = packed
    kv_state, key_state = ops.split(sums, [sums.shape[-1] - 1], axis=-1)
    return kv_state, key_state[..., 0], log_scale


def _query_weights(query: Any, projections: FeatureProjections) -> Any:
    """`(b, k, x, h) -> (b, k, x, m)`: features, the largest of each query being 1."""
    logits = log_query_features(query, projections)
    return ops.exp(logits - ops.max(ops.stop_gradient(logits), axis=-1, keepdims=True))


def _key_logits(key: Any, key_mask: Any, projections: FeatureProjections) -> tuple[Any, Any]:
    """Log-features `(b, k, x, m)` of keys `(b, k, x, h)`, and their maxima `(b, k, x)`."""
    logits = ops.maximum(log_key_features(key, projections), LOG_ZERO)
    if key_mask is not None:
        logits = ops.where(key_mask[:, None, :, None], logits, LOG_ZERO)
    return logits, ops.max(ops.stop_gradient(logits), axis=-1)


def _normalize(sums: Any) -> Any:
    """Numerator over denominator; rows that saw no key are zero, gradient included."""
    numerator, denominator = ops.split(sums, [sums.shape[-1] - 1], axis=-1)
    alive = denominator > TINY
    denominator = ops.where(alive, denominator, 1.0)
    # Dividing both by the denominator's value first keeps its square, which
    # some backends form in the gradient of a quotient, from underflowing.
    scale = 1.0 / ops.stop_gradient(denominator)
    return ops.where(alive, (numerator * scale) / (denominator * scale), 0.0)


def _absorb(
    key: Any, value: Any, key_mask: Any, projections: FeatureProjections, packed: tuple[Any, Any]
) -> tuple[Any, Any]:
    sums, log_scale = packed
    key, value = ops.transpose(key, (0, 2, 1, 3)), ops.transpose(value, (0, 2, 1, 3))
    logits, maxima = _key_logits(key, key_mask, projections)
    new_scale = ops.maximum(log_scale, ops.max(maxima, axis=-1))
    weights = ops.exp(logits - new_scale[..., None, None])
    decay = ops.exp(log_scale - new_scale)[..., None, None]
    sums = sums * decay + ops.matmul(ops.swapaxes(weights, -1, -2), value)
    return sums, new_scale


def _read(query: Any, projections: FeatureProjections, packed: tuple[Any, Any]) -> Any:
    batch, length, num_heads, head_dim = _shape(query)
    kv_heads = projections.query_kernel.shape[0]
    groups = num_heads // kv_heads
    query = ops.reshape(query, (batch, length, kv_heads, groups, head_dim))
    query = ops.transpose(query, (0, 2, 3, 1, 4))
    query = ops.reshape(query, (batch, kv_heads, groups * length, head_dim))
    sums = ops.matmul(_query_weights(query, projections), packed[0])
    output = _normalize(sums)
    value_dim = output.shape[-1]
    output = ops.reshape(output, (batch, kv_heads, groups, length, value_dim))
    output = ops.transpose(output, (0, 3, 1, 2, 4))
    return ops.reshape(output, (batch, length, num_heads, value_dim))


def _chunked(
    query: Any,
    key: Any,
    value: Any,
    key_mask: Any,
    projections: FeatureProjections,
    packed: tuple[Any, Any],
    chunk_size: int | None,
) -> tuple[Any, tuple[Any, Any]]:
    batch, length, num_heads, head_dim = _shape(query)
    kv_heads, value_dim = key.shape[2], value.shape[3]
    groups = num_heads // kv_heads
    blocks, chunks, chunk = _partition(length, head_dim, groups, chunk_size)
    padded = blocks * chunks * chunk
    if not isinstance(length, int) or padded != length:
        if key_mask is None:
            key_mask = ops.ones((batch, length), dtype="bool")
        key_mask = _pad(key_mask, padded - length)
        query, key, value = (_pad(x, padded - length) for x in (query, key, value))

    def split(x: Any, *dims: Any) -> Any:
        return ops.reshape(x, (batch, blocks, chunks, chunk, *dims))

    inputs = {
        # Queries of one group stand behind one another, so that the features
        # and states of their common key/value head are computed once.
        "query": ops.transpose(
            split(query, kv_heads, groups, head_dim), (1, 0, 4, 2, 5, 3, 6)
        ),  # (blocks, b, k, N, g, C, h)
        "key": ops.transpose(split(key, kv_heads, head_dim), (1, 0, 4, 2, 3, 5)),
        "value": ops.transpose(split(value, kv_heads, value_dim), (1, 0, 4, 2, 3, 5)),
    }
    if key_mask is not None:
        inputs["mask"] = ops.transpose(split(key_mask), (1, 0, 2, 3))

    def step(carry: Any, block: dict[str, Any]) -> tuple[Any, Any]:
        return _block(block, projections, carry)

    packed, output = scan(step, packed, inputs, blocks)
    output = ops.transpose(output, (1, 0, 3, 5, 2, 4, 6))  # (b, blocks, N, C, k, g, v)
    output = ops.reshape(output, (batch, padded, num_heads, value_dim - 1))
    return output[:, :length], packed


def _block(
    block: dict[str, Any], projections: FeatureProjections, packed: tuple[Any, Any]
) -> tuple[tuple[Any, Any], Any]:
    """N chunks at once: near pairs inside each chunk, everything older by its state."""
    query, key, value = block["query"], block["key"], block["value"]
    batch, kv_heads, chunks, groups, chunk, head_dim = _shape(query)
    value_dim = value.shape[-1]
    num_features = projections.key_kernel.shape[-1]
    rows, tokens = groups * chunk, chunks * chunk

    query = ops.reshape(query, (batch, kv_heads, chunks * rows, head_dim))
    query = _query_weights(query, projections)
    query = ops.reshape(query, (batch, kv_heads, chunks, rows, num_features))

    mask = block.get("mask")
    mask = None if mask is None else ops.reshape(mask, (batch, tokens))
    key = ops.reshape(key, (batch, kv_heads, tokens, head_dim))
    logits, maxima = _key_logits(key, mask, projections)
    logits = ops.reshape(logits, (batch, kv_heads, chunks, chunk, num_features))
    maxima = ops.reshape(maxima, (batch, kv_heads, chunks, chunk))

    sums, log_scale = packed
    within = _running_maximum(maxima)
    # marks[n]: log-scale of the state before chunk n; the last is the block's end.
    marks = ops.concatenate([log_scale[..., None], within[..., -1]], axis=-1)
    marks = _running_maximum(marks)  # (b, k, N + 1)
    before, after = marks[..., :-1], marks[..., 1:]
    scale = ops.maximum(within, before[..., None])  # R_t, (b, k, N, C)
    key = ops.exp(logits - scale[..., None])

    # States at every mark, by one product with the decays between marks.
    update = value * ops.exp(scale - after[..., None])[..., None]
    update = ops.matmul(ops.swapaxes(key, -1, -2), update)  # (b, k, N, m, v)
    states = ops.concatenate([sums[:, :, None], update], axis=2)
    states = ops.reshape(states, (batch, kv_heads, chunks + 1, num_features * value_dim))
    states = ops.matmul(_decay(marks), states)
    states = ops.reshape(states, (batch, kv_heads, chunks + 1, num_features, value_dim))

    far = ops.matmul(query, states[:, :, :-1])
    far = ops.reshape(far, (batch, kv_heads, chunks, groups, chunk, value_dim))
    far = far * ops.exp(before[..., None] - scale)[:, :, :, None, :, None]

    scores = ops.matmul(query, ops.swapaxes(key, -1, -2))
    scores = ops.reshape(scores, (batch, kv_heads, chunks, groups, chunk, chunk))
    scores = scores * _decay(scale)[:, :, :, None]
    scores = ops.reshape(scores, (batch, kv_heads, chunks, rows, chunk))
    near = ops.matmul(scores, value)
    near = ops.reshape(near, (batch, kv_heads, chunks, groups, chunk, value_dim))
    return (states[:, :, -1], marks[..., -1]), _normalize(near + far)


def _running_maximum(x: Any) -> Any:
    """Cumulative maximum along the last axis, which is short; `keras.ops` has none."""
    return ops.max(ops.where(_lower_triangle(_shape(x)[-1]), x[..., None, :], LOG_ZERO), axis=-1)


def _decay(log_scale: Any) -> Any:
    """`(..., L) -> (..., L, L)`: exp(R_j - R_t) for j <= t, zero above the diagonal."""
    difference = log_scale[..., None, :] - log_scale[..., :, None]
    return ops.exp(ops.where(_lower_triangle(_shape(log_scale)[-1]), difference, LOG_ZERO))


def _lower_triangle(size: Any) -> Any:
    index = ops.arange(size, dtype="int32")
    return index[None, :] <= index[:, None]


def _partition(
    length: Any, head_dim: int, groups: int, chunk_size: int | None
) -> tuple[Any, Any, int]:
    """Blocks, chunks per block and chunk size that cover `length` with little padding.

    A length known only at run time (TensorFlow) makes one block of many chunks:
    XLA there has no gradient of a loop. Its (N, N) decays between chunks are
    small change up to some hundred thousand tokens.
    """
    if chunk_size is None:
        # Measured on CPU: 64 is best at head_dim 64 and for multi-query heads,
        # where a chunk's score matrix is groups times as tall; 128 at 256.
        chunk_size = 128 if head_dim > 128 and groups == 1 else 64
    if not isinstance(length, int):
        return 1, (length + chunk_size - 1) // chunk_size, chunk_size
    chunk_size = min(chunk_size, length)
    chunks = -(-length // chunk_size)
    blocks = -(-chunks * chunk_size // max(BLOCK_LENGTH, chunk_size))
    return blocks, -(-chunks // blocks), chunk_size


def _pad(x: Any, amount: Any) -> Any:
    """Zeros behind axis 1. `ops.pad` takes no amount that is a tensor."""
    shape = _shape(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    return ops.concatenate([x, ops.zeros((shape[0], amount, *shape[2:]), dtype=dtype)], axis=1)


def _shape(x: Any) -> tuple[Any, ...]:
    """Static sizes as ints, the others as scalar tensors."""
    return tuple(ops.shape(x))
