"""Sequences of one head: what each query sees, and how it attends."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from keras_darkformer.calibration.projections import Projections


class Attended(NamedTuple):
    """Queries of one sequence and the keys they see.

    Attributes:
        query: of shape `(i, h)`.
        key: of shape `(s, h)`.
        visible: of shape `(i, s)`, or `None` where every query sees every key.
    """

    query: np.ndarray
    key: np.ndarray
    visible: np.ndarray | None


def samples(
    query: np.ndarray,
    key: np.ndarray,
    query_mask: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    causal: bool = False,
    max_queries: int | None = None,
    seed: int = 0,
) -> list[Attended]:
    """Takes arrays apart into sequences of real tokens; queries that see no key are dropped.

    Args:
        max_queries: int. Queries kept in all, the same number a sequence, picked at random.

    Raises:
        ValueError: if a query or key that counts is not finite, or none is left.
    """
    rng = np.random.default_rng(seed)
    parts = []
    limit = None if max_queries is None else max(1, max_queries // len(query))
    for _, q, k, visible, _ in pieces(query, key, query_mask, key_mask, causal):
        if limit is not None and len(q) > limit:
            kept = np.sort(rng.choice(len(q), limit, replace=False))
            q, visible = q[kept], None if visible is None else visible[kept]
        for name, value in (("query", q), ("key", k)):
            if not np.all(np.isfinite(value)):
                raise ValueError(f"`{name}` must be finite where it is not masked.")
        parts.append(Attended(q, k, visible))
    if not parts:
        raise ValueError("No `query` is left that sees a `key`: every one of them is masked.")
    return parts


def pieces(
    query: np.ndarray,
    key: np.ndarray,
    query_mask: np.ndarray | None,
    key_mask: np.ndarray | None,
    causal: bool,
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]]:
    """Per sequence `(row, query, key, visible, positions of the keys)`, groups pooled."""
    query = query[:, :, None] if query.ndim == 3 else query
    (b, t, g, _), s = query.shape, key.shape[1]
    query_mask = np.broadcast_to(True if query_mask is None else query_mask, (b, t))
    key_mask = np.broadcast_to(True if key_mask is None else key_mask, (b, s))
    for row in range(b):
        here, there = np.flatnonzero(query_mask[row]), np.flatnonzero(key_mask[row])
        visible = None
        if causal:
            visible = there <= here[:, None] + s - t
            here, visible = here[visible.any(axis=1)], visible[visible.any(axis=1)]
            visible = np.repeat(visible, g, axis=0)
        if len(here) and len(there):
            q = query[row, here].reshape(len(here) * g, -1).astype("float64")
            yield row, q, key[row, there].astype("float64"), visible, there


def softmax(logits: np.ndarray, visible: np.ndarray | None = None) -> np.ndarray:
    """Over the visible entries of the last axis."""
    if visible is not None:
        logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def exact_weights(sample: Attended) -> np.ndarray:
    """Softmax attention, `(i, s)`."""
    logits = sample.query @ sample.key.T / np.sqrt(sample.key.shape[-1])
    return softmax(logits, sample.visible)


def feature_weights(
    projections: Projections, query: np.ndarray, key: np.ndarray, visible: np.ndarray | None = None
) -> np.ndarray:
    """Attention weights `(i, s)` of features for raw queries `(i, h)` and keys `(s, h)`.

    Queries whose features meet none of the keys' get zeros.
    """
    log_key = key @ projections.key_kernel + projections.key_bias
    if projections.norm_kernel is not None:
        log_key -= 0.5 * np.sum((key @ projections.norm_kernel) ** 2, axis=1)[:, None]
    peak = log_key.max(axis=0)
    log_query = query @ projections.query_kernel + peak
    log_query -= log_query.max(axis=1, keepdims=True)
    weights = np.exp(log_query) @ np.exp(log_key - peak).T
    if visible is not None:
        weights = np.where(visible, weights, 0)
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
