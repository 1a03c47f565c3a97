"""The keys that are kept when they leave the window: a queue by what they have received.

The shapes' letters are those of `ops.exact_memory`.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_darkformer.memory import Memory
from keras_darkformer.ops.backend import reshape, search
from keras_darkformer.ops.exact_memory import Part, joined, masked, tokens_at
from keras_darkformer.ops.partition import shape_of
from keras_darkformer.ops.state import Tokens
from keras_darkformer.ops.sums import FUTURE, with_ones
from keras_darkformer.types import Tensor

# The score of a key that does not compete: below that of a place where nothing is.
OUT = -2.0


class Competition(NamedTuple):
    """How the cache goes through a block.

    Attributes:
        before: `Tokens` by chunk, `(b, k, N, G, ...)`: those that are kept before it.
        leaves: int32, `(b, k, N, G)`: at which of the chunk's tokens each of them leaves the
            memory; C for those that stay.
        exits_leave: int32, `(b, k, N, C)`: the same of those that leave the window in it.
        left: `Tokens`, the T that leave, one at each token.
        competed: bool, `(b, k, T)`: which of them had a chance to stay.
        kept: `Tokens`, the G that are kept behind the block.
    """

    before: Tokens
    leaves: Tensor
    exits_leave: Tensor
    left: Tokens
    competed: Tensor
    kept: Tokens


def compete(kept: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
    """Who stays among the G of the largest scores, token by token.

    Args:
        kept: scores of those that are kept, `(b, k, G)`, oldest first.
        entering: scores of those that enter, one at each token, `(b, k, C)`.

    Returns:
        `leaves`, see `Competition`, of all of them, `(b, k, G + C)`; and an order of them: the C
        that leave, as they do, then the G that stay, oldest first. Of equal scores the older one
        leaves.
    """
    size, chunk = kept.shape[-1], shape_of(entering)[-1]
    scores = ops.concatenate([kept, entering], axis=-1)
    one, other = scores[..., :, None], scores[..., None, :]
    index = ops.arange(size + chunk, dtype="int32")
    beats = ops.where(index[:, None] > index[None, :], one >= other, one > other)
    beats = ops.cast(beats, "int32")
    rank = ops.sum(beats[:, :, :size], axis=2)[:, :, None] + ops.cumsum(beats[:, :, size:], axis=2)
    stays = ops.sum(ops.cast(rank < size, "int32"), axis=2)
    leaves = ops.maximum(stays, index - size)
    return leaves, ops.argsort(leaves * (size + chunk) + index, axis=-1)


def through_block(
    kept: Tokens, exits: Tokens, enters: Tensor, chunks: Tensor, chunk: int
) -> Competition:
    """Lets the tokens of a block that leave the window compete.

    Args:
        kept: those that are kept before the block.
        exits: T tokens, one leaves the window at each token of the block.
        enters: bool, `(b, T)`: which of them compete, or `None` for all. The others leave the
            memory at once.
        chunks, chunk: N and C.
    """
    batch, heads, length = shape_of(exits.received)
    size = kept.received.shape[2]
    scores = ops.stop_gradient(exits.received)
    if enters is not None:
        scores = ops.where(enters[:, None], scores, OUT)
    by_chunk = ops.transpose(reshape(scores, (batch, heads, chunks, chunk)), (0, 2, 1, 3))
    places = ops.broadcast_to(size + ops.arange(length, dtype="int32"), (batch, heads, length))
    places = ops.transpose(reshape(places, (batch, heads, chunks, chunk)), (0, 2, 1, 3))

    def step(carry: Any, block: Any) -> Any:
        leaves, order = compete(carry[0], block[0])
        score, place = (
            ops.take_along_axis(ops.concatenate(pair, axis=-1), order, axis=-1)
            for pair in zip(carry, block, strict=True)
        )
        seen = (carry[1], leaves, place[..., :chunk], score[..., :chunk] > OUT)
        return (score[..., chunk:], place[..., chunk:]), seen

    first = ops.broadcast_to(ops.arange(size, dtype="int32"), (batch, heads, size))
    carry = (ops.stop_gradient(kept.received), first)
    none = ops.zeros((batch, heads, size + chunk), dtype="int32")
    output = (first, none, none[..., :chunk], none[..., :chunk] > 0)
    (_, last), found = search(step, carry, output, (by_chunk, places))
    places, leaves, left, competed = (ops.transpose(x, (0, 2, 1, 3)) for x in found)
    source = joined(kept, exits)
    if isinstance(chunks, int) and chunks == 1:
        before = kept
    else:
        before = tokens_at(source, reshape(places, (batch, heads, chunks * size)))
    return Competition(
        Tokens(*(reshape(x, (batch, heads, chunks, size, *x.shape[3:])) for x in before)),
        leaves[..., :size],
        leaves[..., size:],
        tokens_at(source, reshape(left, (batch, heads, length))),
        reshape(competed, (batch, heads, length)),
        tokens_at(source, last),
    )


def kept_part(query: Tensor, competition: Competition, chunk: int) -> Part:
    """The kept keys as the queries `(b, k, N, C * g, h)`, scaled, of a block see them."""
    before = competition.before
    logits = query @ ops.swapaxes(before.key, -1, -2)
    logits = reshape(logits, (*shape_of(query)[:3], chunk, -1, before.key.shape[3]))
    token = ops.arange(chunk, dtype="int32")[:, None]
    seen = ops.logical_and(token < competition.leaves[:, :, :, None], before.is_real[:, :, :, None])
    return masked(Part(logits, with_ones(before.value)), ops.where(seen, 0.0, FUTURE))


def with_exits(
    mask: Tensor, exits: Tokens, competition: Competition, chunk: int, memory: Memory
) -> Tensor:
    """The mask of `local_part`, and those that left the window seen for as long as they are kept.

    Args:
        mask: `(b, 1, N, C, S + W + C)`.
        exits: T tokens. Those of a chunk are the first C of its band of W + C.
        competition: `Competition`.
        chunk: C.
        memory: `Memory`.
    """
    leaves, sinks, size = competition.exits_leave, memory.num_sinks, memory.window
    token, key = ops.arange(chunk, dtype="int32")[:, None], ops.arange(chunk, dtype="int32")
    real = reshape(exits.is_real, shape_of(leaves))
    seen = ops.logical_and(token < leaves[:, :, :, None], real[:, :, :, None])
    seen = ops.logical_and(seen, key - size <= token)  # where W is less than C
    mask = ops.broadcast_to(mask, (*shape_of(leaves)[:2], *shape_of(mask)[2:]))
    parts = [mask[..., :sinks], ops.where(seen, 0.0, FUTURE), mask[..., sinks + chunk :]]
    return ops.concatenate(parts, axis=4)
