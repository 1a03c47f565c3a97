"""Attention with exponential features, in the form that fits the call.

The operation has three equivalent forms with one signature:

- `parallel`: every query sees every key (bidirectional and cross attention);
- `chunked`: causal, by chunks;
- `recurrent`: causal, one key at a time on top of a state.

The last two also take an exact memory.
"""

import math
from typing import Any

import keras
from keras import ops

from keras_darkformer.checks import optional_integer
from keras_darkformer.memory import NO_MEMORY, Memory
from keras_darkformer.ops.backend import products_dtype
from keras_darkformer.ops.call import Call
from keras_darkformer.ops.checks import check_attention, check_causal, check_mask
from keras_darkformer.ops.chunked import chunked
from keras_darkformer.ops.features import FoldedFeatures
from keras_darkformer.ops.parallel import absorb, parallel
from keras_darkformer.ops.recurrent import recurrent
from keras_darkformer.ops.state import AttentionState, State, StateShapes
from keras_darkformer.types import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FoldedFeatures | None,
    *,
    causal: bool = False,
    memory: Memory = NO_MEMORY,
    initial_state: AttentionState | None = None,
    return_state: bool = False,
    **call: Any,
) -> Tensor:
    """Attention with weights `phi_q(q_t) . phi_k(k_s)`, normalised over s.

    Args:
        query: tensor of shape `(b, t, n, h)`, any float dtype, as key and value.
        key: tensor of shape `(b, s, k, h)`.
        value: tensor of shape `(b, s, k, v)`.
        features: `FoldedFeatures`, float32; `None` for an exact memory alone.
        causal, initial_state, return_state: as for `dark_attention`.
        memory: `Memory`, the sizes of the exact memory.
        **call: key_mask, write_mask, chunk_size and remat, as for `dark_attention`.

    Returns:
        As for `dark_attention`.
    """
    how = Call(**call, memory=memory, with_state=return_state)
    check_attention(query, key, value, causal=causal, key_mask=how.key_mask)
    check_mask("write_mask", how.write_mask, key)
    memory.check()
    check_causal(memory, how.write_mask, causal=causal)
    how = how._replace(
        key_mask=None if how.key_mask is None else ops.cast(how.key_mask, "bool"),
        write_mask=None if how.write_mask is None else ops.cast(how.write_mask, "bool"),
        chunk_size=optional_integer("chunk_size", how.chunk_size),
    )
    if how.key_mask is not None and how.write_mask is not None:
        # A masked token is not written either.
        how = how._replace(write_mask=ops.logical_and(how.key_mask, how.write_mask))
    num_features = features.num_features if features is not None else 0
    sizes = key.shape[2], num_features, value.shape[3], key.shape[3]
    dtype = output_dtype(query, key, value)
    how = how._replace(products=products_dtype(dtype))
    shapes = StateShapes(*sizes, memory, dtype=dtype)
    if initial_state is None:
        state = shapes._replace(dtype="float32").zeros(ops.shape(key)[0])
    else:
        state = shapes.check(initial_state, key.shape[0])
    if key.shape[1] == 1 and (causal or initial_state is not None):
        output, state = recurrent(query, key, value, features, state, how)
    elif causal:
        output, state = chunked(query, key, value, features, state, how)
    else:
        assert features is not None  # a memory is causal
        output, state = parallel(query, key, value, features, state, how)
    output = ops.cast(output, dtype)
    return (output, shapes.stored(state)) if return_state else output


def accumulate(
    key: Tensor, value: Tensor, features: FoldedFeatures, *, key_mask: Tensor = None
) -> State:
    """The state after these keys, without an output and without an exact memory.

    Args:
        key: tensor of shape `(b, s, k, h)`, any float dtype, as value.
        value: tensor of shape `(b, s, k, v)`.
        features: `FoldedFeatures`, float32.
        key_mask: bool, `(b, s)` or `(1, s)`, true = enters the state, or `None`.

    Returns:
        The `State`, in the dtype in which `attend` returns it.
    """
    check_mask("key_mask", key_mask, key)
    shapes = StateShapes(
        key.shape[2],
        features.num_features,
        value.shape[3],
        key.shape[3],
        dtype=output_dtype(key, value),
    )
    before = shapes._replace(dtype="float32").zeros(ops.shape(key)[0])
    call = Call(
        key_mask=None if key_mask is None else ops.cast(key_mask, "bool"),
        products=products_dtype(shapes.dtype),
    )
    return shapes.stored(absorb(key, value, features, before, call))


def are_few(inputs: Tensor, num_features: int) -> bool:
    """Whether folding M and W would cost more than applying both to these tokens."""
    sizes = inputs.shape[:3]
    return None not in sizes and math.prod(sizes) < num_features


def output_dtype(*tensors: Tensor) -> str:
    """The dtype that attention on these tensors is returned in."""
    return keras.backend.result_type(*(x.dtype for x in tensors))
