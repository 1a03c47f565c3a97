"""Keys that are kept after they leave the window: a queue ordered by attention received.

Shapes use the letters of `ops.exact_memory`.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_darkformer.memory import Memory
from keras_darkformer.ops.backend import inner, reshape, search
from keras_darkformer.ops.exact_memory import Part, joined, masked, tokens_at
from keras_darkformer.ops.partition import shape_of
from keras_darkformer.ops.state import Tokens
from keras_darkformer.ops.sums import log_mask, with_ones
from keras_darkformer.types import Tensor

# The score of a key that does not compete: below that of an empty place.
OUT = -2.0


class Competition(NamedTuple):
    """What happens to the cache during a block.

    Attributes:
        before: `Tokens`, `(b, k, N, G, ...)`: those that are kept before each chunk.
        leaves: int32, `(b, k, N, G)`: at which of the chunk's tokens each of them leaves the
            memory; C for those that stay.
        exits_leave: int32, `(b, k, N, C)`: the same for those that leave the window in the chunk.
        left: `Tokens`, the T that leave, one at each token.
        competed: bool, `(b, k, T)`: which of these had a chance to stay.
        kept: `Tokens`, the G that are kept after the block.
    """

    before: Tokens
    leaves: Tensor
    exits_leave: Tensor
    left: Tokens
    competed: Tensor
    kept: Tokens


def ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The order of `(b, k, x)` by score, and the rank of each: 0 for the first that leaves.

    Of two equal scores, the older one leaves first, so no two ranks are equal.
    """
    order = ops.argsort(scores, axis=-1)  # stable on every backend
    return order, ops.argsort(order, axis=-1)


def compete(kept: Tensor, entering: Tensor) -> Tensor:
    """How long each key stays among the G largest ranks while one enters at each token.

    Args:
        kept: ranks of those that are kept, `(b, k, G)`.
        entering: ranks of those that enter, `(b, k, C)`.

    Returns:
        `leaves` of all of them, `(b, k, G + C)`; see `Competition`.
    """
    size, chunk = kept.shape[-1], shape_of(entering)[-1]
    ranks = ops.concatenate([kept, entering], axis=-1)[..., None]
    ahead = ops.sum(ops.cast(kept[..., None, :] > ranks, "float32"), axis=-1, keepdims=True)
    # Also counts those that have entered up to each token.
    more = ops.cumsum(ops.cast(entering[..., None, :] > ranks, "float32"), axis=-1)
    stays = ops.sum(ops.cast(more < size - ahead, "float32"), axis=-1)
    return ops.maximum(ops.cast(stays, "int32"), ops.arange(-size, chunk, dtype="int32"))


def through_block(
    kept: Tokens, exits: Tokens, enters: Tensor, chunks: Tensor, chunk: int
) -> Competition:
    """Lets the tokens that leave the window in a block compete.

    Args:
        kept: those that are kept before the block.
        exits: the T tokens that leave the window, one at each token of the block.
        enters: bool, `(b, T)`: which of them compete, or `None` for all. The others leave the
            memory at once.
        chunks, chunk: N and C.
    """
    scores = ops.stop_gradient(exits.received)
    if enters is not None:
        scores = ops.where(enters[:, None], scores, OUT)
    scores = ops.concatenate([ops.stop_gradient(kept.received), scores], axis=-1)
    if exits.received.shape[2] == 1 and chunk == 1:
        return _through_token(kept, exits, scores)
    batch, heads, length = shape_of(exits.received)
    size = kept.received.shape[2]
    order, ranks = ranked(scores)
    # TensorFlow forgets the size of a slice if the whole has no known size.
    first = reshape(ranks[..., :size], (batch, heads, size))
    entering = reshape(ranks[..., size:], (batch, heads, chunks, chunk))
    both = size + chunk

    def step(kept: Any, entering: Any) -> Any:
        leaves = compete(kept, entering)
        # First those that leave, in that order, then those that stay, oldest first.
        by_exit = ops.argsort(leaves * both + ops.arange(both, dtype="int32"), axis=-1)
        ranks = ops.concatenate([kept, entering], axis=-1)
        ranks = ops.take_along_axis(ranks, by_exit, axis=-1)
        return ranks[..., chunk:], (kept, leaves, ranks[..., :chunk])

    none = ops.zeros((batch, heads, both), dtype="int32")
    output = first, none, none[..., :chunk]
    last, found = search(step, first, output, ops.transpose(entering, (0, 2, 1, 3)))
    before, leaves, left = (ops.transpose(x, (0, 2, 1, 3)) for x in found)
    left = ops.take_along_axis(order, reshape(left, (batch, heads, length)), axis=-1)
    source = joined(kept, exits)
    if isinstance(chunks, int) and chunks == 1:
        kept_before = kept
    else:
        before = reshape(before, (batch, heads, chunks * size))
        kept_before = tokens_at(source, ops.take_along_axis(order, before, axis=-1))
    return Competition(
        Tokens(*(reshape(x, (batch, heads, chunks, size, *x.shape[3:])) for x in kept_before)),
        leaves[..., :size],
        leaves[..., size:],
        tokens_at(source, left),
        ops.take_along_axis(scores, left, axis=-1) > OUT,
        tokens_at(source, ops.take_along_axis(order, last, axis=-1)),
    )


def _through_token(kept: Tokens, exits: Tokens, scores: Tensor) -> Competition:
    """`through_block` of one token, in as few operations as generation can have.

    Of G + 1 tokens the one with the lowest score leaves, of equal ones the oldest. `scores` is
    `(b, k, G + 1)`.
    """
    size, source = kept.received.shape[2], joined(kept, exits)
    place = ops.arange(size + 1, dtype="int32")
    leaves = ops.cast(ops.argmin(scores, axis=-1), "int32")[..., None]
    stays = ops.cast(place != leaves, "int32")[:, :, None]
    is_older = place[:size] < leaves
    conditions = is_older[..., None], is_older[..., None], is_older
    after = (
        ops.where(condition, x[:, :, :size], x[:, :, 1:])
        for condition, x in zip(conditions, source, strict=True)
    )
    return Competition(
        Tokens(*(x[:, :, None] for x in kept)),
        stays[..., :size],
        stays[..., size:],
        tokens_at(source, leaves),
        ops.take_along_axis(scores, leaves, axis=-1) > OUT,
        Tokens(*after),
    )


def kept_part(query: Tensor, competition: Competition, chunk: int) -> Part:
    """The kept keys as a block's scaled queries, `(b, k, N, C * g, h)`, see them."""
    before = competition.before
    logits = inner(query, before.key)
    groups = query.shape[3] // chunk
    logits = reshape(logits, (*shape_of(query)[:3], chunk, groups, before.key.shape[3]))
    token = ops.arange(chunk, dtype="int32")[:, None]
    seen = ops.logical_and(token < competition.leaves[:, :, :, None], before.is_real[:, :, :, None])
    return masked(Part(logits, with_ones(before.value)), log_mask(seen))


def with_exits(
    mask: Tensor, exits: Tokens, competition: Competition, chunk: int, memory: Memory
) -> Tensor:
    """The mask of `local_part`, with keys that left the window visible while they are kept.

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
    parts = [mask[..., :sinks], log_mask(seen), mask[..., sinks + chunk :]]
    return ops.concatenate(parts, axis=4)
