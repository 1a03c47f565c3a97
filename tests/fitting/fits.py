"""Fits of plain arrays at every place of the geometry, and attention by them."""

import functools

import numpy as np
import pytest

from keras_darkformer.fitting import (
    METHODS,
    AfterRotation,
    BeforeRotation,
    CalibrationOptions,
    LayerStatistics,
    fit_features,
    needs_sample,
)
from keras_darkformer.fitting.projections import DarkParameters, Projections, fold_dark
from keras_darkformer.fitting.sequences import (
    HeadSample,
    exact_weights,
    feature_weights,
    sequences,
)
from keras_darkformer.memory import NO_MEMORY
from keras_darkformer.options import FeatureOptions

from .data import anisotropic, rotated

HEADS, HEAD_DIM, FEATURES, LENGTH = 2, 8, 16, 24
HAT = HEAD_DIM**-0.25
DARK = {"geometry", "projection", "proposal", "log_weight", "query_shift", "key_shift"}
FITTERS = {"after": AfterRotation(), "before": BeforeRotation()}
PAIRS = [(place, method) for place in FITTERS for method in METHODS]
MASK = np.arange(LENGTH) < np.array([[24], [10], [17], [24]])
SHUFFLED = np.arange(HEAD_DIM).reshape(2, -1).T.reshape(-1)  # members of a plane side by side
places = pytest.mark.parametrize("place", FITTERS)
methods = pytest.mark.parametrize(("place", "method"), PAIRS)


@functools.lru_cache
def data(length=LENGTH, groups=1, seed=0, scale=0.7):
    heads = (groups * HEADS, HEADS)
    return anisotropic(length=length, heads=heads, head_dim=HEAD_DIM, seed=seed, scale=scale)


def collected(
    query,
    key,
    place,
    calibration,
    start=0,
    layout=None,
    max_tokens=10_000,
    memory=NO_MEMORY,
    **how,
):
    """What a layer with rotary positions sees; after the rotation it may as well have none."""
    fitter = FITTERS[place]
    seen = LayerStatistics(
        key.shape[2],
        key.shape[3],
        needs_sample=needs_sample(calibration, fitter),
        needs_unrotated=fitter.needs_unrotated,
        max_tokens=max_tokens,
        seed=calibration.seed,
        memory=memory,
    )
    if place == "after":
        seen.update(query, key, **how)
        return seen
    masks = {name: value for name, value in how.items() if name != "causal"}
    seen.probe_layout(lambda vector: rotated(vector[None, None, None], 0, layout)[0, 0, 0])
    seen.update(*(rotated(x, start, layout) for x in (query, key)), **how)
    seen.update_unrotated(query, key, **masks)
    return seen


def fitted(query, key, place="after", features=None, how=None, **options):
    calibration = CalibrationOptions(**options)
    seen = collected(query, key, place, calibration, **how or {})
    features = FeatureOptions(num_features=FEATURES) if features is None else features
    return fit_features(seen, features, calibration, FITTERS[place])


def moved(x, fit, place):
    """What the features of a fit see of keys `(b, s, k, h)`, or of queries of as many heads."""
    if fit.kind == "exponential" or place == "after":
        return x if place == "after" else rotated(x)
    return rotated(np.einsum("krh,bskh->bskr", fit.weights["geometry"], x))


def folded_head(fit, head, place="after"):
    """The features of what a head sees: around a rotation the geometry has been applied."""
    if fit.kind == "exponential":
        names = ("query_kernel", "key_kernel", "key_bias")
        return Projections(*(fit.weights[name][head] for name in names))
    dark = DarkParameters(*(fit.weights[name][head] for name in DarkParameters._fields))
    return fold_dark(dark if place == "after" else dark._replace(geometry=np.eye(HEAD_DIM)))


def weights_of(query, key, fit, place="after", causal=False):
    """Attention of a fit and of softmax, head by head and sequence by sequence."""
    query = query.reshape(*query.shape[:2], HEADS, -1, HEAD_DIM)
    rows = []
    for head in range(HEADS):
        folded = folded_head(fit, head, place)
        ours, exact = [], []
        for group in range(query.shape[3]):
            x = query[:, :, :, group]
            given = (moved(x, fit, place), moved(key, fit, place))
            plain = (x, key) if place == "after" else (rotated(x), rotated(key))
            for pair, into in ((given, ours), (plain, exact)):
                sample = HeadSample(pair[0][:, :, head, None], pair[1][:, :, head], causal=causal)
                into.extend(sequences(sample))
        rows += [
            (feature_weights(folded, one), exact_weights(two), two.key)
            for one, two in zip(ours, exact, strict=True)
        ]
    return rows


def output_error(*arguments, **options):
    """Median relative error of the output against softmax's, for centred keys as values."""
    errors = []
    for ours, exact, key in weights_of(*arguments, **options):
        value = key - key.mean(axis=0)
        size = np.linalg.norm(exact @ value, axis=-1)
        errors.append(np.linalg.norm((ours - exact) @ value, axis=-1) / np.maximum(size, 1e-9))
    return np.median(np.concatenate(errors))


def divergence(*arguments):
    """Mean KL from softmax's attention maps to those of a fit."""
    total = []
    for ours, exact, _ in weights_of(*arguments):
        ours, exact = np.maximum(ours, 1e-300), np.maximum(exact, 1e-300)
        total.append(np.sum(exact * np.log(exact / ours), axis=1))
    return np.mean(np.concatenate(total))


def assert_fit(fit):
    assert {x.dtype for x in fit.weights.values()} == {np.dtype("float64")}
    assert all(np.isfinite(x).all() for x in fit.weights.values())
    if fit.kind == "exponential":
        shapes = dict.fromkeys(("query_kernel", "key_kernel"), (HEADS, HEAD_DIM, FEATURES))
        shapes["key_bias"] = (HEADS, FEATURES)
        assert {name: x.shape for name, x in fit.weights.items()} == shapes
        return
    assert fit.kind == "dark"
    assert set(fit.weights) == DARK | {"query_geometry"}
    rank = fit.weights["proposal"].shape[1]
    assert fit.weights["geometry"].shape == (HEADS, rank, HEAD_DIM)
    assert fit.weights["projection"].shape == (HEADS, FEATURES, rank)
    assert fit.weights["log_weight"].shape == (HEADS, FEATURES)
    for name in ("query_shift", "key_shift"):
        assert fit.weights[name].shape == (HEADS, HEAD_DIM)


def assert_same(one, other, **tolerance):
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        np.testing.assert_allclose(value, other.weights[name], err_msg=name, **tolerance)
