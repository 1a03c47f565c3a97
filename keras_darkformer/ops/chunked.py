"""Causal attention in chunks: linear in the length, with or without an exact memory.

A block of N chunks of C tokens is computed at once, and a state passes from block to block. Without
an exact memory, the keys of a block enter the sums. With one, keys enter the sums when they leave
the memory, one at each token, and queries attend to the keys in the memory directly.

Shapes use the letters of `ops.features`.
"""

from typing import NamedTuple

from keras import ops

from keras_darkformer.ops.backend import reshape, scan
from keras_darkformer.ops.call import Call
from keras_darkformer.ops.exact_memory import (
    Far,
    Sinks,
    combined,
    joined,
    none_of,
    padded_before,
    window_by_row,
)
from keras_darkformer.ops.features import FoldedFeatures
from keras_darkformer.ops.meeting import Held, Marks, arrive, meet, memory_band
from keras_darkformer.ops.partition import (
    chunk_partition,
    join_blocks,
    shape_of,
    split_blocks,
    tokens_first,
)
from keras_darkformer.ops.state import MemoryState, State, Tokens
from keras_darkformer.ops.sums import (
    Sums,
    add_keys,
    by_head,
    chunked_sums,
    features_by_head,
    features_of_keys,
    features_of_queries,
    future,
    normalize,
    pack,
    split_last,
    unpack,
)
from keras_darkformer.types import Shape, Tensor


class Carry(NamedTuple):
    """What passes from block to block. Missing parts are empty tuples.

    `seen` holds the sums that queries see, if there are features. `written` holds those of the
    state, if they differ: each key's features are then computed once and added twice. `held` is the
    memory.
    """

    seen: Sums | tuple[()] = ()
    written: Sums | tuple[()] = ()
    held: Held | tuple[()] = ()


# Tensors that have gradients and do not change from block to block.
Constants = tuple[FoldedFeatures | None, tuple[Tensor, Tensor], Tensor, Sinks | None]


def chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FoldedFeatures | None,
    state: State | MemoryState,
    call: Call,
) -> tuple[Tensor, State | MemoryState]:
    """Output `(b, t, n, v)` in float32, and the state after the keys; see `attention.attend`.

    Without `call.with_state`, the state is not meaningful if masks are given.
    """
    memory, kv_heads, dtype = call.memory, key.shape[2], call.products
    batch, length, num_heads, head_dim = shape_of(query)
    groups = num_heads // kv_heads
    blocks, chunks, chunk = chunk_partition(length, batch, head_dim, groups, call.chunk_size)
    tokens = chunks * chunk
    near_mask = memory_band(chunk, memory)

    inputs, sinks, written = {"query": query}, None, call.write_mask
    if isinstance(state, State):
        carry = Carry(seen=pack(state))
        inputs |= {"key": key, "value": value, "mask": call.key_mask}
        write = written
    else:
        written = call.key_mask if written is None else written
        arrival = arrive(key, value, call.key_mask, written, state, memory)
        new, sinks, write = arrival.tokens, arrival.sinks, arrival.marks.enters
        recent = state.recent if isinstance(state.recent, Tokens) else none_of(new)
        padding = blocks * tokens - length
        first, rest = padded_before(recent, new, padding, memory.window)
        carry = Carry(held=Held(first, state.kept))
        if isinstance(state.sums, State):
            carry = carry._replace(seen=pack(state.sums))
        inputs |= {name: ops.swapaxes(x, 1, 2) for name, x in rest._asdict().items()}
        inputs |= arrival.marks._asdict()
    if write is not None and call.with_state and features is not None:
        carry, inputs["write"] = carry._replace(written=carry.seen), write

    def step(
        carry: Carry, block: dict[str, Tensor], constants: Constants
    ) -> tuple[Carry, tuple[Tensor, Tensor]]:
        features, futures, near_mask, sinks = constants
        query, met = by_head(block["query"], kv_heads), None
        if memory:
            new = Tokens(*(ops.swapaxes(block[name], 1, 2) for name in Tokens._fields))
            marks = Marks(block["index"], block["asks"], block.get("enters"))
            sizes = chunks, chunk, groups
            assert isinstance(carry.held, Held)
            met = meet(query, new, carry.held, sinks, marks, near_mask, *sizes, memory)
            if features is None:
                output = combined(met.parts, None)
                return Carry(held=met.held), (tokens_first(output, tokens, groups), met.exits)
            left = met.left
            keys = features_by_head(left.key, left.value, left.is_real, features, dtype=dtype)
        else:
            assert features is not None
            keys = features_of_keys(
                block["key"], block["value"], block.get("mask"), features, dtype=dtype
            )
        assert isinstance(carry.seen, Sums)
        of_queries, scale = features_of_queries(query, features, scaled=bool(memory), dtype=dtype)
        sums, key_scale, seen_after = chunked_sums(
            of_queries, keys, carry.seen, groups, chunks, chunk, futures
        )
        behind = Carry(seen=seen_after)
        if isinstance(carry.written, Sums):
            competed = None if met is None else met.competed
            write = block["write"][:, None] if competed is None else competed
            behind = behind._replace(written=add_keys(carry.written, keys, write))
        if met is None:
            sums = reshape(sums, (*shape_of(query)[:3], value.shape[3] + 1))
            output = normalize(*split_last(sums))
            return behind, (tokens_first(output, tokens, groups), ())
        behind = behind._replace(held=met.held)
        far_scale = reshape(scale, (*shape_of(key_scale), groups)) + key_scale[..., None]
        output = combined(met.parts, Far(sums, far_scale))
        return behind, (tokens_first(output, tokens, groups), met.exits)

    constants = features, (future(chunk), future(chunks + 1)), near_mask, sinks
    inputs = split_blocks(inputs, blocks, tokens)
    shapes: list[Shape] = [(batch, tokens, num_heads, value.shape[3])]
    shapes += [(batch, kv_heads, tokens)] if memory else []
    remat = call.remat
    carry, (output, exits) = scan(step, carry, inputs, constants, shapes=shapes, remat=remat)
    output = join_blocks(output, length)
    last = carry.written or carry.seen
    if isinstance(state, State):
        assert isinstance(last, Sums)
        return output, unpack(last)
    assert isinstance(carry.held, Held)
    recent = carry.held.recent
    if memory.window and written is not None and call.with_state:
        # What each token had received when it left the window, or has received by now.
        rows = shape_of(recent.received)[:2]
        gone = reshape(ops.swapaxes(exits, 1, 2), (*rows, blocks * tokens))
        gone = ops.concatenate([gone, recent.received], axis=2)[:, :, padding:]
        assert isinstance(state.recent, Tokens)
        stream = joined(state.recent, arrival.tokens)._replace(received=gone)
        recent = window_by_row(stream, arrival.marks.asks, memory.window)
    return output, MemoryState(
        unpack(last) if isinstance(last, Sums) else (),
        () if sinks is None else sinks.tokens,
        recent if memory.window else (),
        carry.held.kept,
    )
