"""One key more against the state: generation, token by token."""

from keras import ops, tree

from keras_darkformer.ops.backend import reshape
from keras_darkformer.ops.call import Call
from keras_darkformer.ops.exact_memory import band, followed_by, leaving, tokens_of, with_near
from keras_darkformer.ops.features import TO_BASE, FoldedFeatures
from keras_darkformer.ops.partition import tokens_first
from keras_darkformer.ops.state import State, WindowedState
from keras_darkformer.ops.sums import (
    add_key,
    by_head,
    features_of_keys,
    features_of_queries,
    normalize,
)
from keras_darkformer.types import Tensor


def recurrent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FoldedFeatures,
    state: State | WindowedState,
    call: Call,
) -> tuple[Tensor, State | WindowedState]:
    """Output `(b, t, n, v)` in float32, and the state after the key; see `attention.attend`."""
    length, (key_mask, write_mask, sliding_window, *_) = ops.shape(query)[1], call
    query = by_head(query, features.num_heads)
    after: State | WindowedState
    if isinstance(state, WindowedState):
        assert sliding_window is not None
        seen = followed_by(state.recent, tokens_of(key, value, key_mask))
        due, recent = leaving(seen, sliding_window)
        keys = features_of_keys(due.key, due.value, due.mask > 0, features)
        sums = add_key(state.sums, keys)
        of_queries, scale = features_of_queries(query, features, scaled=True)
        read = [of_queries @ sums.kv_state, of_queries @ sums.key_state[..., None]]
        far = ops.concatenate(read, axis=-1)[:, :, None, None]
        far_scale = (scale + sums.log_scale[..., None] * TO_BASE)[:, :, None, None]
        output = with_near(query, seen, far, far_scale, 1, 1, band(1, sliding_window))
        after = WindowedState(sums, recent)
        # A masked key leaves no trace, not even its place in the window.
        write_mask = key_mask if write_mask is None else write_mask
    else:
        if key_mask is not None:
            key_mask = ops.broadcast_to(key_mask, ops.shape(key)[:2])
        after = add_key(state, features_of_keys(key, value, key_mask, features))
        of_queries, _ = features_of_queries(query, features)
        output = normalize(of_queries @ after.kv_state, of_queries @ after.key_state[..., None])
    if write_mask is not None:
        after = _where(ops.broadcast_to(write_mask, ops.shape(key)[:2])[:, 0], after, state)
    return tokens_first(output, length), after


def _where(
    rows: Tensor, new: State | WindowedState, old: State | WindowedState
) -> State | WindowedState:
    """Row by row, one state or the other."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return ops.where(reshape(rows, (-1, *[1] * (len(new.shape) - 1))), new, old)

    return tree.map_structure(choose, new, old)
