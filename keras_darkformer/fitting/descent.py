"""Descent on the divergence of attention maps, starting from the closed forms."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from keras_darkformer.fitting.projections import DarkParameters, Projections
from keras_darkformer.fitting.sequences import HeadSample, exact_weights, sequences

DTYPE = "float32"  # of all that grows with the sample; parameters and sums over it are float64
BATCH = 512  # queries a step of the descent, or a few less
BLOCK = 64  # queries at a time, so that what they meet stays in the processor's cache
MAX_RATIO = 1e4  # bound on p / p_features in the descent, for keys that features miss entirely
TINY = 1e-30

Arrays = Mapping[str, np.ndarray]
# Turns gradients by log phi_q and log phi_k into those by parameters.
Pullback = Callable[[np.ndarray, np.ndarray], Arrays]


class Example(NamedTuple):
    """Queries `(i, h)` and keys `(s, h)` of one sequence, which see which, and softmax's weights.

    `visible` and `target`, the weights, are `(i, s)`.
    """

    query: np.ndarray
    key: np.ndarray
    visible: np.ndarray
    target: np.ndarray


# Turns parameters and an example into log phi_q, log phi_k and their pullback.
LogFeatures = Callable[[Arrays, Example], tuple[np.ndarray, np.ndarray, Pullback]]
Gradient = Callable[[Arrays], tuple[float, Arrays]]


def examples(sample: HeadSample, *, max_queries: int = 4096, seed: int = 0) -> list[Example]:
    """What a head's features should do, sequence by sequence; for arguments see `sequences`."""
    return [
        Example(
            part.query.astype(DTYPE),
            part.key.astype(DTYPE),
            part.visible,
            exact_weights(part).astype(DTYPE),
        )
        for part in sequences(sample, max_queries, seed)
    ]


