"""Attention with exponential features, in time and memory linear in the length.

One operation in three equal forms, all of them behind `linear_attention`:

- parallel: every query sees every key (bidirectional and cross attention);
- chunked: causal, by chunks;
- recurrent: one key against the state.

The first two go through long sequences in blocks, whose tensors fit a cache,
and carry a state from block to block.

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

import keras
from keras import ops

from keras_darkformer.ops.backend import BASE, block_length, power, reshape, scan
from keras_darkformer.ops.features import (
    FeatureProjections,
    log_key_features,
    log_query_features,
)

State = tuple[Any, Any, Any]

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
    remat: bool | None = None,
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
        remat: bool or `None`, see `backend.scan`.

    Returns:
        `(output, state)`: `(b, t, n, v)` in float32, and the state after the
        last key.
    """
    if key.shape[1] == 1 and state is not None:
        return _recurrent(query, key, value, key_mask, projections, state)
    packed = _pack(state, key, value, projections)
    if causal and key.shape[1] != 1:
        output, packed = _chunked(
            query, key, value, key_mask, projections, packed, chunk_size, remat
        )
    else:
        packed = _absorb(key, value, key_mask, projections, packed, remat)
        output = _read(query, projections, packed, remat)
    return output, _unpack(packed)


def accumulate_state(
    key: Any,
    value: Any,
    projections: FeatureProjections,
    *,
    key_mask: Any = None,
    state: State | None = None,
    remat: bool | None = None,
) -> State:
    """The state after more keys, without reading it: `linear_attention` less its output."""
    packed = _pack(state, key, value, projections)
    return _unpack(_absorb(key, value, key_mask, projections, packed, remat))


def _recurrent(
    query: Any,
    key: Any,
    value: Any,
    key_mask: Any,
    projections: FeatureProjections,
    state: State,
) -> tuple[Any, State]:
    """One more key: little to compute, so what counts is the number of operations."""
    block = {"key": key, "value": value}
    if key_mask is not None:
        block["key_mask"] = ops.broadcast_to(ops.cast(key_mask, "bool"), ops.shape(key)[:2])
    features, key_scale, value = _keys_and_values(block, projections)
    kv_state, key_state, log_scale = (ops.cast(leaf, "float32") for leaf in state)
    log_scale = log_scale * (1 / math.log(BASE))
    new_scale = ops.maximum(log_scale, key_scale[..., 0])
    decay = power(log_scale - new_scale)[..., None]
    features = features[:, :, 0] * power(key_scale - new_scale[..., None])
    kv_state = kv_state * decay[..., None] + features[..., None] * value
    key_state = key_state * decay + features
    query_features = _query_features(query, projections)
    output = _normalize(query_features @ kv_state, query_features @ key_state[..., None])
    state = kv_state, key_state, new_scale * math.log(BASE)
    return _tokens_first(output, ops.shape(query)[1]), state


# In the other forms numerator and denominator travel as one tensor: a column
# of ones appended to the values makes one product of two. Logarithms are to
# the base that the backend is fastest in.


def _pack(
    state: State | None, key: Any, value: Any, projections: FeatureProjections
) -> tuple[Any, Any]:
    if state is None:
        num_features = projections.key_kernel.shape[-1]
        state = initial_state(ops.shape(key)[0], key.shape[2], num_features, value.shape[3])
    kv_state, key_state, log_scale = (ops.cast(leaf, "float32") for leaf in state)
    sums = ops.concatenate([kv_state, key_state[..., None]], axis=-1)
    return sums, log_scale * (1 / math.log(BASE))


def _unpack(packed: tuple[Any, Any]) -> State:
    sums, log_scale = packed
    kv_state, key_state = _split_last(sums)
    return kv_state, key_state[..., 0], log_scale * math.log(BASE)


def _with_ones(value: Any) -> Any:
    return ops.concatenate([value, ops.ones_like(value[..., :1])], axis=-1)


def _split_last(sums: Any) -> tuple[Any, Any]:
    return ops.split(sums, [sums.shape[-1] - 1], axis=-1)


