"""Linear attention whose last W keys are seen by the exact softmax kernel.

A query sees the keys of its window with weights `exp(q . k / sqrt(h))`, older
ones through features, and divides by the sum of both. Time and memory are
linear in the length, and the state is of constant size: the sums of
`ops.sums`, and the last W keys and values as they are.

A key enters the sums when it leaves the window. So the far part is the chunked
form with keys that come W tokens late; the near part meets the chunk's keys
and the W - 1 before them. Each has a scale of its own, the largest exact
weight that a query sees and what its features amount to together, and the
larger of the two makes both: no key that is masked, to come or far away and
unlike the query has a say in it.

The shapes' letters are those of `ops.features`; besides, N chunks of C tokens
make a block.
"""

import math
from typing import Any

from keras import ops

from keras_darkformer.ops.backend import BASE, power, reshape, scan, split_at
from keras_darkformer.ops.features import (
    FeatureProjections,
    Window,
    log_query_features,
    log_query_scale,
)
from keras_darkformer.ops.partition import (
    chunk_partition,
    pad_front,
    shape_of,
    tokens_first,
)
from keras_darkformer.ops.sums import (
    FUTURE,
    LOG_ZERO,
    TINY,
    State,
    absorb,
    absorb_one,
    by_head,
    chunked_sums,
    future,
    initial_state,
    normalize,
    pack,
    split_last,
    unpack,
    with_ones,
)

# Keys `(b, x, k, h)`, values `(b, x, k, v)` and, 1 or 0, their mask `(b, x)`.
Tokens = tuple[Any, Any, Any]


def windowed_attention(
    query: Any,
    key: Any,
    value: Any,
    projections: FeatureProjections,
    window: Window,
    *,
    key_mask: Any = None,
    state: State | None = None,
    chunk_size: int | None = None,
    remat: bool | None = None,
    with_state: bool = True,
) -> tuple[Any, State | None]:
    """`linear_attention` with a window; causal."""
    state = _state(state, key, value, projections, window)
    if key.shape[1] == 1:
        return _recurrent(query, key, value, key_mask, projections, window, state)
    output, after = _chunked(
        query, key, value, key_mask, projections, window, state, chunk_size, remat
    )
    if key_mask is None:
        return output, after
    if not with_state:
        return output, None
    # The scan's has taken in as many keys as there were tokens, padding among them.
    return output, accumulate_windowed(
        key, value, projections, window, key_mask=key_mask, state=state, remat=remat
    )


def accumulate_windowed(
    key: Any,
    value: Any,
    projections: FeatureProjections,
    window: Window,
    *,
    key_mask: Any = None,
    state: State | None = None,
    remat: bool | None = None,
) -> State:
    """`accumulate_state` with a window.

    Keys that are masked take their place in the window, but those behind the
    last one that is not: padding leaves the state as it was.
    """
    state = _state(state, key, value, projections, window)
    seen = _followed_by(state[-3:], window_tokens(key, value, key_mask))
    if key_mask is None:
        due, last = _leaving(seen, window.size)
    else:
        due, last = _leaving_rows(seen, window.size)
    if window.only:
        return last
    packed = pack(state[:3], key, value, projections)
    due_key, due_value, mask = due
    packed = absorb(due_key, due_value, mask > 0, projections, packed, remat)
    return *unpack(packed), *last


def _recurrent(
    query: Any,
    key: Any,
    value: Any,
    key_mask: Any,
    projections: FeatureProjections,
    window: Window,
    state: State,
) -> tuple[Any, State]:
    """One more key against the state."""
    seen = _followed_by(state[-3:], window_tokens(key, value, key_mask))
    due, after = _leaving(seen, window.size)
    query = by_head(query, key.shape[2])
    far = None
    if not window.only:
        due_key, due_value, mask = due
        kv_state, key_state, log_scale = sums = absorb_one(
            due_key, due_value, mask > 0, projections, state[:3]
        )
        features, scale = _features_of_queries(query, projections, window)
        scale = scale + log_scale[..., None] * (1 / math.log(BASE))
        numerator, denominator = features @ kv_state, features @ key_state[..., None]
        far_sums = ops.concatenate([numerator, denominator], axis=-1)
        far = far_sums[:, :, None, None], scale[:, :, None, None]
        after = (*sums, *after)
    output = _attend(query, seen, far, 1, 1, _band(1, window.size))
    if key_mask is not None:
        attended = ops.broadcast_to(ops.cast(key_mask, "bool"), ops.shape(key)[:2])[:, 0]
        after = tuple(
            ops.where(reshape(attended, (-1, *[1] * (len(new.shape) - 1))), new, old)
            for new, old in zip(after, state, strict=True)
        )
    return tokens_first(output, 1), after


