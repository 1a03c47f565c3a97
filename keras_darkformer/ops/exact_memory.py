"""The exact memory: a constant number of keys that queries attend to with softmax's own kernel.

It holds the sinks, which are the first S tokens of a row; the window, which is the last W tokens;
and G tokens in between that are kept for each key/value head. A query weights the keys in the
memory by `exp(q . k / sqrt(h))` and the others through features, and divides by the sum of both. A
key enters the sums of features when it leaves the memory.

A key receives attention while it is in the window, counted as `softmax` over sinks and window
alone. When it leaves the window, the attention it has received becomes its final score, and it
competes with the kept keys; the one with the lowest score leaves the memory. So one key leaves at
every token, not always the window's oldest, and the keys kept after a token do not depend on how
the sequence is cut into pieces.

Each part has its own scale: the largest exact weight that a query sees, or the total weight of its
features. The largest of these becomes the scale of all. Keys that are masked, in the future, or far
away and unlike the query have no influence on it.

Shapes use the letters of `ops.features`; in addition, N chunks of C tokens make a block of T.
"""

import functools
import operator
from typing import NamedTuple

from keras import ops

from keras_darkformer.ops.backend import inner, largest, pad, power, reshape, split_at
from keras_darkformer.ops.features import TO_BASE
from keras_darkformer.ops.partition import shape_of
from keras_darkformer.ops.state import LOG_ZERO, NOTHING, Tokens
from keras_darkformer.ops.sums import FUTURE, TINY, log_mask, normalize, split_last, with_ones
from keras_darkformer.types import Tensor


class Sinks(NamedTuple):
    """The sinks that a call's queries see.

    Attributes:
        tokens: `Tokens`.
        position: int32, `(b, S)`, the query from which on each is there; -1 for those from earlier
            calls.
    """

    tokens: Tokens
    position: Tensor


class Part(NamedTuple):
    """Some of the keys that the queries of a block attend to exactly.

    Attributes:
        logits: `(b, k, N, C, g, x)`, far below zero where a key is not seen.
        value: `(b, k, N, x, v + 1)`, with a column of ones.
    """

    logits: Tensor
    value: Tensor


def tokens_of(key: Tensor, value: Tensor, key_mask: Tensor) -> Tokens:
    """Keys `(b, s, k, h)` and values as `Tokens`, with zeros where a key is masked."""
    key, value = (ops.transpose(ops.cast(x, "float32"), (0, 2, 1, 3)) for x in (key, value))
    received = ops.zeros_like(key[..., 0])
    if key_mask is None:
        return Tokens(key, value, received)
    real = ops.broadcast_to(key_mask, (ops.shape(key)[0], ops.shape(key)[2]))[:, None]
    received = ops.where(real, received, NOTHING)
    key, value = (ops.where(real[..., None], x, 0.0) for x in (key, value))
    return Tokens(key, value, received)


def none_of(tokens: Tokens) -> Tokens:
    """No tokens, with the other sizes of `tokens`."""
    return Tokens(*(x[:, :, :0] for x in tokens))


def nothing_like(tokens: Tokens, size: Tensor) -> Tokens:
    """`size` places without a token, for the rows and heads of `tokens`."""
    batch, heads = shape_of(tokens.received)[:2]
    shapes = [(batch, heads, size, *x.shape[3:]) for x in tokens]
    fill = zip(shapes, (0.0, 0.0, NOTHING), strict=True)
    return Tokens(*(ops.full(shape, value, dtype="float32") for shape, value in fill))


def joined(tokens: Tokens, more: Tokens) -> Tokens:
    """`tokens`, followed by `more`."""
    return Tokens(*(ops.concatenate(pair, axis=2) for pair in zip(tokens, more, strict=True)))


def leaving(seen: Tokens, size: int) -> tuple[Tokens, Tokens]:
    """The tokens that are older than the last `size`, and the last `size`."""
    if not size:
        return seen, none_of(seen)
    if seen.key.shape[2] is None:
        return Tokens(*(x[:, :, :-size] for x in seen)), Tokens(*(x[:, :, -size:] for x in seen))
    # The gradient of slices fills tensors with zeros.
    due, last = zip(*(split_at(x, x.shape[2] - size, axis=2) for x in seen), strict=True)
    return Tokens(*due), Tokens(*last)