def _query_features(query: Any, projections: FeatureProjections) -> Any:
    """`(b, t, n, h) -> (b, k, t * g, m)`, the largest feature of each query being 1.

    The queries of a group stand beside one another, since they meet the same
    keys.
    """
    batch, length, num_heads, head_dim = _shape(query)
    kv_heads = projections.query_kernel.shape[0]
    groups = num_heads // kv_heads
    query = reshape(ops.cast(query, "float32"), (batch, length, kv_heads, groups, head_dim))
    query = ops.transpose(query, (0, 2, 1, 3, 4))
    query = reshape(query, (batch, kv_heads, length * groups, head_dim))
    logits = log_query_features(query, projections)
    return power(logits - ops.max(ops.stop_gradient(logits), axis=-1, keepdims=True))


def _keys_and_values(
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


def _normalize(numerator: Any, denominator: Any) -> Any:
    """Their quotient; rows that saw no key are zero, gradient included."""
    alive = denominator > TINY
    denominator = ops.where(alive, denominator, 1.0)
    # Dividing both by the denominator's value first keeps its square, which
    # the gradient of a quotient holds, from underflowing.
    scale = 1.0 / ops.stop_gradient(denominator)
    return (numerator * scale) * ops.where(alive, 1.0 / (denominator * scale), 0.0)


def _absorb(
    key: Any,
    value: Any,
    key_mask: Any,
    projections: FeatureProjections,
    packed: tuple[Any, Any],
    remat: bool | None,
) -> tuple[Any, Any]:
    """The state with all keys added, block by block."""
    blocks, tokens = _blocks(ops.shape(key)[1])
    inputs = _split({"key": key, "value": value}, key_mask, blocks, tokens)

    def step(
        packed: tuple[Any, Any], block: dict[str, Any], projections: FeatureProjections
    ) -> tuple[Any, Any]:
        sums, log_scale = packed
        features, key_scale, value = _keys_and_values(block, projections)
        new_scale = ops.maximum(log_scale, ops.max(key_scale, axis=-1))
        value = _with_ones(value) * power(key_scale - new_scale[..., None])[..., None]
        decay = power(log_scale - new_scale)[..., None, None]
        return (sums * decay + ops.swapaxes(features, -1, -2) @ value, new_scale), ()

    return scan(step, packed, inputs, projections, remat=remat)[0]


def _read(
    query: Any, projections: FeatureProjections, packed: tuple[Any, Any], remat: bool | None
) -> Any:
    """What every query reads from the state, block by block."""
    length = ops.shape(query)[1]
    blocks, tokens = _blocks(length)
    inputs = _split({"query": query}, None, blocks, tokens)

    def step(carry: Any, block: dict[str, Any], constants: Any) -> tuple[Any, Any]:
        projections, sums = constants
        sums = _query_features(block["query"], projections) @ sums
        return carry, _tokens_first(_normalize(*_split_last(sums)), tokens)

    output = scan(step, (), inputs, (projections, packed[0]), remat=remat)[1]
    return _join(output, length)


def _tokens_first(output: Any, length: Any) -> Any:
    """`(b, k, t * g, v) -> (b, t, n, v)`."""
    batch, kv_heads, _, value_dim = _shape(output)
    output = reshape(output, (batch, kv_heads, length, -1, value_dim))
    output = ops.transpose(output, (0, 2, 1, 3, 4))
    return reshape(output, (batch, length, -1, value_dim))


def _chunked(
    query: Any,
    key: Any,
    value: Any,
    key_mask: Any,
    projections: FeatureProjections,
    packed: tuple[Any, Any],
    chunk_size: int | None,
    remat: bool | None,
) -> tuple[Any, tuple[Any, Any]]:
    length, num_heads, head_dim = _shape(query)[1:]
    groups = num_heads // key.shape[2]
    blocks, chunks, chunk = _partition(length, head_dim, groups, chunk_size)
    inputs = {"query": query, "key": key, "value": value}
    inputs = _split(inputs, key_mask, blocks, chunks * chunk)
    masks = _future(chunk), _future(chunks + 1)

    def step(packed: Any, block: dict[str, Any], constants: Any) -> tuple[Any, Any]:
        projections, masks = constants
        return _block(block, projections, packed, chunks, chunk, masks)

    packed, output = scan(step, packed, inputs, (projections, masks), remat=remat)
    return _join(output, length), packed


def _block(
    block: dict[str, Any],
    projections: FeatureProjections,
    packed: tuple[Any, Any],
    chunks: Any,
    chunk: int,
    masks: tuple[Any, Any],
) -> tuple[tuple[Any, Any], Any]:
    """N chunks at once: near pairs inside each chunk, everything older by its state."""
    query = _query_features(block["query"], projections)
    key, key_scale, value = _keys_and_values(block, projections)
    batch, kv_heads, rows, num_features = _shape(query)
    value_dim = value.shape[-1] + 1
    groups = block["query"].shape[2] // kv_heads
    query = reshape(query, (batch, kv_heads, chunks, chunk * groups, num_features))
    key = reshape(key, (batch, kv_heads, chunks, chunk, num_features))
    value = reshape(_with_ones(value), (batch, kv_heads, chunks, chunk, value_dim))
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
        states, last = ops.split(states, [chunks], axis=2)
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
    output = reshape(_normalize(*_split_last(near + far)), (batch, kv_heads, rows, value_dim - 1))
    return (last, reached[..., -1]), _tokens_first(output, chunks * chunk)


def _future(size: Any) -> Any:
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


def _blocks(length: Any) -> tuple[int, Any]:
    """Blocks and tokens per block that cover `length` with little padding.

    A block without chunks holds less: it may have twice the tokens. A length
    known only at run time (TensorFlow) makes one block: XLA there has no
    gradient of a loop.
    """
    blocks = -(-length // (2 * block_length(length))) if isinstance(length, int) else 1
    return blocks, -(-length // blocks)


def pick_chunk_size(head_dim: int, groups: int) -> int:
    """Tokens per chunk of the causal form: measured on CPU, alike on all backends.

    A chunk costs scores of its length by its length, and a state. Large heads
    have large states; in a group of query heads the scores are as many times
    as tall, the state is not.
    """
    if groups >= 8:
        return 32
    return 128 if head_dim > 128 and groups == 1 else 64


def _partition(
    length: Any, head_dim: int, groups: int, chunk_size: int | None
) -> tuple[Any, Any, int]:
    """Blocks, chunks per block and chunk size that cover `length` with little padding.

    The one block of a length known only at run time has many chunks; the (N, N)
    decays between them are small change up to some hundred thousand tokens.
    """
    if chunk_size is None:
        chunk_size = pick_chunk_size(head_dim, groups)
    if not isinstance(length, int):
        return 1, (length + chunk_size - 1) // chunk_size, chunk_size
    chunk_size = min(chunk_size, length)
    chunks = -(-length // chunk_size)
    blocks = -(-chunks * chunk_size // max(block_length(length), chunk_size))
    return blocks, -(-chunks // blocks), chunk_size


def _split(inputs: dict[str, Any], key_mask: Any, blocks: int, tokens: Any) -> dict[str, Any]:
    """`(b, length, ...) -> (b, blocks, tokens, ...)`; keys that fill up are masked."""
    batch, length = _shape(next(iter(inputs.values())))[:2]
    if key_mask is not None:
        key_mask = ops.broadcast_to(ops.cast(key_mask, "bool"), (batch, length))
    if not isinstance(tokens, int) or blocks * tokens != length:
        padding = blocks * tokens - length
        if key_mask is None and "key" in inputs:
            key_mask = ops.ones((batch, length), dtype="bool")
        inputs = {name: _pad(x, padding) for name, x in inputs.items()}
        key_mask = None if key_mask is None else _pad(key_mask, padding)
    if key_mask is not None:
        inputs["key_mask"] = key_mask
    return {name: reshape(x, (batch, blocks, tokens, *x.shape[2:])) for name, x in inputs.items()}


def _join(output: Any, length: Any) -> Any:
    """`(b, blocks, tokens, n, v) -> (b, length, n, v)`."""
    batch, blocks, tokens, *sizes = _shape(output)
    output = reshape(output, (batch, blocks * tokens, *sizes))
    return output[:, :length]


def _pad(x: Any, amount: Any) -> Any:
    """Zeros behind axis 1. `ops.pad` takes no amount that is a tensor."""
    shape = _shape(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    return ops.concatenate([x, ops.zeros((shape[0], amount, *shape[2:]), dtype=dtype)], axis=1)


def _shape(x: Any) -> tuple[Any, ...]:
    """Static sizes as ints, the others as scalar tensors."""
    return tuple(ops.shape(x))
