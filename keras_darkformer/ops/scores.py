"""Scores that features stand for, pair by pair: quadratic, to train and judge features with."""

import math

from keras import ops

from keras_darkformer.ops.backend import BASE, power, reshape
from keras_darkformer.ops.features import (
    TO_BASE,
    FoldedFeatures,
    log_key_features,
    log_query_features,
    log_query_scale,
)
from keras_darkformer.ops.state import LOG_ZERO
from keras_darkformer.ops.sums import TINY
from keras_darkformer.types import Tensor


def log_scores(
    query: Tensor, key: Tensor, features: FoldedFeatures, sliding_window: int | None = None
) -> Tensor:
    """Logarithms of the weights that `attention.attend` gives, before it normalises them.

    Args:
        query: `(b, t, n, h)`, any float dtype.
        key: `(b, s, k, h)`.
        features: `FoldedFeatures`.
        sliding_window: int W, or `None`.

    Returns:
        `(b, n, t, s)` in float32, natural logarithms. Without a window they are known up to a
        constant of each query. Nothing is masked.
    """
    batch, length, num_heads, head_dim = tuple(ops.shape(query))
    kv_heads = features.num_heads
    groups = num_heads // kv_heads
    query = reshape(ops.cast(query, "float32"), (batch, length, kv_heads, groups, head_dim))
    query = ops.transpose(query, (0, 2, 1, 3, 4))  # (b, k, t, g, h)
    key = ops.transpose(ops.cast(key, "float32"), (0, 2, 1, 3))
    rows = reshape(query, (batch, kv_heads, length * groups, head_dim))
    query_logits = log_query_features(rows, features)
    key_logits, key_scale = log_key_features(key, features)
    query_max = ops.max(ops.stop_gradient(query_logits), axis=-1, keepdims=True)
    key_max = ops.max(ops.stop_gradient(key_logits), axis=-1, keepdims=True)
    products = power(query_logits - query_max) @ ops.swapaxes(power(key_logits - key_max), 2, 3)
    scores = ops.log(ops.maximum(products, TINY)) * TO_BASE
    scores = scores + query_max + ops.swapaxes(key_max, 2, 3) + key_scale[:, :, None, :]
    if sliding_window is not None:
        assert features.query_scale is not None
        scores = scores + log_query_scale(rows, features.query_scale)[..., None]
    scores = reshape(scores, (batch, kv_heads, length, groups, -1))
    if sliding_window is not None:
        near = ops.einsum("bktgh,bksh->bktgs", query, key) * (head_dim**-0.5 * TO_BASE)
        age = ops.arange(length)[:, None] - ops.arange(ops.shape(key)[2])[None, :]
        scores = ops.where(age[:, None] < sliding_window, near, scores)
    scores = ops.transpose(scores, (0, 1, 3, 2, 4))
    return reshape(scores, (batch, num_heads, length, -1)) * math.log(BASE)


def exact_logits(query: Tensor, key: Tensor) -> Tensor:
    """Softmax's own, `q . k / sqrt(h)`, in float32: `(b, n, t, s)`. Nothing is masked."""
    query, key = ops.cast(query, "float32"), ops.cast(key, "float32")
    key = ops.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return ops.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5


def log_sum_exp(scores: Tensor, visible: Tensor) -> Tensor:
    """Over the visible entries of the last axis; a large negative number where there are none."""
    return ops.logsumexp(ops.where(visible, scores, LOG_ZERO), axis=-1)


def visible_pairs(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool,
    key_mask: Tensor = None,
    attention_mask: Tensor = None,
) -> Tensor:
    """Which keys each query may attend to, bool, broadcasting to `(b, n, t, s)`."""
    visible = ops.ones((1, 1, ops.shape(query)[1], ops.shape(key)[1]), dtype="bool")
    if causal:
        index = ops.arange(ops.shape(key)[1])
        visible = ops.logical_and(visible, index[None, :] <= index[:, None])
    for mask in (None if key_mask is None else key_mask[:, None, None, :], attention_mask):
        if mask is not None:
            visible = ops.logical_and(visible, ops.cast(mask, "bool"))
    return visible


def log_softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Log-softmax over the visible entries of the last axis; a large negative number elsewhere."""
    return ops.log_softmax(ops.where(visible, logits, LOG_ZERO), axis=-1)
