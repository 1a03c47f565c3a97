"""The keys that a query meets with softmax's own kernel: those of a sliding window.

A query sees the keys of its window with weights `exp(q . k / sqrt(h))`, older ones through
features, and divides by the sum of both. A key enters the sums of features when it leaves the
window.

Near and far parts have scales of their own, the largest exact weight that a query sees and what its
features amount to together; the larger of the two makes both. No key that is masked, to come, or
far away and unlike the query has a say in it.

The shapes' letters are those of `ops.features`; besides, N chunks of C tokens make a block.
"""

from keras import ops

from keras_darkformer.ops.backend import power, reshape, split_at
from keras_darkformer.ops.features import TO_BASE
from keras_darkformer.ops.partition import pad_front, shape_of
from keras_darkformer.ops.state import LOG_ZERO, Tokens
from keras_darkformer.ops.sums import FUTURE, TINY, normalize, split_last, with_ones
from keras_darkformer.types import Tensor


def tokens_of(key: Tensor, value: Tensor, key_mask: Tensor) -> Tokens:
    """Keys and values to keep. Zeros stand where a key is masked, whatever stood there."""
    key, value = ops.cast(key, "float32"), ops.cast(value, "float32")
    if key_mask is None:
        return Tokens(key, value, ops.ones(ops.shape(key)[:2], dtype="float32"))
    key_mask = ops.broadcast_to(key_mask, ops.shape(key)[:2])
    attended = key_mask[:, :, None, None]
    key, value = ops.where(attended, key, 0.0), ops.where(attended, value, 0.0)
    return Tokens(key, value, ops.cast(key_mask, "float32"))


def followed_by(tokens: Tokens, more: Tokens) -> Tokens:
    """First these tokens, then those."""
    return Tokens(*(ops.concatenate(pair, axis=1) for pair in zip(tokens, more, strict=True)))


def leaving(seen: Tokens, size: int) -> tuple[Tokens, Tokens]:
    """The tokens that are older than the last `size`, and the last `size`."""
    if seen.key.shape[1] is None:
        return Tokens(*(x[:, :-size] for x in seen)), Tokens(*(x[:, -size:] for x in seen))
    # The gradient of slices fills tensors with zeros.
    due, last = zip(*(split_at(x, x.shape[1] - size, axis=1) for x in seen), strict=True)
    return Tokens(*due), Tokens(*last)


def padded_before(recent: Tokens, new: Tokens, padding: Tensor, size: int) -> tuple[Tokens, Tokens]:
    """The window and the tokens after it, with padding before the oldest of the window."""
    if isinstance(padding, int) and not padding:
        return recent, new
    stream = [pad_front(x, padding) for x in followed_by(recent, new)]
    return Tokens(*(x[:, :size] for x in stream)), Tokens(*(x[:, size:] for x in stream))


def written_by_row(
    recent: Tokens, new: Tokens, write_mask: Tensor, size: int
) -> tuple[Tensor, Tokens]:
    """The window behind the last new token that each row keeps, and what has left it by then.

    Args:
        recent: the window before.
        new: `Tokens` after it.
        write_mask: bool, `(b, s)`: which of the new ones are kept. Others take a place in the
            window, but those behind the last one of the row.
        size: W.

    Returns:
        A bool mask `(b, s)` of the first s tokens of `recent` and `new` together: those that were
        kept and have left. And the window.
    """
    batch, length = shape_of(new.mask)
    write_mask = ops.broadcast_to(write_mask, (batch, length))
    seen = followed_by(recent, new)
    kept = ops.concatenate([ops.ones((batch, size), dtype="bool"), write_mask], axis=1)
    index = ops.arange(length, dtype="int32")
    count = ops.max(ops.where(write_mask, index + 1, 0), axis=1, keepdims=True)  # (b, 1)
    left = ops.logical_and(kept[:, :length], index < count)
    rows = ops.arange(batch, dtype="int32")[:, None] * (length + size)
    place = rows + count + ops.arange(size, dtype="int32")  # (b, W)
    seen = seen._replace(mask=ops.where(kept, seen.mask, 0.0))
    key, value, mask = (ops.take(reshape(x, (-1, *x.shape[2:])), place, axis=0) for x in seen)
    return left, tokens_of(key, value, mask > 0)


def with_near(
    query: Tensor,
    seen: Tokens,
    far: Tensor,
    far_scale: Tensor,
    chunks: Tensor,
    chunk: int,
    near_mask: Tensor,
) -> Tensor:
    """Output of queries that see the keys of their window, and a far part.

    Args:
        query: `(b, k, N * C * g, h)`.
        seen: the W tokens before the block and those of the block.
        far: what features give, `(b, k, N, C, g, v + 1)`.
        far_scale: its log-scale, `(b, k, N, C, g)`.
        chunks: N.
        chunk: C.
        near_mask: from `band`.

    Returns:
        `(b, k, N * C * g, v)`.
    """
    batch, kv_heads, rows, head_dim = shape_of(query)
    width = near_mask.shape[1]
    size = width - chunk + 1
    key = _bands(ops.transpose(seen.key, (0, 2, 1, 3)), size, chunks, chunk)
    value = _bands(with_ones(ops.transpose(seen.value, (0, 2, 1, 3))), size, chunks, chunk)
    mask = _bands(ops.where(seen.mask > 0, 0.0, FUTURE)[:, None], size, chunks, chunk)

    query = reshape(query * (head_dim**-0.5 * TO_BASE), (batch, kv_heads, chunks, -1, head_dim))
    logits = query @ ops.swapaxes(key, -1, -2)
    logits = reshape(logits, (batch, kv_heads, chunks, chunk, -1, width))
    logits = logits + (mask[:, :, :, None] + near_mask)[:, :, :, :, None]
    scale = ops.maximum(ops.max(ops.stop_gradient(logits), axis=-1), LOG_ZERO)
    # The far part's own scale is the largest that it could be; what it is may be far below, and
    # must not push the window's weights down.
    amount = ops.stop_gradient(far[..., -1])
    alive = ops.logical_and(amount > TINY, far_scale > 0.5 * LOG_ZERO)
    log_amount = ops.log(ops.where(alive, amount, 1.0)) * TO_BASE
    scale = ops.maximum(scale, ops.where(alive, far_scale + log_amount, LOG_ZERO))
    # At most 1 / TINY, and the product at most the values.
    far = far * power(ops.where(alive, far_scale - scale, FUTURE))[..., None]
    weights = power(logits - scale[..., None])
    weights = reshape(weights, (batch, kv_heads, chunks, -1, width))
    sums = reshape(weights @ value, (batch, kv_heads, rows, value.shape[-1]))
    sums = sums + reshape(far, (batch, kv_heads, rows, value.shape[-1]))
    return normalize(*split_last(sums))


def band(chunk: int, size: int) -> Tensor:
    """`(C, C + W - 1)`: which of the keys of `_bands` a chunk's queries see, as logarithms."""
    query = ops.arange(chunk, dtype="int32")[:, None]
    key = ops.arange(chunk + size - 1, dtype="int32")
    return ops.where(ops.logical_and(key >= query, key < query + size), 0.0, FUTURE)


def _bands(x: Tensor, size: int, chunks: Tensor, chunk: int) -> Tensor:
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
