"""What the attention layers of stock models get to see."""

import contextlib
from typing import NamedTuple

import numpy as np
import pytest
from backends import to_numpy
from hub.models import attentions, outputs


class Heads(NamedTuple):
    """Rotated queries and keys, values, and the padding mask of one layer, in NumPy."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    mask: np.ndarray


def stock_heads(model, batch, offset=0):
    """`Heads` of every layer of a stock model, as its own softmax gets them."""
    seen = []
    stock_cls = type(attentions(model)[0])
    attention, rotation = stock_cls._compute_attention, stock_cls._apply_rope

    def compute_attention(self, q, k, v, *args, **kwargs):
        arrays = (to_numpy(x).astype("float32") for x in (q, k, v))
        seen.append(Heads(*arrays, np.asarray(batch["padding_mask"], bool)))
        return attention(self, q, k, v, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock_cls, "_compute_attention", compute_attention)
        patch.setattr(
            stock_cls, "_apply_rope", lambda self, x, start, **kw: rotation(self, x, start + offset)
        )
        outputs(model, batch)
    return seen


@contextlib.contextmanager
def positions(model):
    """A list that fills with the first positions that a model's layers rotate by."""
    seen = []
    mro = type(attentions(model)[0]).__mro__
    stock_cls = next(cls for cls in mro if "_apply_rope" in vars(cls))
    rotation = stock_cls._apply_rope

    def apply_rope(self, x, start, **kwargs):
        seen.append(int(to_numpy(start)) if hasattr(start, "shape") else start)
        return rotation(self, x, start, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock_cls, "_apply_rope", apply_rope)
        yield seen


def concatenated(parts):
    """The same layer's `Heads` of several batches as one."""
    return Heads(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
