"""Attention with exponential features, in time and memory linear in the length.

One operation in three equal forms, all of them behind `linear_attention`:

- parallel: every query sees every key (bidirectional and cross attention);
- chunked: causal, by chunks;
- recurrent: one key against the state.

With a window of the exact kernel, the last two are in `ops.window`.

The first two go through long sequences in blocks, whose tensors fit a cache,
and carry a state from block to block.

The shapes' letters are those of `ops.features`; besides, N chunks of C tokens
make a block.
"""

from typing import Any

from keras import ops

from keras_darkformer.ops.backend import reshape, scan
from keras_darkformer.ops.features import FeatureProjections, Window
from keras_darkformer.ops.partition import (
    block_partition,
    chunk_partition,
    join_blocks,
    shape_of,
    split_blocks,
    tokens_first,
)
from keras_darkformer.ops.sums import (
    State,
    absorb,
    absorb_one,
    chunked_sums,
    features_of_queries,
    future,
    normalize,
    pack,
    split_last,
    unpack,
)
from keras_darkformer.ops.window import accumulate_windowed, windowed_attention


def linear_attention(
    query: Any,
    key: Any,
    value: Any,
    projections: FeatureProjections,
    *,
    causal: bool = False,
    key_mask: Any = None,
    state: State | None = None,
    chunk_size: int | None = None,
    remat: bool | None = None,
    window: Window | None = None,
    with_state: bool = True,
) -> tuple[Any, State | None]:
    """Attention with weights `phi_q(q_t) . phi_k(k_s)`, normalised over s.

    Args:
        query: `(b, t, n, h)`, any float dtype, as key and value.
        key: `(b, s, k, h)`.
        value: `(b, s, k, v)`.
        projections: `FeatureProjections`, float32.
        causal: bool. Query t sees the keys up to t; needs t == s.
        key_mask: `(b, s)`, true = attend, or `None`.
        state: what came before, as returned by an earlier call, or `None`.
        chunk_size: int, tokens per chunk of the causal form, or `None`.
        remat: bool or `None`, see `backend.scan`.
        window: `Window` of keys that the exact kernel sees, or `None`. Causal
            only; its states have leaves of their own, see `initial_state`.
        with_state: bool. False: the state may be `None`, where it costs extra
            (a window and a key mask together).

    Returns:
        `(output, state)`: `(b, t, n, v)` in float32, and the state after the
        last key; with a window, after the last key that is not masked.
    """
    if window is not None:
        if not causal:
            raise ValueError("A `window` needs `causal=True`.")
        return windowed_attention(
            query,
            key,
            value,
            projections,
            window,
            key_mask=key_mask,
            state=state,
            chunk_size=chunk_size,
            remat=remat,
            with_state=with_state,
        )
    if key.shape[1] == 1 and state is not None:
        return _recurrent(query, key, value, key_mask, projections, state)
    packed = pack(state, key, value, projections)
    if causal and key.shape[1] != 1:
        output, packed = _chunked(
            query, key, value, key_mask, projections, packed, chunk_size, remat
        )
    else:
        packed = absorb(key, value, key_mask, projections, packed, remat)
        output = read(query, projections, packed, remat)
    return output, unpack(packed)


def accumulate_state(
    key: Any,
    value: Any,
    projections: FeatureProjections,
    *,
    key_mask: Any = None,
    state: State | None = None,
    remat: bool | None = None,
    window: Window | None = None,
) -> State:
    """The state after more keys, without reading it: `linear_attention` less its output."""
    if window is not None:
        return accumulate_windowed(
            key, value, projections, window, key_mask=key_mask, state=state, remat=remat
        )
    packed = pack(state, key, value, projections)
    return unpack(absorb(key, value, key_mask, projections, packed, remat))


def _recurrent(
    query: Any,
    key: Any,
    value: Any,
    key_mask: Any,
    projections: FeatureProjections,
    state: State,
) -> tuple[Any, State]:
    """One more key against the state."""
    state = absorb_one(key, value, key_mask, projections, state)
    kv_state, key_state, _ = state
    features = features_of_queries(query, projections)
    output = normalize(features @ kv_state, features @ key_state[..., None])
    return tokens_first(output, ops.shape(query)[1]), state


def read(
    query: Any, projections: FeatureProjections, packed: tuple[Any, Any], remat: bool | None
) -> Any:
    """What every query reads from the state, block by block."""
    length = ops.shape(query)[1]
    blocks, tokens = block_partition(length)
    inputs = split_blocks({"query": query}, None, blocks, tokens)

    def step(carry: Any, block: dict[str, Any], constants: Any) -> tuple[Any, Any]:
        projections, sums = constants
        sums = features_of_queries(block["query"], projections) @ sums
        return carry, tokens_first(normalize(*split_last(sums)), tokens)

    output = scan(step, (), inputs, (projections, packed[0]), remat=remat)[1]
    return join_blocks(output, length)


def _chunked(
    query: Any,
    key: Any,
    value: Any,
    key_mask: Any,
    projections: FeatureProjections,
    packed: tuple[Any, Any],
    chunk_size: int | None,
    remat: bool | None,
) -> tuple[Any, tuple[Any, Any]]:
    length, num_heads, head_dim = shape_of(query)[1:]
    groups = num_heads // key.shape[2]
    blocks, chunks, chunk = chunk_partition(length, head_dim, groups, chunk_size)
    inputs = {"query": query, "key": key, "value": value}
    inputs = split_blocks(inputs, key_mask, blocks, chunks * chunk)
    masks = future(chunk), future(chunks + 1)

    def step(packed: Any, block: dict[str, Any], constants: Any) -> tuple[Any, Any]:
        projections, masks = constants
        features = features_of_queries(block["query"], projections)
        sums, _, packed = chunked_sums(
            features, block, projections, packed, groups, chunks, chunk, masks
        )
        output = normalize(*split_last(sums))
        output = reshape(output, (*shape_of(features)[:3], -1))
        return packed, tokens_first(output, chunks * chunk)

    packed, output = scan(step, packed, inputs, (projections, masks), remat=remat)
    return join_blocks(output, length), packed
