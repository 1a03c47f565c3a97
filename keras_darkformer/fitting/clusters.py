"""Features from k-means clusters of the queries: attention as a mixture of typical maps."""

from collections.abc import Sequence

import numpy as np

from keras_darkformer.fitting.projections import Projections
from keras_darkformer.fitting.sequences import (
    Attended,
    HeadSample,
    exact_weights,
    sequences,
    softmax,
)
from keras_darkformer.fitting.spectral import spectrum

HOLD = 0.3  # how strongly each `w_j` is held at the mean query of its cluster
RIDGE = 1e-9  # relative to the mean eigenvalue: keeps solves defined, too small to be felt


def clusters(
    sample: HeadSample,
    num_features: int,
    tau: float = 0.3,
    *,
    max_queries: int = 10_000,
    seed: int = 0,
) -> Projections:
    """Features that mix typical attention maps, with a query's features as the gate.

    K-means of the queries gives m typical queries `w_j`. Key feature j is the attention map of
    `w_j`, and query feature j is the share of that map in a query's attention, a mixture of m maps.
    With `x = q^ - b` and `y = k^ - c`, the metric of k-means is the covariance of y, weighted by
    attention, so that distances are differences of logits.

    Args:
        sample: the sample of one head. If it is causal, maps and metric use the keys up to each
            query.
        tau: float. How sharply queries are told apart; 1 is the posterior of normal clusters.
        max_queries: int. Queries used.
        seed: int. Seed of the choice of queries and of the start of k-means.
    """
    parts = sequences(sample, max_queries, seed)
    hat = sample.key.shape[-1] ** -0.25
    x = hat * np.concatenate([part.query for part in parts])
    y = hat * np.concatenate([part.key for part in parts])
    b, c = x.mean(axis=0), y.mean(axis=0)
    x, y = x - b, y - c

    values, vectors = spectrum(_logit_metric(parts))
    labels, counts = kmeans(x @ (vectors * np.sqrt(values)), num_features, seed=seed)
    means = _cluster_means(x, labels, num_features)
    centres, counts = _split_empty(means, counts)

    within = _second_moment(x - means[labels])
    spread = within + 0.03 * _second_moment(x)
    u = tau * np.linalg.solve(_loaded(spread, 0.01 * np.trace(within) / len(b)), centres.T).T
    prior = -0.5 * np.sum(u * centres, axis=1) + np.log(counts / len(x))
    w = centres + _correction(softmax(x @ u.T + prior), x, centres)

    logits = y @ (w + b).T
    peak = logits.max(axis=0)
    bias = prior - peak - np.log(np.mean(np.exp(logits - peak), axis=0))
    bias = bias - u @ b - (w + b) @ c  # shifts, as constants per feature
    return Projections(hat * u.T, hat * (w + b).T, bias)


def _logit_metric(parts: Sequence[Attended]) -> np.ndarray:
    """Covariance of `k^`: the mean of that within a query's softmax and that within a sequence."""
    head_dim = parts[0].key.shape[-1]
    attended, plain = np.zeros((2, head_dim, head_dim))
    num_queries = sum(len(part.query) for part in parts)
    num_keys = sum(len(part.key) for part in parts)
    for part in parts:
        centred = part.key - part.key.mean(axis=0)
        weights = exact_weights(part)
        outputs = weights @ centred
        attended += (centred * weights.sum(axis=0)[:, None]).T @ centred - outputs.T @ outputs
        plain += centred.T @ centred
    return 0.5 * (attended / num_queries + plain / num_keys) / np.sqrt(head_dim)


def kmeans(
    points: np.ndarray, num_clusters: int, rounds: int = 20, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm. Empty clusters restart at the points furthest from their centres.

    Returns:
        `(labels (n,), counts (num_clusters,))`; counts are 0 where distinct points are too few.
    """
    rng = np.random.default_rng(seed)
    centres = points[rng.choice(len(points), num_clusters, replace=num_clusters > len(points))]
    squares = np.sum(points**2, axis=1)
    for _ in range(max(rounds, 1)):
        distances = np.sum(centres**2, axis=1) - 2 * points @ centres.T
        labels = np.argmin(distances, axis=1)
        counts = np.bincount(labels, minlength=num_clusters)
        centres = _cluster_means(points, labels, num_clusters)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            error = squares + distances[np.arange(len(points)), labels]
            furthest = np.argsort(-error, kind="stable")[: len(empty)]
            centres[empty[: len(furthest)]] = points[furthest]
    return labels, counts


def _cluster_means(points: np.ndarray, labels: np.ndarray, num_clusters: int) -> np.ndarray:
    """Means of the points with each label, zero for labels without points."""
    means = np.zeros((num_clusters, points.shape[1]))
    order = np.argsort(labels, kind="stable")
    present, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    means[present] = np.add.reduceat(points[order], starts, axis=0) / counts[:, None]
    return means


def _split_empty(centres: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns empty clusters into copies of the largest ones, which share its points equally."""
    source, copies = np.arange(len(counts)), np.ones(len(counts), int)
    for index in np.flatnonzero(counts == 0):
        source[index] = np.argmax(counts / copies)
        copies[source[index]] += 1
    return centres[source], (counts / copies)[source]


def _correction(gate: np.ndarray, x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Moves `w` so that its mean over the gates is the query: its logits, to first order."""
    n, m = gate.shape
    gram = gate.T @ gate + HOLD * n / m * np.eye(m)
    return np.linalg.solve(gram, gate.T @ (x - gate @ centres))


def _second_moment(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


def _loaded(matrix: np.ndarray, ridge: float) -> np.ndarray:
    """Adds a ridge, plus as much as keeps the matrix invertible for any data."""
    ridge = ridge + RIDGE * np.trace(matrix) / len(matrix) + np.finfo("float64").tiny ** 0.5
    return matrix + ridge * np.eye(len(matrix))
