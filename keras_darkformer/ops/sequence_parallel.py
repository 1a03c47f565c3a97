"""Attention over a sequence that is split over devices along its length.

Each device sums up its own keys, and the devices exchange these states, whose
size does not depend on the length. Causal: every device adds up the states of
those before it and goes on from there, as if it had read their tokens.
Bidirectional: every device reads the sum of all.

A state is its sums times `exp(log_scale)`. States are added at the largest of
their scales, so every factor is at most 1, however far apart the norms of the
devices' keys are.

The shapes' letters are those of `ops.features`; besides, D devices.
"""

from typing import Any

from keras import ops, tree

from keras_darkformer.checks import positive_integer
from keras_darkformer.ops.backend import SequenceAxis
from keras_darkformer.ops.checks import check_attention, check_state
from keras_darkformer.ops.dark_attention import (
    checked_feature_map,
    checked_window,
    output_dtype,
    tensors,
)
from keras_darkformer.ops.features import FeatureProjections, fold_projections
from keras_darkformer.ops.linear_attention import accumulate_state, linear_attention, read
from keras_darkformer.ops.sums import FUTURE, LOG_ZERO, State, pack
from keras_darkformer.ops.sums import initial_state as empty_state
from keras_darkformer.ops.window import window_tokens


def sequence_parallel_dark_attention(
    query: Any,
    key: Any,
    value: Any,
    geometry: Any,
    projection: Any,
    *,
    axis_name: str,
    query_geometry: Any = None,
    log_weight: Any = None,
    query_shift: Any = None,
    key_shift: Any = None,
    sliding_window: int | None = None,
    far_offset: Any = None,
    causal: bool = False,
    key_mask: Any = None,
    initial_state: State | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    remat: bool | None = None,
) -> Any:
    """`dark_attention` on a sequence split over devices, to be called in `jax.shard_map`.

    The outputs, the state and the gradients are those of `dark_attention` on
    the whole sequence. JAX only.

    What is sent has the size of states, whatever the length. Causal: a device
    receives those of all others. Bidirectional: one sum of them, once round.
    With a sliding window of W tokens it further receives one state and W
    tokens from its neighbour. What it costs to compute is each key's features
    a second time, in the causal form.

    Args:
        query: float tensor of shape `(b, t / D, n, h)`: the part of this
            device, the sequence being split in order into equal parts.
        key: float tensor of shape `(b, s / D, k, h)`, n a multiple of k.
        value: float tensor of shape `(b, s / D, k, v)`.
        geometry, projection, query_geometry, log_weight, query_shift,
            key_shift, far_offset: as for `dark_attention`, the same on every
            device.
        axis_name: str. The mesh axis that the length is split along.
        sliding_window: optional int W, at most the tokens of one device.
        causal: bool. Query t attends to keys up to t; t and s must be equal.
        key_mask: optional bool tensor of shape `(b, s / D)` or `(1, s / D)`,
            true = attend: the part of this device.
        initial_state: optional state of the keys before the whole sequence,
            the same on every device. Not with a window.
        return_state: bool. Also return the state after all keys, the same on
            every device. Not with a window.
        chunk_size: optional int, as for `dark_attention`.
        remat: bool, as for `dark_attention`.

    Returns:
        The part of the output, `(b, t / D, n, v)` in the inputs' dtype; with
        `return_state`, `(output, state)`.

    Raises:
        RuntimeError: on another backend than JAX.
        ValueError: if shapes do not fit, the axis is none of the mesh, the
            window is longer than a device's part, or a state goes with a
            window: its last tokens would lie on whichever devices the padding
            leaves them to.

    Example:

        import jax
        from jax.sharding import Mesh, PartitionSpec as P

        mesh = Mesh(jax.devices(), ("sequence",))

        def attend(query, key, value):
            return sequence_parallel_dark_attention(
                query, key, value, geometry, projection,
                axis_name="sequence", causal=True)

        part = P(None, "sequence")  # (b, length, heads, head_dim)
        output = jax.jit(jax.shard_map(
            attend, mesh=mesh, in_specs=(part, part, part), out_specs=part,
        ))(query, key, value)

    References:
        - [Linear Attention Sequence Parallelism](https://arxiv.org/abs/2404.02882)
        - [LASP-2](https://arxiv.org/abs/2502.07563), which gathers the states too
        - [Transformers are RNNs](https://arxiv.org/abs/2006.16236), for the state
    """
    axis = SequenceAxis(axis_name)
    query, key, value, key_mask = tensors(query, key, value, key_mask)
    check_attention(query, key, value, causal=causal, key_mask=key_mask)
    feature_map = checked_feature_map(
        key, geometry, projection, query_geometry, log_weight, query_shift, key_shift
    )
    window = checked_window(
        feature_map, query, key, sliding_window, False, far_offset, causal=causal
    )
    if chunk_size is not None:
        chunk_size = positive_integer("chunk_size", chunk_size)
    if sliding_window is not None:
        if sliding_window > key.shape[1]:
            raise ValueError(
                "`sliding_window` must fit into one device's part of the sequence, or tokens "
                "would be needed from more than the neighbour. "
                f"Received: sliding_window={sliding_window}, {key.shape[1]} tokens per device"
            )
        if initial_state is not None or return_state:
            raise ValueError(
                "`initial_state` and `return_state` do not go with a `sliding_window` here: the "
                "last tokens of a padded sequence lie on different devices in every row."
            )
    projections = fold_projections(feature_map, *key.shape[2:])
    if initial_state is not None:
        check_state(initial_state, key, value, projections.num_features)
    zeros = empty_state(
        key.shape[0], projections.num_heads, projections.num_features, value.shape[3]
    )
    zeros = _differing(zeros, (query, key, value, key_mask, feature_map))
    how: dict[str, Any] = {"chunk_size": chunk_size, "remat": remat}
    if sliding_window is not None:
        before = _window_before(
            axis, key, value, key_mask, projections, zeros, sliding_window, remat
        )
        output, _ = linear_attention(
            *(query, key, value, projections),
            causal=True,
            key_mask=key_mask,
            state=before,
            window=window,
            with_state=False,
            **how,
        )
        return ops.cast(output, output_dtype(query, key, value))

    own = accumulate_state(key, value, projections, key_mask=key_mask, state=zeros, remat=remat)
    if causal:
        before = _before(axis, own, axis.index)
        if initial_state is not None:
            before = _added(before, initial_state)
        output, _ = linear_attention(
            query, key, value, projections, causal=True, key_mask=key_mask, state=before, **how
        )
    if return_state or not causal:
        state = _all(axis, own)
        if initial_state is not None:
            state = _added(state, initial_state)
    if not causal:
        output = read(query, projections, pack(state, key, value, projections), remat)
    output = ops.cast(output, output_dtype(query, key, value))
    return (output, state) if return_state else output