def _chunked(
    query: Any,
    key: Any,
    value: Any,
    key_mask: Any,
    projections: FeatureProjections,
    window: Window,
    state: State,
    chunk_size: int | None,
    remat: bool | None,
) -> tuple[Any, State]:
    """Output, and the state after all tokens, masked or not."""
    length, num_heads, head_dim = shape_of(query)[1:]
    kv_heads, size = key.shape[2], window.size
    groups = num_heads // kv_heads
    blocks, chunks, chunk = chunk_partition(length, head_dim, groups, chunk_size)
    tokens = chunks * chunk
    padding = blocks * tokens - length
    last, new = state[-3:], window_tokens(key, value, key_mask)
    if not isinstance(padding, int) or padding:
        # What fills up the first block goes before all keys: behind them it
        # would push the last ones out of the window.
        query = pad_front(query, padding)
        stream = _followed_by(tuple(pad_front(x, padding) for x in last), new)
        last, new = tuple(x[:, :size] for x in stream), tuple(x[:, size:] for x in stream)
    inputs = [reshape(x, (shape_of(x)[0], blocks, tokens, *x.shape[2:])) for x in (query, *new)]
    masks = _band(chunk, size), future(chunk), future(chunks + 1)
    scales = window.norm_kernel, window.kernel, window.bias
    packed = () if window.only else pack(state[:3], key, value, projections)

    def step(carry: Any, block: Any, constants: Any) -> tuple[Any, Any]:
        packed, last = carry
        projections, scales, (band, *masks) = constants
        query, *new = block
        query = by_head(query, kv_heads)
        seen = _followed_by(last, new)
        due, last = _leaving(seen, size)
        far = None
        if not window.only:
            features, scale = _features_of_queries(query, projections, Window(size, *scales))
            due = dict(zip(("key", "value", "key_mask"), (*due[:2], due[2] > 0), strict=True))
            sums, key_scale, packed = chunked_sums(
                features, due, projections, packed, groups, chunks, chunk, masks
            )
            scale = reshape(scale, (*shape_of(key_scale), groups))
            far = sums, scale + key_scale[..., None]
        output = _attend(query, seen, far, chunks, chunk, band)
        return (packed, last), tokens_first(output, tokens)

    constants = (None if window.only else projections, scales, masks)
    (packed, last), output = scan(step, (packed, last), inputs, constants, remat=remat)
    output = reshape(output, (shape_of(output)[0], blocks * tokens, num_heads, value.shape[3]))
    state = last if window.only else (*unpack(packed), *last)
    return output if isinstance(padding, int) and not padding else output[:, padding:], state


def _features_of_queries(
    query: Any, projections: FeatureProjections, window: Window
) -> tuple[Any, Any]:
    """Features `(b, k, t * g, m)`, the largest of each query being 1, and their log-scales.

    The scales are constants to the gradient, as those of keys are.
    """
    logits, log_scale = log_query_features(query, projections), log_query_scale(query, window)
    largest, constant = ops.max(ops.stop_gradient(logits), axis=-1), ops.stop_gradient(log_scale)
    features = power(logits - (largest + (constant - log_scale))[..., None])
    return features, ops.maximum(constant + largest, LOG_ZERO)


def _attend(
    query: Any, seen: Tokens, far: tuple[Any, Any] | None, chunks: Any, chunk: int, band: Any
) -> Any:
    """Output of queries that see the keys of their window, and a far part.

    Args:
        query: `(b, k, N * C * g, h)`.
        seen: the W tokens before the block and those of the block.
        far: what features give, `(b, k, N, C, g, v + 1)`, and its log-scale,
            `(b, k, N, C, g)`, or `None`.
        chunks: N.
        chunk: C.
        band: from `_band`.

    Returns:
        `(b, k, N * C * g, v)`.
    """
    batch, kv_heads, rows, head_dim = shape_of(query)
    key, value, mask = seen
    size = band.shape[1] - chunk + 1
    key = _bands(ops.transpose(key, (0, 2, 1, 3)), size, chunks, chunk)
    value = _bands(with_ones(ops.transpose(value, (0, 2, 1, 3))), size, chunks, chunk)
    mask = _bands(ops.where(mask > 0, 0.0, FUTURE)[:, None], size, chunks, chunk)

    query = reshape(
        query * (head_dim**-0.5 / math.log(BASE)), (batch, kv_heads, chunks, -1, head_dim)
    )
    logits = query @ ops.swapaxes(key, -1, -2)
    logits = reshape(logits, (batch, kv_heads, chunks, chunk, -1, band.shape[1]))
    logits = logits + (mask[:, :, :, None] + band)[:, :, :, :, None]
    scale = ops.maximum(ops.max(ops.stop_gradient(logits), axis=-1), LOG_ZERO)
    if far is not None:
        far_sums, far_scale = far
        # Its own scale is the largest that it could be; what it is may be far
        # below, and must not push the window's weights down.
        amount = ops.stop_gradient(far_sums[..., -1])
        alive = amount > TINY
        log_amount = ops.log(ops.where(alive, amount, 1.0)) * (1 / math.log(BASE))
        scale = ops.maximum(scale, ops.where(alive, far_scale + log_amount, LOG_ZERO))
        # At most 1 / TINY, and the product at most the values.
        far_sums = far_sums * power(ops.where(alive, far_scale - scale, FUTURE))[..., None]
    weights = power(logits - scale[..., None])
    weights = reshape(weights, (batch, kv_heads, chunks, -1, band.shape[1]))
    sums = reshape(weights @ value, (batch, kv_heads, rows, value.shape[-1]))
    if far is not None:
        sums = sums + reshape(far_sums, (batch, kv_heads, rows, value.shape[-1]))
    return normalize(*split_last(sums))


