"""Scores that features stand for, pair by pair: quadratic, for training and judging features."""

import math
from typing import NamedTuple

from keras import ops

from keras_darkformer.memory import Memory
from keras_darkformer.ops.backend import BASE, largest, power, reshape
from keras_darkformer.ops.cache import OUT, compete, ranked
from keras_darkformer.ops.exact_memory import last_written
from keras_darkformer.ops.features import (
    TO_BASE,
    FoldedFeatures,
    log_key_features,
    log_query_features,
    log_query_scale,
)
from keras_darkformer.ops.state import LOG_ZERO, NOTHING
from keras_darkformer.ops.sums import TINY
from keras_darkformer.types import Tensor


def log_scores(
    query: Tensor, key: Tensor, features: FoldedFeatures, exact: Tensor = None
) -> Tensor:
    """Logarithms of the weights that `attention.attend` gives, before it normalises them.

    Args:
        query: `(b, t, n, h)`, any float dtype.
        key: `(b, s, k, h)`.
        features: `FoldedFeatures`.
        exact: bool, from `exact_pairs`: which pairs are in the memory; `None` without one.

    Returns:
        `(b, n, t, s)` in float32, natural logarithms. Without a memory, they are known only up to a
        constant per query. Nothing is masked.
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
    query_max = largest(ops.stop_gradient(query_logits), -1, keepdims=True)
    key_max = largest(ops.stop_gradient(key_logits), -1, keepdims=True)
    products = power(query_logits - query_max) @ ops.swapaxes(power(key_logits - key_max), 2, 3)
    scores = ops.log(ops.maximum(products, TINY)) * TO_BASE
    scores = scores + query_max + ops.swapaxes(key_max, 2, 3) + key_scale[:, :, None, :]
    if exact is not None:
        assert features.query_scale is not None
        scores = scores + log_query_scale(rows, features.query_scale)[..., None]
    pairs = batch, num_heads, length, ops.shape(key)[2]
    scores = reshape(scores, (batch, kv_heads, length, groups, pairs[3]))
    scores = reshape(ops.transpose(scores, (0, 1, 3, 2, 4)), pairs)
    scores = scores * math.log(BASE)
    if exact is None:
        return scores
    near = ops.einsum("bktgh,bksh->bkgts", query, key) * head_dim**-0.5
    return ops.where(exact, reshape(near, pairs), scores)


class MemoryPairs(NamedTuple):
    """Which pairs of a query and a key are in which part of the memory; bool, `(b, n, t, s)`.

    No pair is in two parts. An axis along which all pairs are alike may have size 1. Pairs with
    masked or future keys may be included.
    """

    sinks: Tensor
    window: Tensor
    kept: Tensor

    @property
    def exact(self) -> Tensor:
        """Which pairs are in any of them."""
        return ops.logical_or(ops.logical_or(self.sinks, self.window), self.kept)


def exact_pairs(query: Tensor, key: Tensor, memory: Memory, key_mask: Tensor = None) -> Tensor:
    """Which pairs are in the memory at all, `(b, n, t, t)`; see `memory_pairs`."""
    exact = memory_pairs(query, key, memory, key_mask).exact
    batch, length, num_heads, _ = tuple(ops.shape(query))
    return ops.broadcast_to(exact, (batch, num_heads, length, length))


def memory_pairs(
    query: Tensor, key: Tensor, memory: Memory, key_mask: Tensor = None
) -> MemoryPairs:
    """Which pairs of a causal call on a whole sequence are in the exact memory.

    Args:
        query: `(b, t, n, h)`.
        key: `(b, t, k, h)`.
        memory: `Memory`.
        key_mask: bool, `(b, t)`, or `None`.
    """
    batch, length, num_heads, _ = tuple(ops.shape(query))
    kv_heads, index = key.shape[2], ops.arange(length, dtype="int32")
    real = ops.ones((batch, length), dtype="bool")
    if key_mask is not None:
        real = ops.broadcast_to(ops.cast(key_mask, "bool"), (batch, length))
    number = ops.cumsum(ops.cast(real, "int32"), axis=1)
    sink = ops.logical_and(real, number <= memory.num_sinks)  # (b, s)
    age = index[:, None] - index[None, :]
    recent = ops.logical_and(age >= 0, age < memory.window)
    local = ops.logical_or(recent, sink[:, None])  # (b, t, s)
    window = ops.logical_and(recent, ops.logical_not(sink)[:, None])
    kept = ops.zeros((1, 1, 1, 1), dtype="bool")
    if memory.cache_size:
        seen = ops.logical_and(ops.logical_and(local, real[:, None]), age >= 0)
        logits = ops.stop_gradient(exact_logits(query, key))
        share = ops.exp(log_softmax(logits, seen[:, None]))
        asked = ops.logical_and(ops.logical_and(recent, real[:, :, None]), seen)
        share = ops.where(asked[:, None], share, 0.0)
        share = reshape(share, (batch, kv_heads, num_heads // kv_heads, length, length))
        received = ops.sum(share, axis=(2, 3))  # (b, k, s)
        competes = ops.logical_and(real, ops.logical_not(sink))[:, None]
        scores = ops.where(competes, received, OUT)
        # What enters at each token; nothing while the window fills, or after the last real token.
        nothing = ops.full((batch, kv_heads, memory.window), OUT, dtype="float32")
        entering = ops.concatenate([nothing, scores], axis=2)[:, :, :length]
        entering = ops.where(index < last_written(real)[:, None], entering, OUT)
        empty = ops.full((batch, kv_heads, memory.cache_size), NOTHING, dtype="float32")
        _, ranks = ranked(ops.concatenate([empty, entering], axis=2))
        size = memory.cache_size
        kept = reshape(ranks[:, :, :size], (batch, kv_heads, size))
        leaves = compete(kept, ranks[:, :, size:])[:, :, size:]
        # Key s entered as number s + W.
        stays = ops.concatenate(
            [leaves[:, :, memory.window :], ops.zeros_like(nothing, dtype="int32")], axis=2
        )[:, :, :length]
        kept = ops.logical_and(age >= memory.window, index[:, None] < stays[:, :, None])
        kept = ops.repeat(kept, num_heads // kv_heads, axis=1)
    return MemoryPairs(sink[:, None, None], window[:, None], kept)


def exact_logits(query: Tensor, key: Tensor) -> Tensor:
    """Softmax's own logits, `q . k / sqrt(h)`, in float32: `(b, n, t, s)`. Nothing is masked."""
    query, key = ops.cast(query, "float32"), ops.cast(key, "float32")
    key = ops.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return ops.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5


def log_sum_exp(scores: Tensor, visible: Tensor) -> Tensor:
    """Log-sum-exp over the last axis' visible entries; a large negative number without any."""
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