def padded_before(recent: Tokens, new: Tokens, padding: Tensor, size: int) -> tuple[Tokens, Tokens]:
    """The window and the tokens after it, with padding before the oldest of the window."""
    if isinstance(padding, int) and not padding:
        return recent, new
    stream = joined(nothing_like(new, padding), joined(recent, new))
    return Tokens(*(x[:, :, :size] for x in stream)), Tokens(*(x[:, :, size:] for x in stream))


def tokens_at(tokens: Tokens, places: Tensor) -> Tokens:
    """The tokens at the places `(b, 1 or k, y)`."""
    batch, heads, length = shape_of(tokens.received)
    rows = ops.arange(batch * heads, dtype="int32") * length
    places = places + reshape(rows, (batch, heads, 1))
    found = (ops.take(reshape(x, (-1, *x.shape[3:])), places, axis=0) for x in tokens)
    # Without rows, JAX returns fewer axes.
    shapes = ((*shape_of(places), *x.shape[3:]) for x in tokens)
    return Tokens(*map(reshape, found, shapes))


def last_written(written: Tensor) -> Tensor:
    """The number of tokens up to a row's last written one, `(b, s) -> (b, 1)`."""
    index = ops.arange(ops.shape(written)[1], dtype="int32")
    numbers = pad(ops.where(written, index + 1, 0), [(0, 0), (1, 0)])  # 0 without tokens, too
    return largest(numbers, 1, keepdims=True)


def window_by_row(seen: Tokens, written: Tensor, size: int) -> Tokens:
    """The window after the last new token that each row keeps.

    Args:
        seen: the window before and the new tokens.
        written: bool, `(b, s)`: which of the new ones are kept. Others take a place in the window,
            except those after the last kept one of the row.
        size: W.
    """
    before = ops.ones((ops.shape(written)[0], size), dtype="bool")
    kept = ops.concatenate([before, written], axis=1)[:, None]
    places = last_written(written) + ops.arange(size, dtype="int32")
    seen = seen._replace(received=ops.where(kept, seen.received, NOTHING))
    window = tokens_at(seen, places[:, None])
    key, value = (ops.where(window.is_real[..., None], x, 0.0) for x in window[:2])
    return window._replace(key=key, value=value)


def find_sinks(before: Tokens, new: Tokens, written: Tensor) -> tuple[Sinks, Tokens]:
    """The sinks, including new tokens that become sinks, and the other new tokens.

    Args:
        before: the sinks so far.
        new: the new tokens.
        written: bool, `(b, s)`: those that may become sinks, or `None` for all that are real.
    """
    size, length = before.key.shape[2], ops.shape(new.key)[2]
    real = new.is_real[:, 0] if written is None else ops.logical_and(new.is_real[:, 0], written)
    filled = ops.sum(ops.cast(before.is_real[:, 0], "int32"), axis=1, keepdims=True)
    if new.key.shape[2] == 1:
        return _find_sink(before, new, real, filled)
    number = filled + ops.cumsum(ops.cast(real, "int32"), axis=1)  # from 1
    slot = ops.arange(size, dtype="int32")
    earlier = ops.cast(number[:, :, None] <= slot, "int32")
    place = ops.sum(earlier, axis=1)  # of each slot's token; the length if there is none
    is_old, is_new = slot < filled, place < length
    # Looks in both, since there may be no new tokens.
    last = place - ops.cast(ops.logical_not(is_new), "int32")
    places = ops.where(is_old, slot, size + last)
    found = tokens_at(joined(before, new), places[:, None])
    is_there = ops.logical_or(is_old, is_new)
    tokens = _where(is_there, found, Tokens(0.0, 0.0, NOTHING))
    is_sink = ops.logical_and(real, number <= size)[:, None]
    others = new._replace(received=ops.where(is_sink, NOTHING, new.received))
    return Sinks(tokens, ops.where(is_old, -1, place)), others


