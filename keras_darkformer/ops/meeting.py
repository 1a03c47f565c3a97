"""A block of queries and the exact memory: what they see of it, and how it changes.

Shapes use the letters of `ops.exact_memory`.
"""

from typing import NamedTuple

from keras import ops

from keras_darkformer.memory import Memory
from keras_darkformer.ops.backend import reshape
from keras_darkformer.ops.cache import kept_part, through_block, with_exits
from keras_darkformer.ops.exact_memory import (
    Part,
    Sinks,
    added_up,
    band,
    find_sinks,
    joined,
    last_written,
    leaving,
    local_part,
    masked,
    received,
    tokens_of,
)
from keras_darkformer.ops.features import TO_BASE
from keras_darkformer.ops.partition import shape_of
from keras_darkformer.ops.state import MemoryState, Tokens
from keras_darkformer.types import Tensor


class Marks(NamedTuple):
    """What is known of the tokens of a call, or of a block of it.

    Attributes:
        index: int32, `(1 or b, s)`, their numbers in the call.
        asks: bool, `(b, s)`, the tokens whose attention counts: those that enter the state.
        enters: bool, `(b, s)`, whether the token that leaves the window at each of them was
            written, so that it may be kept or enter the sums of the state; `None` for all real
            tokens.
    """

    index: Tensor
    asks: Tensor
    enters: Tensor


class Arrival(NamedTuple):
    """The new tokens of a call.

    Attributes:
        tokens: `Tokens`, without those that become sinks.
        sinks: `Sinks`, or `None`.
        marks: `Marks`.
    """

    tokens: Tokens
    sinks: Sinks | None
    marks: Marks


class Held(NamedTuple):
    """The parts of the memory that change from block to block.

    Attributes:
        recent: `Tokens`, the window.
        kept: `Tokens`, or `()`.
    """

    recent: Tokens
    kept: Tokens | tuple[()]


class Meeting(NamedTuple):
    """The result of a block of queries attending to the memory.

    Attributes:
        parts: of the memory, as the queries see it.
        left: `Tokens`, the T that leave the memory, one at each token.
        competed: bool, `(b, k, T)`: which of these may enter the sums of the state, or `None`.
        exits: float32, `(b, k, T)`: what the tokens that left the window had received.
        held: `Held` after the block.
    """

    parts: list[Part]
    left: Tokens
    competed: Tensor
    exits: Tensor
    held: Held


def arrive(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    written: Tensor,
    state: MemoryState,
    memory: Memory,
) -> Arrival:
    """Takes new keys and values, `(b, s, k, ...)`. `written`, bool `(b, s)`, says which stay."""
    tokens, sinks = tokens_of(key, value, key_mask), None
    batch, length = shape_of(key)[:2]
    index = ops.arange(length, dtype="int32")[None]
    enters, asks = None, ops.ones((batch, length), dtype="bool")
    if written is not None:
        asks = written = ops.broadcast_to(written, (batch, length))
        before = ops.ones((batch, memory.window), dtype="bool")
        enters = ops.concatenate([before, written], axis=1)[:, :length]
        enters = ops.logical_and(enters, index < last_written(written))
    if memory.num_sinks:
        assert isinstance(state.sinks, Tokens)
        sinks, tokens = find_sinks(state.sinks, tokens, written)
    return Arrival(tokens, sinks, Marks(index, asks, enters))


def memory_band(chunk: int, memory: Memory) -> Tensor:
    """The `near_mask` of `meet`: a band that reaches one key further if keys are kept.

    That key has left the window, and may be kept.
    """
    if not memory.window:
        return None
    return band(chunk, memory.window, memory.window - (not memory.cache_size))


def meet(
    query: Tensor,
    new: Tokens,
    held: Held,
    sinks: Sinks | None,
    marks: Marks,
    near_mask: Tensor,
    chunks: Tensor,
    chunk: int,
    groups: int,
    memory: Memory,
) -> Meeting:
    """Has the queries of a block, `(b, k, N * C * g, h)`, attend to the memory.

    Args:
        query: from `by_head`.
        new: the block's tokens.
        held: `Held` before the block.
        sinks: `Sinks`, or `None`.
        marks: `Marks` of the block.
        near_mask: from `memory_band`.
        chunks, chunk, groups: N, C and g.
        memory: `Memory`.
    """
    batch, kv_heads, _, head_dim = shape_of(query)
    by_chunk = (batch, kv_heads, chunks, chunk * groups, head_dim)
    query = reshape(query * (head_dim**-0.5 * TO_BASE), by_chunk)
    seen, size = joined(held.recent, new), memory.window
    local, mask = local_part(query, seen, sinks, marks.index, near_mask, chunks, chunk, size)
    if not memory.cache_size:
        exits, recent = leaving(seen, size)
        return Meeting([masked(local, mask)], exits, None, exits.received, Held(recent, ()))
    assert isinstance(held.kept, Tokens)
    shares = received(masked(local, mask), reshape(marks.asks, (batch, chunks, chunk)))
    more = added_up(shares[..., memory.num_sinks :], size, chunks, chunk)
    exits, recent = leaving(seen._replace(received=seen.received + more), size)
    competition = through_block(held.kept, exits, marks.enters, chunks, chunk)
    return Meeting(
        [
            masked(local, with_exits(mask, exits, competition, chunk, memory)),
            kept_part(query, competition, chunk),
        ],
        competition.left,
        competition.competed,
        exits.received,
        Held(recent, competition.kept),
    )
