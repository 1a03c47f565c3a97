"""Attention over a sequence that is split over devices along its length.

Each device sums up its own keys, and the devices exchange these states, whose size does not depend
on the length. In causal attention, every device adds up the states of the devices before it and
continues from there, as if it had read their tokens. In bidirectional attention, every device reads
the sum of all states.

A state stands for its sums times `exp(log_scale)`. States are added at the largest of their scales,
so every factor is at most 1, however far apart the norms of the devices' keys are.

Shapes use the letters of `ops.features`; in addition, D is the number of devices.
"""

from keras import ops, tree

from keras_darkformer.memory import Memory
from keras_darkformer.ops.attention import attend, output_dtype
from keras_darkformer.ops.backend import (
    SequenceAxis,
    numbers,
    products_dtype,
    reshape,
    tensors,
)
from keras_darkformer.ops.call import Call
from keras_darkformer.ops.checks import (
    check_attention,
    check_causal,
    check_parameters,
)
from keras_darkformer.ops.dark_attention import folded
from keras_darkformer.ops.exact_memory import find_sinks, leaving, nothing_like, tokens_of
from keras_darkformer.ops.features import DarkParameters, FoldedFeatures
from keras_darkformer.ops.parallel import absorb, read
from keras_darkformer.ops.state import (
    LOG_ZERO,
    NOTHING,
    AttentionState,
    MemoryState,
    State,
    StateShapes,
    Tokens,
    add_states,
)
from keras_darkformer.ops.sums import log_mask
from keras_darkformer.types import Tensor


def sequence_parallel_dark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Tensor,
    projection: Tensor,
    *,
    axis_name: str,
    query_geometry: Tensor = None,
    log_weight: Tensor = None,
    query_shift: Tensor = None,
    key_shift: Tensor = None,
    sliding_window: int | None = None,
    num_sinks: int = 0,
    far_offset: Tensor = None,
    causal: bool = False,
    key_mask: Tensor = None,
    initial_state: State | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    remat: bool | None = None,
) -> Tensor:
    """`dark_attention` on a sequence split over devices, to be called inside `jax.shard_map`.

    The outputs, the state and the gradients are those of `dark_attention` on the whole sequence.
    JAX only.

    Devices send states, whose size does not depend on the length. In causal attention, a device
    receives the states of all others; in bidirectional attention, it receives their sum. With a
    sliding window of W tokens, it also receives one state and W tokens from its neighbour. The
    causal form computes each key's features a second time.

    Args:
        query: float tensor of shape `(b, t / D, n, h)`: this device's part of the sequence, which
            is split in order into equal parts.
        key: float tensor of shape `(b, s / D, k, h)`, n a multiple of k.
        value: float tensor of shape `(b, s / D, k, v)`.
        geometry, projection, query_geometry, log_weight, query_shift, key_shift, far_offset: as for
            `dark_attention`, the same on every device.
        axis_name: str. The mesh axis that the length is split along.
        sliding_window: optional int W, at most the tokens of one device.
        num_sinks: int, at most the tokens of one device. There is no `cache_size`, since the kept
            keys are found token by token, one device after the other.
        causal: bool. Query t attends to keys up to t; t and s must be equal.
        key_mask: optional bool tensor of shape `(b, s / D)` or `(1, s / D)`, true = attend; this
            device's part.
        initial_state: optional state of the keys before the whole sequence, the same on every
            device. Not with a window or sinks.
        return_state: bool. Also return the state after all keys, the same on every device. Not with
            a window or sinks.
        chunk_size: optional int, as for `dark_attention`.
        remat: bool, as for `dark_attention`.

    Returns:
        This device's part of the output, of shape `(b, t / D, n, v)` and the inputs' dtype. With
        `return_state`, `(output, state)`.

    Raises:
        RuntimeError: on a backend other than JAX.
        ValueError: if shapes do not fit, `axis_name` is not an axis of the mesh, the window or the
            sinks are longer than a device's part, or a state is combined with them: depending on
            the padding, the window's last tokens would lie on any of the devices.

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
    query, key, value = numbers(query, key, value)
    (key_mask,) = tensors(key_mask)
    check_attention(query, key, value, causal=causal, key_mask=key_mask)
    memory = Memory(sliding_window, num_sinks)
    memory.check()
    check_causal(memory, None, causal=causal)
    parameters = DarkParameters(
        *numbers(geometry, projection, query_geometry, log_weight, query_shift, key_shift)
    )
    check_parameters(parameters, key, memory)
    features = folded(parameters, query, key, memory, far_offset)
    call = Call(
        None if key_mask is None else ops.cast(key_mask, "bool"),
        remat=remat,
        products=products_dtype(output_dtype(query, key, value)),
    )
    before: AttentionState | None = None
    if features is not None:
        shapes = StateShapes(features.num_heads, features.num_features, value.shape[3])
        zeros = _differing(shapes.zeros(key.shape[0]), (query, key, value, key_mask, parameters))
    if memory:
        _check_sizes(memory, key, initial_state, return_state)
        tokens, sinks, recent = _memory_before(axis, key, value, memory, call)
        sums: State | tuple[()] = ()
        if features is not None:
            sums = _sums_before(axis, tokens, features, zeros, memory, call)
        before = MemoryState(sums, sinks, recent, ())
    else:
        assert features is not None
        others = () if initial_state is None else (shapes.check(initial_state, key.shape[0]),)
        own = absorb(key, value, features, zeros, call)
        if causal:
            before = _added(_before(axis, own, axis.index), *others)
        if return_state or not causal:
            state = _added(_all(axis, own), *others)
    if causal:
        output = attend(
            query,
            key,
            value,
            features,
            memory=memory,
            causal=True,
            key_mask=key_mask,
            initial_state=before,
            chunk_size=chunk_size,
            remat=remat,
        )
    else:
        assert features is not None
        output = read(query, features, state, call)
        output = ops.cast(output, output_dtype(query, key, value))
    return (output, state) if return_state else output


def _check_sizes(
    memory: Memory, key: Tensor, initial_state: State | None, return_state: bool
) -> None:
    for name in ("sliding_window", "num_sinks"):
        if (size := getattr(memory, name) or 0) > key.shape[1]:
            raise ValueError(
                f"`{name}` must fit into one device's part of the sequence, or tokens would be "
                "needed from more than the neighbour. "
                f"Received: {name}={size}, {key.shape[1]} tokens per device"
            )
    if initial_state is not None or return_state:
        raise ValueError(
            "`initial_state` and `return_state` do not go with a `sliding_window` or `num_sinks` "
            "here: the last tokens of a padded sequence lie on different devices in every row."
        )


def _differing(state: State, like: Tensor) -> State:
    """`state`, marked to differ along every axis of the mesh that `like` differs along.

    `shard_map` tracks this for all values, and a loop's carry must start with the marks that it has
    later. Zeros are marked as the same everywhere. A choice between zeros and a value that differs
    is marked as the value is, and costs nothing.
    """
    for x in tree.flatten(like):
        if x is not None:
            # The first element, if there is one.
            other = ops.sum(ops.reshape(x, (-1,))[:1])
            other = ops.cast(ops.stop_gradient(other), "float32")
            state = State(*(ops.where(True, leaf, other) for leaf in state))
    return state


def _before(axis: SequenceAxis, own: State, devices: Tensor) -> State:
    """The state of the keys of the first `devices` devices; all exchange theirs."""
    gathered = State(*(axis.gather(x) for x in own))  # (D, b, k, ...)
    earlier = ops.arange(gathered.log_scale.shape[0], dtype="int32") < devices
    return add_states(gathered, log_mask(earlier))


def _all(axis: SequenceAxis, own: State) -> State:
    """The state of the keys of all devices."""
    largest = axis.max(own.log_scale)
    weight = ops.exp(own.log_scale - largest)
    return State(
        axis.sum(own.kv_state * weight[..., None, None]),
        axis.sum(own.key_state * weight[..., None]),
        largest,
    )


def _added(*states: State) -> State:
    """The sum of several states."""
    if len(states) == 1:
        return states[0]
    stacked = State(*(ops.stack(leaves) for leaves in zip(*states, strict=True)))
    return add_states(stacked, ops.zeros((len(states),), dtype="float32"))


def _memory_before(
    axis: SequenceAxis, key: Tensor, value: Tensor, memory: Memory, call: Call
) -> tuple[Tokens, Tokens | tuple[()], Tokens | tuple[()]]:
    """This device's tokens except sinks, and the sinks and the window that they follow."""
    tokens = tokens_of(key, value, call.key_mask)
    sinks: Tokens | tuple[()] = ()
    if memory.num_sinks:
        sinks = before = _sinks_before(axis, tokens, memory.num_sinks)
        tokens = find_sinks(before, tokens, None)[1]
    if not memory.window:
        return tokens, sinks, ()
    recent = Tokens(*map(axis.from_previous, leaving(tokens, memory.window)[1]))
    received = ops.where(axis.index == 0, NOTHING, recent.received)
    return tokens, sinks, recent._replace(received=received)


