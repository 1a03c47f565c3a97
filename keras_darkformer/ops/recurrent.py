"""One more key on top of the state: generation, token by token."""

from keras import ops, tree

from keras_darkformer.ops.backend import reshape
from keras_darkformer.ops.call import Call
from keras_darkformer.ops.exact_memory import Far, combined, none_of
from keras_darkformer.ops.features import TO_BASE, FoldedFeatures
from keras_darkformer.ops.meeting import Held, arrive, meet, memory_band
from keras_darkformer.ops.partition import tokens_first
from keras_darkformer.ops.state import MemoryState, State, Tokens
from keras_darkformer.ops.sums import (
    add_key,
    by_head,
    features_by_head,
    features_of_keys,
    features_of_queries,
    normalize,
)
from keras_darkformer.types import Tensor


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FoldedFeatures | None,
    state: State | MemoryState,
    call: Call,
) -> tuple[Tensor, State | MemoryState]:
    """Output `(b, t, n, v)` in float32, and the state after the key; see `attention.attend`."""
    length, key_mask, write_mask = ops.shape(query)[1], call.key_mask, call.write_mask
    groups = query.shape[2] // key.shape[2]
    query, memory = by_head(query, key.shape[2]), call.memory
    after: State | MemoryState
    if isinstance(state, MemoryState):
        # A masked key leaves no trace, not even its place in the window.
        write_mask = key_mask if write_mask is None else write_mask
        arrival = arrive(key, value, key_mask, write_mask, state, memory)
        recent = state.recent if isinstance(state.recent, Tokens) else none_of(arrival.tokens)
        near_mask = memory_band(1, memory)
        held, sinks = Held(recent, state.kept), arrival.sinks
        marks, sizes = arrival.marks, (1, 1, groups)
        met = meet(query, arrival.tokens, held, sinks, marks, near_mask, *sizes, memory)
        sums, far = state.sums, None
        if features is not None:
            assert isinstance(sums, State)
            left = met.left
            of_left = features_by_head(left.key, left.value, left.is_real, features)
            sums = add_key(sums, of_left)
            of_queries, scale = features_of_queries(query, features, scaled=True)
            read = [of_queries @ sums.kv_state, of_queries @ sums.key_state[..., None]]
            scale = scale + sums.log_scale[..., None] * TO_BASE
            both = ops.concatenate(read, axis=-1)
            far = Far(both[:, :, None, None], scale[:, :, None, None])
        output = combined(met.parts, far)
        after = MemoryState(
            sums,
            () if sinks is None else sinks.tokens,
            met.held.recent if memory.window else (),
            met.held.kept,
        )
    else:
        assert features is not None
        if key_mask is not None:
            key_mask = ops.broadcast_to(key_mask, ops.shape(key)[:2])
        after = add_key(state, features_of_keys(key, value, key_mask, features))
        of_queries, _ = features_of_queries(query, features)
        output = normalize(of_queries @ after.kv_state, of_queries @ after.key_state[..., None])
    if write_mask is not None:
        after = _where(ops.broadcast_to(write_mask, ops.shape(key)[:2])[:, 0], after, state)
    return tokens_first(output, length, groups), after


def _where(rows: Tensor, new: State | MemoryState, old: State | MemoryState) -> State | MemoryState:
    """Row by row, one state or the other."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return ops.where(reshape(rows, (-1, *[1] * (len(new.shape) - 1))), new, old)

    return tree.map_structure(choose, new, old)
