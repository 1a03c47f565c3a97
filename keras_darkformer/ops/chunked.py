"""Causal attention in chunks: linear in the length, with or without an exact memory.

A block of N chunks of C tokens is computed at once, and a state goes from block to block. Without
an exact memory the keys of a block enter the sums. With a sliding window those enter that leave it,
W tokens late, and the queries further meet the keys of their window themselves.

The shapes' letters are those of `ops.features`.
"""

from typing import TypedDict

from keras_darkformer.ops.backend import reshape, scan
from keras_darkformer.ops.call import Call
from keras_darkformer.ops.exact_memory import (
    band,
    followed_by,
    leaving,
    padded_before,
    tokens_of,
    with_near,
    written_by_row,
)
from keras_darkformer.ops.features import FoldedFeatures
from keras_darkformer.ops.partition import (
    chunk_partition,
    join_blocks,
    shape_of,
    split_blocks,
    tokens_first,
)
from keras_darkformer.ops.state import State, Tokens, WindowedState
from keras_darkformer.ops.sums import (
    Sums,
    add_keys,
    by_head,
    chunked_sums,
    features_of_keys,
    features_of_queries,
    future,
    normalize,
    pack,
    split_last,
    unpack,
)
from keras_darkformer.types import Tensor


class Carry(TypedDict, total=False):
    """What goes from block to block.

    `seen` are the sums that queries see. `written` are those of the state, where they differ: each
    key's features are then computed once and added twice. `recent` is the window.
    """

    seen: Sums
    written: Sums
    recent: Tokens


def chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FoldedFeatures,
    state: State | WindowedState,
    call: Call,
) -> tuple[Tensor, State | WindowedState]:
    """Output `(b, t, n, v)` in float32, and the state after the keys; see `attention.attend`.

    Without `call.with_state` the state says nothing where masks are given.
    """
    key_mask, write_mask, sliding_window, chunk_size, remat, with_state = call
    length, num_heads, head_dim = shape_of(query)[1:]
    kv_heads = key.shape[2]
    groups = num_heads // kv_heads
    blocks, chunks, chunk = chunk_partition(length, head_dim, groups, chunk_size)
    tokens = chunks * chunk
    near_mask = None if sliding_window is None else band(chunk, sliding_window)

    after = None
    inputs = {"query": query, "key": key, "value": value, "mask": key_mask}
    if isinstance(state, State):
        carry = Carry(seen=pack(state))
    else:
        assert sliding_window is not None
        new = tokens_of(key, value, key_mask)
        write_mask = key_mask if write_mask is None else write_mask
        if write_mask is not None and with_state:
            write_mask, after = written_by_row(state.recent, new, write_mask, sliding_window)
        padding = blocks * tokens - length
        recent, new = padded_before(state.recent, new, padding, sliding_window)
        carry = Carry(seen=pack(state.sums), recent=recent)
        inputs |= new._asdict()
    if write_mask is not None and with_state:
        carry["written"], inputs["write"] = carry["seen"], write_mask

    def step(
        carry: Carry, block: dict[str, Tensor], constants: tuple[FoldedFeatures, Tensor, Tensor]
    ) -> tuple[Carry, Tensor]:
        features, futures, near_mask = constants
        query = by_head(block["query"], kv_heads)
        due = Tokens(block["key"], block["value"], block.get("mask"))
        if sliding_window is not None:
            seen = followed_by(carry["recent"], due)
            due, recent = leaving(seen, sliding_window)
            due = due._replace(mask=due.mask > 0)
        keys = features_of_keys(*due, features)
        of_queries, scale = features_of_queries(query, features, scaled=sliding_window is not None)
        sums, key_scale, seen_after = chunked_sums(
            of_queries, keys, carry["seen"], groups, chunks, chunk, futures
        )
        behind = Carry(seen=seen_after)
        if "written" in carry:
            behind["written"] = add_keys(carry["written"], keys, block["write"])
        if sliding_window is None:
            output = normalize(*split_last(sums))
            output = reshape(output, (*shape_of(query)[:3], -1))
        else:
            behind["recent"] = recent
            far_scale = reshape(scale, (*shape_of(key_scale), groups)) + key_scale[..., None]
            output = with_near(query, seen, sums, far_scale, chunks, chunk, near_mask)
        return behind, tokens_first(output, tokens)

    constants = features, (future(chunk), future(chunks + 1)), near_mask
    inputs = split_blocks(inputs, blocks, tokens)
    carry, output = scan(step, carry, inputs, constants, remat=remat)
    sums = unpack(carry.get("written", carry["seen"]))
    output = join_blocks(output, length)
    if sliding_window is None:
        return output, sums
    return output, WindowedState(sums, carry["recent"] if after is None else after)
