"""Reads (query, key) attention masks as what linear attention can express: causal and padding."""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_darkformer.types import Tensor


class CausalMask(NamedTuple):
    """What a causal block passes to linear attention instead of a mask of all pairs of tokens.

    Attributes:
        keys: which keys count, in any shape that `split_attention_mask` takes, or `None` for all.
    """

    keys: Tensor


def split_attention_mask(attention_mask: Tensor) -> tuple[bool, Tensor]:
    """Reads an attention mask as "causal or not" and a padding mask.

    Features are summed over keys before any query sees them. So a mask can say which keys count
    (padding) and that no query sees later keys (causal), and nothing else. A mask with one row for
    all queries is padding. A mask of (t, s) has to be inspected, which needs its values and does
    not work inside a compiled function.

    Args:
        attention_mask: bool, of shape `(b, 1, s)`, `(b, t, s)`, `(t, s)` or `(b, n, t, s)`, alike
            for all heads.

    Returns:
        `(causal, key_mask)`, `key_mask` of shape `(b or 1, s)`.

    Raises:
        ValueError: if the mask has another shape, says anything else, or can't be inspected.
    """
    shape = tuple(attention_mask.shape)
    if len(shape) not in (2, 3, 4):
        raise ValueError(
            "`attention_mask` must have shape (batch, query_length, key_length), the same with a "
            f"head axis, or (query_length, key_length). Received: shape {shape}"
        )
    if len(shape) == 4:
        if shape[1] != 1:
            heads = _values(attention_mask)
            if heads is None or np.any(heads != heads[:, :1]):
                raise ValueError(
                    "Linear attention can't take an `attention_mask` that differs, or may "
                    f"differ, between heads. Received: a mask of shape {shape}"
                )
        attention_mask = attention_mask[:, 0]
    elif len(shape) == 2:
        attention_mask = attention_mask[None]
    attention_mask = ops.cast(attention_mask, "bool")
    if attention_mask.shape[1] == 1:
        return False, attention_mask[:, 0]
    values = _values(attention_mask)
    if values is None:
        raise ValueError(
            "Linear attention takes masks that are causal or padding. This `attention_mask` has "
            f"shape {shape} and no values yet, as inside a compiled function or a functional "
            "model, so it can't be checked. Pass `use_causal_mask=True` for a causal mask and "
            "`value_mask` or `key_mask` of shape (batch, key_length) for padding, or use "
            '`attention_mode="exact"`.'
        )
    seen = np.any(values, axis=1)
    if np.array_equal(values, np.broadcast_to(seen[:, None], values.shape)):
        return False, ops.convert_to_tensor(seen)
    length = values.shape[1]
    if values.shape[2] == length:
        # The last query sees every key that counts.
        seen = values[:, -1]
        if np.array_equal(values, seen[:, None] & np.tri(length, dtype=bool)):
            return True, ops.convert_to_tensor(seen)
    raise ValueError(
        "Linear attention can't express an arbitrary `attention_mask`: features are summed over "
        "the keys before any query sees them. Masks that are causal, padding of keys, or both are "
        'accepted; for this one use `attention_mode="exact"`. '
        f"Received: a mask of shape {shape} that is neither."
    )


def merge_masks(first: Tensor, second: Tensor) -> Tensor:
    """Logical and of two optional masks of shape `(b, s)`."""
    if first is None or second is None:
        return second if first is None else first
    return ops.logical_and(ops.cast(first, "bool"), ops.cast(second, "bool"))


def check_attention_mask(
    attention_mask: Tensor, query_length: int | None, key_length: int | None
) -> None:
    """Raises a ValueError if a mask of queries and keys does not have their lengths."""
    if attention_mask is None or len(attention_mask.shape) < 2:
        return
    lengths = (query_length, key_length)
    if any(
        None not in (size, expected) and size not in (1, expected)
        for size, expected in zip(attention_mask.shape[-2:], lengths, strict=True)
    ):
        raise ValueError(
            "`attention_mask` must end in (query_length, key_length) = "
            f"{lengths}. Received: shape {tuple(attention_mask.shape)}"
        )


def with_head_axis(mask: Tensor) -> Tensor:
    """An attention mask of rank 2, 3 or 4 as one of rank 4; `None` stays."""
    if mask is None or len(mask.shape) == 4:
        return mask
    return mask[:, None] if len(mask.shape) == 3 else mask[None, None]


def _values(mask: Tensor) -> Tensor:
    """The mask in NumPy, or `None` where the backend is tracing."""
    if isinstance(mask, keras.KerasTensor):
        return None
    try:
        return ops.convert_to_numpy(mask)
    except Exception:  # each backend raises its own error when there are no values
        return None