def _find_sink(before: Tokens, new: Tokens, real: Tensor, filled: Tensor) -> tuple[Sinks, Tokens]:
    """`find_sinks` with one new token: it takes the first free place, if there is one.

    Args:
        before, new: as for `find_sinks`.
        real: bool, `(b, 1)`, whether it may.
        filled: int32, `(b, 1)`, the places that are taken.
    """
    size = before.key.shape[2]
    slot = ops.arange(size, dtype="int32")
    tokens = _where(ops.logical_and(real, slot == filled), new, before)
    is_sink = ops.logical_and(real, filled < size)[:, None]
    others = new._replace(received=ops.where(is_sink, NOTHING, new.received))
    # The only query sees all that is there.
    return Sinks(tokens, ops.zeros_like(tokens.received[:, 0], dtype="int32")), others


def _where(condition: Tensor, tokens: Tokens, others: Tokens) -> Tokens:
    """Place by place, `condition` being `(b, x)`, one token or the other."""
    by_place = condition[:, None]
    conditions = by_place[..., None], by_place[..., None], by_place
    return Tokens(*map(ops.where, conditions, tokens, others))


def local_part(
    query: Tensor,
    seen: Tokens,
    sinks: Sinks | None,
    index: Tensor,
    near_mask: Tensor,
    chunks: Tensor,
    chunk: int,
    size: int,
) -> tuple[Part, Tensor]:
    """Sinks and window as the queries of a block see them.

    Args:
        query: `(b, k, N, C * g, h)`, scaled.
        seen: the W tokens before the block and those of the block.
        sinks: `Sinks`, or `None`.
        index: int32, `(b, T)`, the number of each query in the call.
        near_mask: from `band`, or `None` without a window.
        chunks, chunk, size: N, C and W.

    Returns:
        The part, not masked yet, and its mask as logarithms, `(b, 1, N, C, x)`.
    """
    keys: list[Tensor] = []
    values: list[Tensor] = []
    masks: list[Tensor] = []
    if sinks is not None:
        batch, kv_heads = shape_of(seen.key)[:2]
        # XLA's loops have no gradient of `broadcast_to` to a shape that is known only at run time.
        for_each = ops.zeros((batch, kv_heads, chunks, 1, 1), dtype="float32")
        for into, x in ((keys, sinks.tokens.key), (values, with_ones(sinks.tokens.value))):
            into.append(x[:, :, None] + for_each)
        there = sinks.position[:, None] <= index[..., None]  # (b, T, S)
        there = reshape(there, (batch, 1, chunks, chunk, sinks.tokens.key.shape[2]))
        there = ops.logical_and(there, sinks.tokens.is_real[:, :1, None, None])
        masks.append(log_mask(there))
    if near_mask is not None:
        how = (size, near_mask.shape[1] - chunk, chunks, chunk)
        keys.append(_bands(seen.key, *how))
        values.append(_bands(with_ones(seen.value), *how))
        mask = _bands(log_mask(seen.is_real[:, :1]), *how)
        masks.append(mask[:, :, :, None] + near_mask)
    key, value = (x[0] if len(x) == 1 else ops.concatenate(x, axis=3) for x in (keys, values))
    mask = masks[0] if len(masks) == 1 else ops.concatenate(masks, axis=4)
    logits = inner(query, key)
    groups = query.shape[3] // chunk
    logits = reshape(logits, (*shape_of(query)[:3], chunk, groups, key.shape[3]))
    return Part(logits, value), mask


def masked(part: Part, mask: Tensor) -> Part:
    """A part of which queries see only what a mask, `(b, 1 or k, N, C, x)`, allows."""
    return part._replace(logits=part.logits + mask[:, :, :, :, None])


def received(part: Part, asks: Tensor) -> Tensor:
    """The attention that the keys of a part receive, as if there were no others, `(b, k, N, x)`.

    Args:
        part: from `local_part`.
        asks: bool, `(b, N, C)`: the queries whose attention counts.
    """
    logits = ops.stop_gradient(part.logits)
    top = ops.maximum(largest(logits, -1, keepdims=True), LOG_ZERO)
    weights = power(logits - top)
    total = ops.sum(weights, axis=-1, keepdims=True)
    share = ops.cast(asks, "float32")[:, None, :, :, None, None] / ops.maximum(total, TINY)
    return ops.sum(weights * share, axis=(3, 4))


