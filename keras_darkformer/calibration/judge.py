"""Held-out errors, and what is chosen by them."""

from collections.abc import Callable, Sequence

import numpy as np

from keras_darkformer.calibration.projections import Projections
from keras_darkformer.calibration.sequences import Attended, exact_weights, feature_weights, pieces


def output_errors(
    projections: Projections,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray | None = None,
    *,
    query_mask: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    causal: bool = False,
) -> np.ndarray:
    """`|out_features - out_exact| / |out_exact|` of every query that counts, one flat array.

    Without values, keys centred over each sequence stand in for them.
    """
    errors = []
    for row, q, k, visible, seen in pieces(query, key, query_mask, key_mask, causal):
        v = k - k.mean(axis=0) if value is None else value[row, seen].astype("float64")
        exact = exact_weights(Attended(q, k, visible)) @ v
        error = np.linalg.norm(feature_weights(projections, q, k, visible) @ v - exact, axis=-1)
        errors.append(error / np.maximum(np.linalg.norm(exact, axis=-1), 1e-30))
    return np.concatenate(errors) if errors else np.zeros(0)


Fold = tuple[np.ndarray, np.ndarray]

Fit = Callable[..., Projections]


def sequence_folds(b: int, t: int) -> list[Fold]:
    """Two folds of `(calibrated, judged)` masks `(b, t)`: every other sequence."""
    if b == 1:
        return position_folds(b, t, blocks=2)
    even = np.broadcast_to((np.arange(b) % 2 == 0)[:, None], (b, t))
    return [(even, ~even), (~even, even)]


def position_folds(b: int, t: int, blocks: int = 4) -> list[Fold]:
    """Two folds of `(calibrated, judged)` masks `(b, t)` that share no position.

    Positions are cut into contiguous blocks, taken in turn; with several sequences, what is judged
    also lies in other sequences than what is calibrated on. Features that merely remember positions
    lose here.
    """
    block = np.arange(t) * min(blocks, t) // t
    even = np.broadcast_to(block % 2 == 0, (b, t))
    if b == 1:
        return [(even, ~even), (~even, even)]
    first = (np.arange(b) % 2 == 0)[:, None]
    return [(even & first, ~even & ~first), (~even & first, even & ~first)]


def held_out_error(
    fit: Fit,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray | None = None,
    *,
    folds: Sequence[Fold],
    query_mask: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    causal: bool = False,
) -> float:
    """Median error on the judged part of every fold of features fitted on its other part.

    Needs as many queries as keys. A fold's mask holds for both, so judged queries meet judged keys.

    Args:
        fit: `fit(query, key, query_mask, key_mask)` returns `Projections`.
        folds: of `sequence_folds` or `position_folds`.
    """
    errors = []
    for calibrated, judged in folds:
        masks = [
            [part if mask is None else part & mask for mask in (query_mask, key_mask)]
            for part in (calibrated, judged)
        ]
        if not all(mask.any() for pair in masks for mask in pair):
            continue
        found = fit(query, key, *masks[0])
        query_seen, key_seen = masks[1]
        errors.append(
            output_errors(
                found, query, key, value, query_mask=query_seen, key_mask=key_seen, causal=causal
            )
        )
    return float(np.median(np.concatenate(errors))) if errors else np.inf


def adaptive_budget(errors: np.ndarray, sizes: Sequence[int], total: int) -> np.ndarray:
    """Features per head, `total` at most, by the gain per feature that each head has shown.

    Args:
        errors: held-out error of every head at every size, of shape `(heads, len(sizes))`.
        sizes: numbers of features, rising.
        total: features of all heads together, at least `heads * sizes[0]`.

    Returns:
        The size of every head. Leaps over sizes are allowed, so a head whose error falls late is
        not left behind.
    """
    steps = np.asarray(sizes)
    errors = np.minimum.accumulate(np.asarray(errors, "float64"), axis=1)
    if np.any(np.diff(steps) <= 0) or errors.shape[1] != len(steps):
        raise ValueError("`sizes` must rise, with one column of `errors` each.")
    if total < len(errors) * steps[0]:
        raise ValueError(f"`total` must be at least {len(errors) * steps[0]}. Received: {total}")
    chosen = np.zeros(len(errors), int)
    while True:
        heads = np.arange(len(errors))
        cost = steps[None, :] - steps[chosen][:, None]
        gain = errors[heads, chosen][:, None] - errors
        spare = total - steps[chosen].sum()
        rate = np.where((cost > 0) & (cost <= spare), gain / np.maximum(cost, 1), 0)
        head, size = np.unravel_index(np.argmax(rate), rate.shape)
        if rate[head, size] <= 0:
            return steps[chosen]
        chosen[head] = size