def _band(chunk: int, size: int) -> Any:
    """`(C, C + W - 1)`: which of the keys of `_bands` a chunk's queries see, as logarithms."""
    query = ops.arange(chunk, dtype="int32")[:, None]
    key = ops.arange(chunk + size - 1, dtype="int32")
    return ops.where(ops.logical_and(key >= query, key < query + size), 0.0, FUTURE)


def _bands(x: Any, size: int, chunks: Any, chunk: int) -> Any:
    """`(b, k, W + N * C, ...) -> (b, k, N, C + W - 1, ...)`: a chunk and the W - 1 before it."""
    if isinstance(chunks, int) and chunks == 1:
        return x[:, :, None, 1:]
    batch, heads, _, *sizes = shape_of(x)
    before = -(-(size - 1) // chunk)  # chunks that W - 1 tokens reach into
    missing = before * chunk - size
    if missing < 0:
        x = x[:, :, 1:]
    elif missing:
        zeros = ops.zeros((batch, heads, missing, *sizes), dtype="float32")
        x = ops.concatenate([zeros, x], axis=2)
    x = reshape(x, (batch, heads, chunks + before, chunk, *sizes))
    bands = [x[:, :, i : i - before or None] for i in range(before + 1)]
    bands[0] = bands[0][:, :, :, before * chunk - (size - 1) :]
    return ops.concatenate(bands, axis=3) if before else bands[0]


def _state(
    state: State | None,
    key: Any,
    value: Any,
    projections: FeatureProjections,
    window: Window,
) -> State:
    """`state` in float32, or that before the first token."""
    if state is not None:
        return tuple(ops.cast(leaf, "float32") for leaf in state)
    return initial_state(
        ops.shape(key)[0],
        key.shape[2],
        1 if window.only else projections.num_features,
        value.shape[3],
        sliding_window=window.size,
        head_dim=key.shape[3],
        window_only=window.only,
    )


def window_tokens(key: Any, value: Any, key_mask: Any) -> Tokens:
    """Zeros stand where a key is masked, whatever stood there."""
    key, value = ops.cast(key, "float32"), ops.cast(value, "float32")
    if key_mask is None:
        return key, value, ops.ones(ops.shape(key)[:2], dtype="float32")
    key_mask = ops.broadcast_to(ops.cast(key_mask, "bool"), ops.shape(key)[:2])
    attended = key_mask[:, :, None, None]
    key, value = ops.where(attended, key, 0.0), ops.where(attended, value, 0.0)
    return key, value, ops.cast(key_mask, "float32")


def _followed_by(tokens: Any, more: Any) -> Any:
    return tuple(ops.concatenate(pair, axis=1) for pair in zip(tokens, more, strict=True))


def _leaving(seen: Tokens, size: int) -> tuple[Any, Any]:
    """The tokens that are older than the last W, and the last W."""
    if seen[0].shape[1] is None:
        return tuple(x[:, :-size] for x in seen), tuple(x[:, -size:] for x in seen)
    # The gradient of slices fills tensors with zeros.
    due, last = zip(*(split_at(x, x.shape[1] - size, axis=1) for x in seen), strict=True)
    return due, last


def _leaving_rows(seen: Tokens, size: int) -> tuple[Any, Any]:
    """The same, each row ending with its last new token that is not masked."""
    batch, total = shape_of(seen[2])
    length = total - size
    index = ops.arange(length, dtype="int32")
    new = seen[2][:, size:]
    count = ops.max(ops.where(new > 0, index + 1, 0), axis=1, keepdims=True)  # (b, 1)
    due_key, due_value, mask = (x[:, :length] for x in seen)
    mask = ops.where(index < count, mask, 0.0)
    rows = ops.arange(batch, dtype="int32")[:, None] * total
    place = rows + count + ops.arange(size, dtype="int32")  # (b, W)
    last = tuple(ops.take(reshape(x, (-1, *x.shape[2:])), place, axis=0) for x in seen)
    return (due_key, due_value, mask), last