def _differing(state: State, like: Any) -> State:
    """`state`, known to differ along every axis of the mesh that `like` differs along.

    `shard_map` notes this of all values, and a loop wants its carry to start as
    it goes on; but zeros are the same everywhere. Their choice between
    themselves and anything else is not, and it costs nothing.
    """
    for x in tree.flatten(like):
        if x is not None:
            other = ops.cast(ops.stop_gradient(ops.reshape(x, (-1,))[0]), "float32")
            state = tuple(ops.where(True, leaf, other) for leaf in state)
    return state


def _before(axis: SequenceAxis, own: State, devices: Any) -> State:
    """The state of the keys of the first `devices` devices; all exchange theirs."""
    gathered = tuple(axis.gather(x) for x in own)  # (D, b, k, ...)
    earlier = ops.arange(gathered[0].shape[0], dtype="int32") < devices
    return _sum(gathered, ops.where(earlier, 0.0, FUTURE))


def _all(axis: SequenceAxis, own: State) -> State:
    """The state of the keys of all devices."""
    kv_state, key_state, log_scale = own
    largest = axis.max(log_scale)
    weight = ops.exp(log_scale - largest)
    kv_state, key_state = kv_state * weight[..., None, None], key_state * weight[..., None]
    return axis.sum(kv_state), axis.sum(key_state), largest


def _added(*states: State) -> State:
    """The state of the keys of several."""
    stacked = tuple(
        ops.stack([ops.cast(x, "float32") for x in leaves]) for leaves in zip(*states, strict=True)
    )
    return _sum(stacked, ops.zeros((len(states),)))


def _sum(states: State, log_weight: Any) -> State:
    """The sum of states, stacked along the first axis, times `exp(log_weight)`, `(D,)`."""
    kv_states, key_states, log_scales = states
    # Scales are constants to the gradient, as everywhere.
    logits = ops.stop_gradient(log_scales) + log_weight[:, None, None]
    log_scale = ops.maximum(ops.max(logits, axis=0), LOG_ZERO)
    weights = ops.exp(logits - log_scale)
    return (
        ops.einsum("dbk,dbkmv->bkmv", weights, kv_states),
        ops.einsum("dbk,dbkm->bkm", weights, key_states),
        log_scale,
    )


def _window_before(
    axis: SequenceAxis,
    key: Any,
    value: Any,
    key_mask: Any,
    projections: FeatureProjections,
    zeros: State,
    size: int,
    remat: bool | None,
) -> State:
    """The state with a window of `size` tokens that this device's tokens go on from.

    The neighbour's last tokens are in the window, and all before them in the
    sums. So each device sums up what leaves its window by itself and, from
    there on, everything.
    """
    tokens = window_tokens(key, value, key_mask)
    parts = zip(*(ops.split(x, [x.shape[1] - size], axis=1) for x in tokens), strict=True)
    state, states = zeros, []
    for part_key, part_value, mask in parts:
        if part_key.shape[1]:
            state = accumulate_state(
                part_key, part_value, projections, key_mask=mask > 0, state=state, remat=remat
            )
        states.append(state)
    left, everything = states
    further = _before(axis, everything, axis.index - 1)
    kv_state, key_state, log_scale = (axis.from_previous(x) for x in left)
    # The first device is sent zeros; as a scale that would be a large one.
    log_scale = ops.where(axis.index == 0, LOG_ZERO, log_scale)
    last = (axis.from_previous(x[:, -size:]) for x in tokens)
    return *_added(further, (kv_state, key_state, log_scale)), *last
