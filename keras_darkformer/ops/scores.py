"""Scores that features stand for, pair by pair: quadratic, to train and judge features with."""

import math
from typing import Any

from keras import ops

from keras_darkformer.ops.backend import BASE, power, reshape
from keras_darkformer.ops.features import (
    FeatureProjections,
    Window,
    log_key_features,
    log_query_features,
)
from keras_darkformer.ops.sums import LOG_ZERO, TINY


def log_scores(
    query: Any, key: Any, projections: FeatureProjections, window: Window | None = None
) -> Any:
    """Logarithms of the weights that `linear_attention` gives, before it normalises them.

    Args:
        query: `(b, t, n, h)`, any float dtype.
        key: `(b, s, k, h)`.
        projections: `FeatureProjections`.
        window: `Window` or `None`.

    Returns:
        `(b, n, t, s)` in float32, natural logarithms. Without a window they
        are known up to a constant of each query. Nothing is masked.
    """
    batch, length, num_heads, head_dim = tuple(ops.shape(query))
    kv_heads = projections.num_heads
    groups = num_heads // kv_heads
    query = reshape(ops.cast(query, "float32"), (batch, length, kv_heads, groups, head_dim))
    query = ops.transpose(query, (0, 2, 3, 1, 4))  # (b, k, g, t, h)
    key = ops.transpose(ops.cast(key, "float32"), (0, 2, 1, 3))
    rows = reshape(query, (batch, kv_heads, groups * length, head_dim))
    query_logits = log_query_features(rows, projections)
    key_logits, key_scale = log_key_features(key, projections)
    query_max = ops.max(ops.stop_gradient(query_logits), axis=-1, keepdims=True)
    key_max = ops.max(ops.stop_gradient(key_logits), axis=-1, keepdims=True)
    products = power(query_logits - query_max) @ ops.swapaxes(power(key_logits - key_max), 2, 3)
    scores = ops.log(ops.maximum(products, TINY)) * (1 / math.log(BASE))
    scores = scores + query_max + ops.swapaxes(key_max, 2, 3) + key_scale[:, :, None, :]
    scores = reshape(scores, (batch, kv_heads, groups, length, -1))
    if window is not None:
        scores = _with_window(scores, query, key, window)
    return reshape(scores, (batch, num_heads, length, -1)) * math.log(BASE)


def _with_window(scores: Any, query: Any, key: Any, window: Window) -> Any:
    """The far scores behind the window, softmax's own within it: `(b, k, g, t, s)`."""
    kv_heads, groups = query.shape[1:3]
    norm = ops.einsum("bkgth,khr->bkgtr", query, window.norm_kernel)
    far_scale = ops.einsum("bkgth,kh->bkgt", query, window.kernel) - ops.sum(norm**2, axis=-1)
    far_scale = far_scale + reshape(window.bias, (kv_heads, groups, 1))
    far = LOG_ZERO if window.only else scores + far_scale[..., None]
    near = ops.einsum("bkgth,bksh->bkgts", query, key)
    near = near * (query.shape[-1] ** -0.5 / math.log(BASE))
    age = ops.arange(ops.shape(query)[3])[:, None] - ops.arange(ops.shape(key)[2])[None, :]
    return ops.where(age < window.size, near, far)


def exact_logits(query: Any, key: Any) -> Any:
    """Softmax's own, `q . k / sqrt(h)`, in float32: `(b, n, t, s)`. Nothing is masked."""
    query, key = ops.cast(query, "float32"), ops.cast(key, "float32")
    key = ops.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return ops.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5


def log_sum_exp(scores: Any, visible: Any) -> Any:
    """Over the visible entries of the last axis; a large negative number where there are none."""
    return ops.logsumexp(ops.where(visible, scores, LOG_ZERO), axis=-1)


def visible_pairs(
    query: Any, key: Any, *, causal: bool, key_mask: Any = None, attention_mask: Any = None
) -> Any:
    """Which keys each query may attend to, bool, broadcasting to `(b, n, t, s)`."""
    visible = ops.ones((1, 1, ops.shape(query)[1], ops.shape(key)[1]), dtype="bool")
    if causal:
        index = ops.arange(ops.shape(key)[1])
        visible = ops.logical_and(visible, index[None, :] <= index[:, None])
    for mask in (None if key_mask is None else key_mask[:, None, None, :], attention_mask):
        if mask is not None:
            visible = ops.logical_and(visible, ops.cast(mask, "bool"))
    return visible