def batches(seen: Sequence[Example]) -> list[list[Example]]:
    """Splits the examples into a part per step: some of the sequences, or some queries of each.

    Sequences are split if there are fewer of them than parts.
    """
    count = -(-sum(len(example.query) for example in seen) // BATCH)
    if count <= len(seen):
        return [list(seen[first::count]) for first in range(count)]
    return [[_every(count, first, example) for example in seen] for first in range(count)]


def _every(count: int, first: int, example: Example) -> Example:
    """An example with every `count`-th query, from number `first` on."""
    query, key, visible, target = example
    return Example(query[first::count], key, visible[first::count], target[first::count])


def cross_entropy(
    log_query: np.ndarray, log_key: np.ndarray, target: np.ndarray, visible: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Cross entropy from exact attention maps to those of features, over queries, and its gradient.

    It is the divergence plus a constant, the entropy of the exact maps.

    Args:
        log_query: `log phi_q`, of shape `(i, m)`.
        log_key: `log phi_k`, of shape `(s, m)`.
        target: exact weights, of shape `(i, s)`.
        visible: of shape `(i, s)`; every query sees a key.

    Returns:
        `(cross entropy, gradient (i, m), gradient (s, m))` by the log-features.
    """
    peak = log_key.max(axis=0)
    key = np.exp(log_key - peak)
    log_query = log_query + peak
    query = np.exp(log_query - log_query.max(axis=1, keepdims=True))
    loss, by_query, by_key = 0.0, np.empty_like(query), np.zeros_like(key)
    for first in range(0, len(query), BLOCK):
        rows = slice(first, first + BLOCK)
        met = np.flatnonzero(visible[rows].any(axis=0))
        columns = slice(met[0], met[-1] + 1)
        seen, wanted = visible[rows, columns], target[rows, columns]
        weights = np.maximum(query[rows] @ key[columns].T, TINY)
        ratio, log_weights = wanted / weights, np.log(weights)
        weights *= seen
        total = weights.sum(axis=1, keepdims=True)
        log_weights *= wanted
        loss += float(np.log(total).sum() - log_weights.sum())
        ratio *= total
        excess = np.subtract(seen, np.minimum(ratio, MAX_RATIO, out=ratio), out=ratio)
        query[rows] /= total
        by_query[rows] = query[rows] * (excess @ key[columns])
        by_key[columns] += excess.T @ query[rows]
    return loss, by_query, key * by_key


def refine_exponential(
    projections: Projections,
    seen: Sequence[Example],
    *,
    steps: int = 120,
    learning_rate: float = 0.03,
) -> Projections:
    """Lowers the divergence of attention maps by a few steps on all that `clusters` returns.

    The projections must have no norm. They are returned as they are if the descent brings no gain.
    """
    query_kernel, key_kernel, bias, _ = projections
    # Centred, so that the kernels and the bias are nearly independent.
    b = np.concatenate([example.query for example in seen]).mean(axis=0)
    c = np.concatenate([example.key for example in seen]).mean(axis=0)

    def log_features(p: Arrays, example: Example) -> tuple[np.ndarray, np.ndarray, Pullback]:
        x, y = example.query - b, example.key - c

        def pullback(by_query: np.ndarray, by_key: np.ndarray) -> Arrays:
            return {"query": x.T @ by_query, "key": y.T @ by_key, "bias": by_key.sum(axis=0)}

        return x @ p["query"], y @ p["key"] + p["bias"], pullback

    shift = (b @ query_kernel) + (c @ key_kernel)
    start = {"query": query_kernel, "key": key_kernel, "bias": bias + shift}
    rates = {
        "query": learning_rate * _rms(query_kernel),
        # The part that all features share is the mean query, which says nothing about their spread.
        "key": learning_rate * _rms(key_kernel - key_kernel.mean(axis=1, keepdims=True)),
        "bias": learning_rate,
    }
    found = _adam(log_features, seen, start, rates, steps)
    shift = (b @ found["query"]) + (c @ found["key"])
    return Projections(found["query"], found["key"], found["bias"] - shift)


def refine_dark(
    dark: DarkParameters,
    seen: Sequence[Example],
    *,
    steps: int = 120,
    learning_rate: float = 0.2,
) -> DarkParameters:
    """Lowers the divergence of attention maps over the geometry and the weight of each feature.

    The result is a dark feature map again. It belongs to the draw it was given: geometry and
    weights make up for that particular W, and part of the gain is lost when W is redrawn.
    """
    rates = {
        "geometry": learning_rate * _rms(dark.geometry),
        "log_weight": 0.5 * learning_rate,  # it counts twice
    }
    return dark._replace(**_adam(_dark_features(dark), seen, _free(dark), rates, steps))


def best_draw(
    draw: Callable[[], DarkParameters], seen: Sequence[Example], *, draws: int = 8
) -> DarkParameters:
    """The draw, of several, whose attention maps diverge least from the exact ones."""

    def loss(dark: DarkParameters) -> float:
        return _gradient(_dark_features(dark), seen)(_free(dark))[0]

    return min((draw() for _ in range(draws)), key=loss)


def _free(dark: DarkParameters) -> Arrays:
    """The parameters that a descent changes."""
    return {"geometry": dark.geometry, "log_weight": dark.log_weight}


def _dark_features(dark: DarkParameters) -> LogFeatures:
    """The features of a draw as functions of the free parameters."""
    hat = dark.geometry.shape[1] ** -0.25
    w, b, c = (x.astype(DTYPE) for x in (dark.projection, dark.query_shift, dark.key_shift))

    def log_features(p: Arrays, example: Example) -> tuple[np.ndarray, np.ndarray, Pullback]:
        geometry = p["geometry"]
        x, y = hat * example.query - b, hat * example.key - c
        kernel, my = (w @ geometry).T, y @ geometry.T
        norm = 0.5 * np.sum(my**2, axis=1) - y @ b

        def pullback(by_query: np.ndarray, by_key: np.ndarray) -> Arrays:
            by_logits = w.T @ (by_query.T @ x + by_key.T @ y)
            by_norm = geometry @ ((y * by_key.sum(axis=1)[:, None]).T @ y)
            return {"geometry": by_logits - by_norm, "log_weight": 2 * by_key.sum(axis=0)}

        return x @ kernel, y @ kernel - norm[:, None] + 2 * p["log_weight"], pullback

    return log_features


def _gradient(log_features: LogFeatures, seen: Sequence[Example]) -> Gradient:
    """The mean cross entropy of attention maps as a function of parameters, with its gradient."""
    num_queries = sum(len(example.query) for example in seen)

    def gradient(p: Arrays) -> tuple[float, Arrays]:
        loss, slopes = 0.0, {name: np.zeros_like(value) for name, value in p.items()}
        cast = {name: value.astype(DTYPE) for name, value in p.items()}
        for example in seen:
            log_query, log_key, pullback = log_features(cast, example)
            value, *by_both = cross_entropy(log_query, log_key, example.target, example.visible)
            loss += value / num_queries
            for name, slope in pullback(*by_both).items():
                slopes[name] += slope / num_queries
        return loss, slopes

    return gradient


def _adam(
    log_features: LogFeatures,
    seen: Sequence[Example],
    start: Arrays,
    rates: Mapping[str, float],
    steps: int,
) -> Arrays:
    """Adam with a cosine schedule, a batch per step; returns the start if the end is no better."""
    gradients = [_gradient(log_features, batch) for batch in batches(seen)]
    first_decay, second_decay = 0.9, 0.95
    now = dict(start)
    first = {name: np.zeros_like(value) for name, value in start.items()}
    second = {name: np.zeros_like(value) for name, value in start.items()}
    for step in range(steps):
        loss, slopes = gradients[step % len(gradients)](now)
        if not np.isfinite(loss):
            return start
        rate = 0.5 * (1 + np.cos(np.pi * step / steps))
        for name, slope in slopes.items():
            first[name] = first_decay * first[name] + (1 - first_decay) * slope
            second[name] = second_decay * second[name] + (1 - second_decay) * slope**2
            mean = first[name] / (1 - first_decay ** (step + 1))
            spread = np.sqrt(second[name] / (1 - second_decay ** (step + 1)))
            now[name] = now[name] - rate * rates[name] * mean / (spread + 1e-12)
    whole = _gradient(log_features, seen)
    return now if whole(now)[0] < whole(start)[0] else start


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))
