"""Errors of features on data that they were not fitted to."""

from collections.abc import Callable, Sequence

import numpy as np

from keras_darkformer.fitting.projections import Projections
from keras_darkformer.fitting.sequences import HeadSample, exact_weights, feature_weights, split

# Masks `(b, t)` of what features are fitted to and of what they are judged on.
Fold = tuple[np.ndarray, np.ndarray]


def output_errors(projections: Projections, sample: HeadSample) -> np.ndarray:
    """`|out_features - out_exact| / |out_exact|` of every query that counts, as a flat array.

    Keys centred over each sequence stand in for the values.
    """
    errors = []
    for part in split(sample):
        value = part.key - part.key.mean(axis=0)
        exact = exact_weights(part) @ value
        error = np.linalg.norm(feature_weights(projections, part) @ value - exact, axis=-1)
        errors.append(error / np.maximum(np.linalg.norm(exact, axis=-1), 1e-30))
    return np.concatenate(errors) if errors else np.zeros(0)


def sequence_folds(b: int, t: int) -> list[Fold]:
    """Two folds of `(calibrated, judged)` masks `(b, t)`: every other sequence."""
    if b == 1:
        return position_folds(b, t, blocks=2)
    even = np.broadcast_to((np.arange(b) % 2 == 0)[:, None], (b, t))
    return [(even, ~even), (~even, even)]


def position_folds(b: int, t: int, blocks: int = 4) -> list[Fold]:
    """Two folds of `(calibrated, judged)` masks `(b, t)` that share no position.

    Positions are cut into contiguous blocks, which go to the folds in turn. With several sequences,
    the judged part also lies in other sequences than the calibrated part. Features that merely
    remember positions do badly here.
    """
    block = np.arange(t) * min(blocks, t) // t
    even = np.broadcast_to(block % 2 == 0, (b, t))
    if b == 1:
        return [(even, ~even), (~even, even)]
    first = (np.arange(b) % 2 == 0)[:, None]
    return [(even & first, ~even & ~first), (~even & first, even & ~first)]


def held_out_error(
    fit_part: Callable[[HeadSample], Projections], sample: HeadSample, folds: Sequence[Fold]
) -> float:
    """Median error, over the folds, on the judged part of features fitted to the other part.

    There must be as many queries as keys. A fold's mask is used for both, so judged queries meet
    judged keys.
    """
    errors = []
    for fold in folds:
        calibrated, judged = map(sample.where, fold)
        if not (calibrated.is_empty or judged.is_empty):
            errors.append(output_errors(fit_part(calibrated), judged))
    return float(np.median(np.concatenate(errors))) if errors else np.inf
