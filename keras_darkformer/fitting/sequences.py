"""Sequences of one head: what each query sees, and how it attends."""

from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np

from keras_darkformer.fitting.projections import Projections
from keras_darkformer.fitting.remembered import exact_keys
from keras_darkformer.memory import NO_MEMORY, Memory


class HeadSample(NamedTuple):
    """Queries `(b, t, g, h)` and keys `(b, s, h)` of one key/value head, sequence by sequence.

    Masks, `(b, t)` and `(b, s)`, are true for what counts; `None` is true everywhere. With
    `causal`, query t attends to keys up to t. Queries do not see keys in an exact `memory`, which
    features do not stand for.
    """

    query: np.ndarray
    key: np.ndarray
    query_mask: np.ndarray | None = None
    key_mask: np.ndarray | None = None
    causal: bool = False
    memory: Memory = NO_MEMORY

    def where(self, mask: np.ndarray) -> Self:
        """The part of the sample where a mask `(b, t)` holds, for queries and as many keys."""
        query_mask, key_mask = (
            mask if own is None else mask & own for own in (self.query_mask, self.key_mask)
        )
        return self._replace(query_mask=query_mask, key_mask=key_mask)

    @property
    def is_square(self) -> bool:
        """Whether there are as many queries as keys, so that one mask can hold for both."""
        return self.query.shape[1] == self.key.shape[1]

    @property
    def is_empty(self) -> bool:
        """Whether every query or every key is masked."""
        return any(mask is not None and not mask.any() for mask in self[2:4])


class Attended(NamedTuple):
    """Queries `(i, h)` and keys `(s, h)` of one sequence, and which see which, `(i, s)`."""

    query: np.ndarray
    key: np.ndarray
    visible: np.ndarray


def sequences(sample: HeadSample, max_queries: int | None = None, seed: int = 0) -> list[Attended]:
    """Splits a sample into sequences of real tokens.

    Args:
        sample: the sample of one head.
        max_queries: int. Queries kept in all, equally many per sequence, picked at random.
        seed: int. Seed of this pick.

    Raises:
        ValueError: if a query or key that counts is not finite, or none is left.
    """
    rng = np.random.default_rng(seed)
    limit = None if max_queries is None else max(1, max_queries // len(sample.query))
    parts = []
    for query, key, visible in split(sample):
        if limit is not None and len(query) > limit:
            kept = np.sort(rng.choice(len(query), limit, replace=False))
            query, visible = query[kept], visible[kept]
        for name, value in (("query", query), ("key", key)):
            if not np.all(np.isfinite(value)):
                raise ValueError(f"`{name}` must be finite where it is not masked.")
        parts.append(Attended(query, key, visible))
    if not parts:
        raise ValueError("No `query` is left that sees a `key`: every one of them is masked.")
    return parts


def split(sample: HeadSample) -> Iterator[Attended]:
    """Yields the sequences of a sample in float64, with the queries of a group pooled.

    Queries that see no key are dropped, and so are sequences without any other queries.
    """
    (b, t, groups, head_dim), s = sample.query.shape, sample.key.shape[1]
    query_mask = np.broadcast_to(True if sample.query_mask is None else sample.query_mask, (b, t))
    key_mask = np.broadcast_to(True if sample.key_mask is None else sample.key_mask, (b, s))
    for row in range(b):
        here, there = np.flatnonzero(query_mask[row]), np.flatnonzero(key_mask[row])
        last_seen = here[:, None] + s - t if sample.causal else s
        visible = np.broadcast_to(there <= last_seen, (len(here), len(there)))
        if sample.memory:
            near = np.moveaxis(sample.query[row], 1, 0) @ sample.key[row].T / np.sqrt(head_dim)
            exact = exact_keys(near, key_mask[row], sample.memory)
            visible = visible & ~exact[np.ix_(here, there)]
        here, visible = here[visible.any(axis=1)], visible[visible.any(axis=1)]
        if len(here):
            query = sample.query[row, here].reshape(-1, head_dim).astype("float64")
            key = sample.key[row, there].astype("float64")
            yield Attended(query, key, np.repeat(visible, groups, axis=0))


def softmax(logits: np.ndarray, visible: np.ndarray | None = None) -> np.ndarray:
    """Softmax over the visible entries of the last axis."""
    if visible is not None:
        logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def exact_weights(part: Attended) -> np.ndarray:
    """Softmax attention, `(i, s)`."""
    logits = part.query @ part.key.T / np.sqrt(part.key.shape[-1])
    return softmax(logits, part.visible)


def feature_weights(projections: Projections, part: Attended) -> np.ndarray:
    """Attention weights of features, `(i, s)`.

    Queries whose features meet no key's features get zeros.
    """
    query, key, visible = part
    log_key = key @ projections.key_kernel + projections.key_bias
    if projections.norm_kernel is not None:
        log_key -= 0.5 * np.sum((key @ projections.norm_kernel) ** 2, axis=1)[:, None]
    peak = log_key.max(axis=0)
    log_query = query @ projections.query_kernel + peak
    log_query -= log_query.max(axis=1, keepdims=True)
    weights = np.where(visible, np.exp(log_query) @ np.exp(log_key - peak).T, 0)
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
