"""Attention with exponential features: picks the form that fits the call.

One operation in three equal forms, with one signature:

- `parallel`: every query sees every key (bidirectional and cross attention);
- `chunked`: causal, by chunks;
- `recurrent`: one key against the state.

The last two take an exact memory beside the features.
"""

import math

import keras
from keras import ops

from keras_darkformer.checks import optional_integer
from keras_darkformer.ops.checks import check_attention, check_causal, check_mask
from keras_darkformer.ops.chunked import chunked
from keras_darkformer.ops.features import FoldedFeatures
from keras_darkformer.ops.parallel import parallel
from keras_darkformer.ops.recurrent import recurrent
from keras_darkformer.ops.state import AttentionState, StateShapes
from keras_darkformer.types import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    features: FoldedFeatures,
    *,
    sliding_window: int | None = None,
    causal: bool = False,
    key_mask: Tensor = None,
    write_mask: Tensor = None,
    initial_state: AttentionState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    remat: bool | None = None,
) -> Tensor:
    """Attention with weights `phi_q(q_t) . phi_k(k_s)`, normalised over s.

    Args:
        query: tensor of shape `(b, t, n, h)`, any float dtype, as key and value.
        key: tensor of shape `(b, s, k, h)`.
        value: tensor of shape `(b, s, k, v)`.
        features: `FoldedFeatures`, float32.
        others: as for `dark_attention`.

    Returns:
        As `dark_attention`.
    """
    check_attention(query, key, value, causal=causal, key_mask=key_mask)
    check_mask("write_mask", write_mask, key)
    check_causal(sliding_window, write_mask, causal=causal)
    chunk_size = optional_integer("chunk_size", chunk_size)
    key_mask, write_mask = (
        None if x is None else ops.cast(x, "bool") for x in (key_mask, write_mask)
    )
    if key_mask is not None and write_mask is not None:
        write_mask = ops.logical_and(key_mask, write_mask)  # what is masked counts for nothing
    shapes = StateShapes(
        key.shape[2], features.num_features, value.shape[3], key.shape[3], sliding_window
    )
    if initial_state is None:
        state = shapes.zeros(ops.shape(key)[0])
    else:
        state = shapes.check(initial_state, key.shape[0])
    if key.shape[1] == 1 and (causal or initial_state is not None):
        output, state = recurrent(
            query,
            key,
            value,
            features,
            state,
            key_mask=key_mask,
            write_mask=write_mask,
            sliding_window=sliding_window,
        )
    elif causal:
        output, state = chunked(
            query,
            key,
            value,
            features,
            state,
            key_mask=key_mask,
            write_mask=write_mask,
            sliding_window=sliding_window,
            chunk_size=chunk_size,
            remat=remat,
            with_state=return_state,
        )
    else:
        output, state = parallel(query, key, value, features, state, key_mask=key_mask, remat=remat)
    output = ops.cast(output, output_dtype(query, key, value))
    return (output, state) if return_state else output


def are_few(inputs: Tensor, num_features: int) -> bool:
    """Whether folding M and W would cost more than applying both to these tokens."""
    sizes = inputs.shape[:3]
    return None not in sizes and math.prod(sizes) < num_features


def output_dtype(*tensors: Tensor) -> str:
    """The dtype that attention on these tensors is returned in."""
    return keras.backend.result_type(*(x.dtype for x in tensors))
