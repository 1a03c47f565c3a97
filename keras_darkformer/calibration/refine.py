"""Descent on the divergence of attention maps, from what closed forms found."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from keras_darkformer.calibration.projections import DarkParameters, Projections, fold_dark
from keras_darkformer.calibration.sequences import exact_weights, feature_weights, samples

MAX_RATIO = 1e4  # bound on p / p_features in the descent, where features miss a key entirely


def attention_divergence(
    log_query: np.ndarray,
    log_key: np.ndarray,
    target: np.ndarray,
    visible: np.ndarray | None = None,
) -> tuple[float, np.ndarray, np.ndarray]:
    """KL from exact attention maps to those of features, summed over queries, and its gradient.

    Args:
        log_query: `log phi_q`, of shape `(i, m)`.
        log_key: `log phi_k`, of shape `(s, m)`.
        target: exact weights, of shape `(i, s)`.
        visible: optional, of shape `(i, s)`.

    Returns:
        `(divergence, gradient (i, m), gradient (s, m))` by the log-features.
    """
    peak = log_key.max(axis=0)
    key = np.exp(log_key - peak)
    log_query = log_query + peak
    query = np.exp(log_query - log_query.max(axis=1, keepdims=True))
    weights = query @ key.T
    if visible is not None:
        weights = np.where(visible, weights, 0)
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)
    query, weights = query / total, np.maximum(weights / total, 1e-300)
    excess = 1 - np.minimum(target / weights, MAX_RATIO)
    if visible is not None:
        excess = np.where(visible, excess, 0)
    tiny = 1e-300
    divergence = np.sum(target * np.log(np.maximum(target, tiny) / weights))
    return float(divergence), query * (excess @ key), key * (excess.T @ query)


def refine_clusters(
    projections: Projections,
    query: np.ndarray,
    key: np.ndarray,
    *,
    query_mask: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    causal: bool = False,
    steps: int = 30,
    learning_rate: float = 0.03,
    max_queries: int = 4096,
    seed: int = 0,
) -> Projections:
    """Lowers the divergence of attention maps by a few steps over all that `clusters` returns.

    For projections without a norm. Returns the projections given if the descent went nowhere.
    """
    parts = samples(query, key, query_mask, key_mask, causal, max_queries, seed)
    # Centred, so that the kernels and the bias are near independent.
    b = np.concatenate([part.query for part in parts]).mean(axis=0)
    c = np.concatenate([part.key for part in parts]).mean(axis=0)
    query_kernel, key_kernel, bias, _ = projections
    shift = (b @ query_kernel) + (c @ key_kernel)
    centred = [(part.query - b, part.key - c) for part in parts]
    targets = [exact_weights(part) for part in parts]
    num_queries = sum(len(part.query) for part in parts)

    def gradient(p: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        loss, slopes = 0.0, {name: np.zeros_like(value) for name, value in p.items()}
        for (x, y), target, part in zip(centred, targets, parts, strict=True):
            value, by_query, by_key = attention_divergence(
                x @ p["query"], y @ p["key"] + p["bias"], target, part.visible
            )
            loss += value / num_queries
            slopes["query"] += x.T @ by_query / num_queries
            slopes["key"] += y.T @ by_key / num_queries
            slopes["bias"] += by_key.sum(axis=0) / num_queries
        return loss, slopes

    start = {"query": query_kernel, "key": key_kernel, "bias": bias + shift}
    rates = {
        "query": learning_rate * _rms(query_kernel),
        # The part all features share is the mean query: it says nothing of their spread.
        "key": learning_rate * _rms(key_kernel - key_kernel.mean(axis=1, keepdims=True)),
        "bias": learning_rate,
    }
    found = _adam(gradient, start, rates, steps)
    shift = (b @ found["query"]) + (c @ found["key"])
    return Projections(found["query"], found["key"], found["bias"] - shift)


def refine_dark(
    dark: DarkParameters,
    query: np.ndarray,
    key: np.ndarray,
    *,
    query_mask: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    causal: bool = False,
    steps: int = 30,
    learning_rate: float = 0.2,
    parameters: Sequence[str] = ("geometry", "log_weight"),
    max_queries: int = 4096,
    seed: int = 0,
) -> DarkParameters:
    """Lowers the divergence of attention maps over some fields of `DarkParameters`.

    Keeps the dark form. What it finds belongs to the draw it was given: geometry and weights make
    up for that very W, and part of the gain goes when W is drawn anew.
    """
    parts = samples(query, key, query_mask, key_mask, causal, max_queries, seed)
    hat = dark.geometry.shape[1] ** -0.25
    b, c = dark.query_shift, dark.key_shift
    centred = [(hat * part.query - b, hat * part.key - c) for part in parts]
    targets = [exact_weights(part) for part in parts]
    num_queries = sum(len(part.query) for part in parts)

    def gradient(p: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        now = dark._replace(**p)
        loss, slopes = 0.0, {name: np.zeros_like(value) for name, value in p.items()}
        for (x, y), target, part in zip(centred, targets, parts, strict=True):
            mx, my = x @ now.geometry.T, y @ now.geometry.T
            norm = 0.5 * np.sum(my**2, axis=1) - y @ b
            log_key = my @ now.projection.T - norm[:, None] + 2 * now.log_weight
            value, by_query, by_key = attention_divergence(
                mx @ now.projection.T, log_key, target, part.visible
            )
            loss += value / num_queries
            if "geometry" in p:
                by_norm = now.geometry @ ((y * by_key.sum(axis=1)[:, None]).T @ y)
                by_logits = now.projection.T @ (by_query.T @ x + by_key.T @ y)
                slopes["geometry"] += (by_logits - by_norm) / num_queries
            if "projection" in p:
                slopes["projection"] += (by_query.T @ mx + by_key.T @ my) / num_queries
            if "log_weight" in p:
                slopes["log_weight"] += 2 * by_key.sum(axis=0) / num_queries
        return loss, slopes

    start = {name: getattr(dark, name) for name in parameters}
    rates = {
        "geometry": learning_rate * _rms(dark.geometry),
        "projection": learning_rate * _rms(dark.projection),
        "log_weight": 0.5 * learning_rate,  # it counts twice
    }
    return dark._replace(**_adam(gradient, start, rates, steps))


Gradient = Callable[[Mapping[str, np.ndarray]], tuple[float, dict[str, np.ndarray]]]


def _adam(
    gradient: Gradient, start: Mapping[str, np.ndarray], rates: Mapping[str, float], steps: int
) -> dict[str, np.ndarray]:
    """Adam with a cosine schedule; the best point seen, which may be the start."""
    first_decay, second_decay = 0.9, 0.95
    now = dict(start)
    first = {name: np.zeros_like(value) for name, value in start.items()}
    second = {name: np.zeros_like(value) for name, value in start.items()}
    best, best_loss = dict(start), np.inf
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


def best_draw(
    draw: Callable[[], DarkParameters],
    query: np.ndarray,
    key: np.ndarray,
    *,
    draws: int = 8,
    query_mask: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    causal: bool = False,
    max_queries: int = 1024,
    seed: int = 0,
) -> DarkParameters:
    """Of some draws the one whose attention maps diverge least from the exact ones."""
    parts = samples(query, key, query_mask, key_mask, causal, max_queries, seed)
    targets = [exact_weights(part) for part in parts]

    def divergence(dark: DarkParameters) -> float:
        folded = fold_dark(dark)
        found = (feature_weights(folded, part.query, part.key, part.visible) for part in parts)
        return -sum(
            float(np.sum(target * np.log(np.maximum(weights, 1e-300))))
            for target, weights in zip(targets, found, strict=True)
        )

    return min((draw() for _ in range(draws)), key=divergence)