def _sums_before(
    axis: SequenceAxis,
    tokens: Tokens,
    features: FoldedFeatures,
    zeros: State,
    memory: Memory,
    call: Call,
) -> State:
    """The sums of the keys that have left the memory before this device's tokens.

    The neighbour's last tokens are in the window, and all tokens before them are in the sums. So
    each device computes two sums: of the tokens that leave its window, and of all its tokens.
    """
    state, states = zeros, []
    for part in leaving(tokens, memory.window):
        if part.key.shape[2]:
            by_token = [ops.swapaxes(x, 1, 2) for x in part[:2]]
            masked = call._replace(key_mask=part.is_real[:, 0])
            state = absorb(by_token[0], by_token[1], features, state, masked)
        states.append(state)
    left, everything = states
    further = _before(axis, everything, axis.index - 1)
    kv_state, key_state, log_scale = (axis.from_previous(x) for x in left)
    # The first device receives zeros, which would be a large scale.
    log_scale = ops.where(axis.index == 0, LOG_ZERO, log_scale)
    return _added(further, State(kv_state, key_state, log_scale))


def _sinks_before(axis: SequenceAxis, tokens: Tokens, size: int) -> Tokens:
    """The first tokens of the devices before this one."""
    nothing = nothing_like(tokens, size)
    own = find_sinks(nothing, tokens, None)[0].tokens
    gathered = Tokens(*(axis.gather(x) for x in own))  # (D, b, k, S, ...)
    index = ops.arange(gathered.received.shape[0], dtype="int32")
    earlier = reshape(index < axis.index, (-1, 1, 1, 1))
    gathered = gathered._replace(received=ops.where(earlier, gathered.received, NOTHING))
    in_order = Tokens(*(ops.concatenate(ops.unstack(x), axis=2) for x in gathered))
    return find_sinks(nothing, in_order, None)[0].tokens
