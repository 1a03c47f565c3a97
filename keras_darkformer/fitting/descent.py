"""Descent on the divergence of attention maps, from what closed forms found."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from keras_darkformer.fitting.projections import DarkParameters, Projections, fold_dark
from keras_darkformer.fitting.sequences import (
    Attended,
    HeadSample,
    exact_weights,
    feature_weights,
    sequences,
)

MAX_RATIO = 1e4  # bound on p / p_features in the descent, where features miss a key entirely
TINY = 1e-300

Arrays = Mapping[str, np.ndarray]
# From gradients by log phi_q and log phi_k to those by parameters.
Pullback = Callable[[np.ndarray, np.ndarray], Arrays]
# From parameters and the queries and keys of a sequence to log phi_q, log phi_k and their pullback.
LogFeatures = Callable[[Arrays, Attended], tuple[np.ndarray, np.ndarray, Pullback]]
Gradient = Callable[[Arrays], tuple[float, Arrays]]


def attention_divergence(
    log_query: np.ndarray, log_key: np.ndarray, target: np.ndarray, visible: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """KL from exact attention maps to those of features, summed over queries, and its gradient.

    Args:
        log_query: `log phi_q`, of shape `(i, m)`.
        log_key: `log phi_k`, of shape `(s, m)`.
        target: exact weights, of shape `(i, s)`.
        visible: of shape `(i, s)`.

    Returns:
        `(divergence, gradient (i, m), gradient (s, m))` by the log-features.
    """
    peak = log_key.max(axis=0)
    key = np.exp(log_key - peak)
    log_query = log_query + peak
    query = np.exp(log_query - log_query.max(axis=1, keepdims=True))
    weights = np.where(visible, query @ key.T, 0)
    total = np.maximum(weights.sum(axis=1, keepdims=True), TINY)
    query, weights = query / total, np.maximum(weights / total, TINY)
    excess = np.where(visible, 1 - np.minimum(target / weights, MAX_RATIO), 0)
    divergence = np.sum(target * np.log(np.maximum(target, TINY) / weights))
    return float(divergence), query * (excess @ key), key * (excess.T @ query)


def refine_exponential(
    projections: Projections,
    sample: HeadSample,
    *,
    steps: int = 30,
    learning_rate: float = 0.03,
    max_queries: int = 4096,
    seed: int = 0,
) -> Projections:
    """Lowers the divergence of attention maps by a few steps over all that `clusters` returns.

    For projections without a norm. Returns the projections given if the descent went nowhere.
    """
    parts = sequences(sample, max_queries, seed)
    query_kernel, key_kernel, bias, _ = projections
    # Centred, so that the kernels and the bias are near independent.
    b = np.concatenate([part.query for part in parts]).mean(axis=0)
    c = np.concatenate([part.key for part in parts]).mean(axis=0)

    def log_features(p: Arrays, part: Attended) -> tuple[np.ndarray, np.ndarray, Pullback]:
        x, y = part.query - b, part.key - c

        def pullback(by_query: np.ndarray, by_key: np.ndarray) -> Arrays:
            return {"query": x.T @ by_query, "key": y.T @ by_key, "bias": by_key.sum(axis=0)}

        return x @ p["query"], y @ p["key"] + p["bias"], pullback

    shift = (b @ query_kernel) + (c @ key_kernel)
    start = {"query": query_kernel, "key": key_kernel, "bias": bias + shift}
    rates = {
        "query": learning_rate * _rms(query_kernel),
        # The part all features share is the mean query: it says nothing of their spread.
        "key": learning_rate * _rms(key_kernel - key_kernel.mean(axis=1, keepdims=True)),
        "bias": learning_rate,
    }
    found = _adam(_gradient(log_features, parts), start, rates, steps)
    shift = (b @ found["query"]) + (c @ found["key"])
    return Projections(found["query"], found["key"], found["bias"] - shift)


def refine_dark(
    dark: DarkParameters,
    sample: HeadSample,
    *,
    steps: int = 30,
    learning_rate: float = 0.2,
    max_queries: int = 4096,
    seed: int = 0,
) -> DarkParameters:
    """Lowers the divergence of attention maps over the geometry and the weight of each feature.

    Keeps the dark form. What it finds belongs to the draw it was given: geometry and weights make
    up for that very W, and part of the gain goes when W is drawn anew.
    """
    hat = dark.geometry.shape[1] ** -0.25
    w, b, c = dark.projection, dark.query_shift, dark.key_shift

    def log_features(p: Arrays, part: Attended) -> tuple[np.ndarray, np.ndarray, Pullback]:
        x, y, geometry = hat * part.query - b, hat * part.key - c, p["geometry"]
        my = y @ geometry.T
        norm = 0.5 * np.sum(my**2, axis=1) - y @ b

        def pullback(by_query: np.ndarray, by_key: np.ndarray) -> Arrays:
            by_logits = w.T @ (by_query.T @ x + by_key.T @ y)
            by_norm = geometry @ ((y * by_key.sum(axis=1)[:, None]).T @ y)
            return {"geometry": by_logits - by_norm, "log_weight": 2 * by_key.sum(axis=0)}

        log_key = my @ w.T - norm[:, None] + 2 * p["log_weight"]
        return x @ geometry.T @ w.T, log_key, pullback

    parts = sequences(sample, max_queries, seed)
    start = {"geometry": dark.geometry, "log_weight": dark.log_weight}
    rates = {
        "geometry": learning_rate * _rms(dark.geometry),
        "log_weight": 0.5 * learning_rate,  # it counts twice
    }
    return dark._replace(**_adam(_gradient(log_features, parts), start, rates, steps))


def best_draw(
    draw: Callable[[], DarkParameters],
    sample: HeadSample,
    *,
    draws: int = 8,
    max_queries: int = 1024,
    seed: int = 0,
) -> DarkParameters:
    """Of some draws the one whose attention maps diverge least from the exact ones."""
    parts = sequences(sample, max_queries, seed)
    targets = [exact_weights(part) for part in parts]

    def divergence(dark: DarkParameters) -> float:
        found = [feature_weights(fold_dark(dark), part) for part in parts]
        return -sum(
            float(np.sum(target * np.log(np.maximum(weights, TINY))))
            for target, weights in zip(targets, found, strict=True)
        )

    return min((draw() for _ in range(draws)), key=divergence)


def _gradient(log_features: LogFeatures, parts: Sequence[Attended]) -> Gradient:
    """The mean divergence of attention maps as a function of parameters, with its gradient."""
    targets = [exact_weights(part) for part in parts]
    num_queries = sum(len(part.query) for part in parts)

    def gradient(p: Arrays) -> tuple[float, Arrays]:
        loss, slopes = 0.0, {name: np.zeros_like(value) for name, value in p.items()}
        for part, target in zip(parts, targets, strict=True):
            log_query, log_key, pullback = log_features(p, part)
            value, *by_both = attention_divergence(log_query, log_key, target, part.visible)
            loss += value / num_queries
            for name, slope in pullback(*by_both).items():
                slopes[name] += slope / num_queries
        return loss, slopes

    return gradient


def _adam(
    gradient: Gradient, start: Arrays, rates: Mapping[str, float], steps: int
) -> dict[str, np.ndarray]:
    """Adam with a cosine schedule; the best point seen, which may be the start."""
    first_decay, second_decay = 0.9, 0.95
    now, best, best_loss = dict(start), dict(start), np.inf
    first = {name: np.zeros_like(value) for name, value in start.items()}
    second = {name: np.zeros_like(value) for name, value in start.items()}
    for step in range(steps + 1):
        loss, slopes = gradient(now)
        if not np.isfinite(loss):
            break
        if loss < best_loss:
            best, best_loss = dict(now), loss
        rate = 0.5 * (1 + np.cos(np.pi * step / max(steps, 1)))
        for name, slope in slopes.items():
            first[name] = first_decay * first[name] + (1 - first_decay) * slope
            second[name] = second_decay * second[name] + (1 - second_decay) * slope**2
            mean = first[name] / (1 - first_decay ** (step + 1))
            spread = np.sqrt(second[name] / (1 - second_decay ** (step + 1)))
            now[name] = now[name] - rate * rates[name] * mean / (spread + 1e-12)
    return best


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))