class Far(NamedTuple):
    """The keys that features stand for, as the queries of a block see them.

    Attributes:
        sums: sums of weights times values, and of weights, `(b, k, N, C, g, v + 1)`.
        log_scale: `(b, k, N, C, g)`.
    """

    sums: Tensor
    log_scale: Tensor


def combined(parts: list[Part], far: Far | None) -> Tensor:
    """Output of queries that see parts of the memory, and a far part: `(b, k, N * C * g, v)`."""
    scale: Tensor = LOG_ZERO  # above the logits of keys that are not seen
    if far is not None:
        # The far part's own scale is the largest that it could have. Its actual weight may be far
        # smaller, and must not push the window's weights down.
        amount = ops.stop_gradient(far.sums[..., -1])
        alive = ops.logical_and(amount > TINY, far.log_scale > 0.5 * LOG_ZERO)
        log_amount = ops.log(ops.where(alive, amount, 1.0)) * TO_BASE
        scale = ops.where(alive, far.log_scale + log_amount, LOG_ZERO)
    for part in parts:
        scale = ops.maximum(scale, largest(ops.stop_gradient(part.logits), -1))
    batch, kv_heads, chunks, chunk, groups = shape_of(parts[0].logits)[:5]
    rows, columns, sums = chunk * groups, parts[0].value.shape[-1], []
    if far is not None:
        # At most 1 / TINY, and the product at most the values.
        weights = power(ops.where(alive, far.log_scale - scale, FUTURE))
        weighted = far.sums * weights[..., None]
        sums.append(reshape(weighted, (batch, kv_heads, chunks, rows, columns)))
    for part in parts:
        weights = power(part.logits - scale[..., None])
        weights = reshape(weights, (batch, kv_heads, chunks, rows, part.value.shape[3]))
        sums.append(weights @ part.value)
    total = functools.reduce(operator.add, sums)  # `sum` would first add a zero
    total = reshape(total, (batch, kv_heads, chunks * rows, columns))
    return normalize(*split_last(total))


def band(chunk: int, size: int, reach: int) -> Tensor:
    """`(C, C + reach)`: which keys a chunk's queries see in their window, as logarithms.

    The keys are those of `_bands`: of the chunk, and `reach` before it.
    """
    query = ops.arange(chunk, dtype="int32")[:, None]
    age = query + reach - ops.arange(chunk + reach, dtype="int32")
    return log_mask(ops.logical_and(age >= 0, age < size))


def _bands(x: Tensor, size: int, reach: int, chunks: Tensor, chunk: int) -> Tensor:
    """`(b, k, W + N * C, ...) -> (b, k, N, C + reach, ...)`: each chunk and what is before it."""
    if isinstance(chunks, int) and chunks == 1:
        return x[:, :, None, size - reach :]
    batch, heads, _, *sizes = shape_of(x)
    before = -(-reach // chunk)  # chunks that are reached into
    missing = before * chunk - size
    if missing < 0:
        x = x[:, :, -missing:]
    elif missing:
        zeros = ops.zeros((batch, heads, missing, *sizes), dtype="float32")
        x = ops.concatenate([zeros, x], axis=2)
    x = reshape(x, (batch, heads, chunks + before, chunk, *sizes))
    bands = [x[:, :, i : i - before or None] for i in range(before + 1)]
    bands[0] = bands[0][:, :, :, before * chunk - reach :]
    return ops.concatenate(bands, axis=3) if before else bands[0]


def added_up(x: Tensor, size: int, chunks: Tensor, chunk: int) -> Tensor:
    """`(b, k, N, C + W) -> (b, k, W + N * C)`: the sum over all chunks' bands for each token."""
    if isinstance(chunks, int) and chunks == 1:
        return x[:, :, 0]
    batch, heads = shape_of(x)[:2]
    before = -(-size // chunk)
    missing = before * chunk - size
    x = pad(x, [(0, 0), (0, 0), (0, 0), (missing, 0)])
    x = reshape(x, (batch, heads, chunks, before + 1, chunk))
    total = sum(
        pad(x[:, :, :, i], [(0, 0), (0, 0), (i, before - i), (0, 0)]) for i in range(before + 1)
    )
    return reshape(total, (batch, heads, (chunks + before) * chunk))[:, :, missing:]
