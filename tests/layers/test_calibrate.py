"""`FeatureMap.calibrate`: every method on every kind of data, good and bad."""

import functools
import warnings

import numpy as np
import pytest
from backends import on_one_backend
from fitting.data import anisotropic
from keras import ops

from keras_darkformer import DarkFeatureMap
from keras_darkformer.fitting import METHODS
from keras_darkformer.layers import ExponentialFeatureMap

from .helpers import arrays, assert_close, differ, normal

HEADS, HEAD_DIM, FEATURES = 2, 8, 16
SHAPE = (4, 24, HEADS, HEAD_DIM)
methods = pytest.mark.parametrize("method", METHODS)
DARK_METHODS = ("identity", "scale", "whitening", "spectral")


@functools.lru_cache
def data(length=24, groups=1, seed=0, scale=0.7):
    heads = (groups * HEADS, HEADS)
    return anisotropic(length=length, heads=heads, head_dim=HEAD_DIM, seed=seed, scale=scale)


def feature_map(method="spectral", **options):
    """A map of the class that the method makes; of `"auto"` the one that it makes most often."""
    cls = ExponentialFeatureMap if method == "clusters" else DarkFeatureMap
    return cls(HEADS, HEAD_DIM, **{"num_features": FEATURES, "seed": 0} | options)


def calibrated(query, key, map_options=None, method="spectral", **options):
    layer = feature_map(method, **map_options or {})
    try:
        layer.calibrate(query, key, method=method, **options)
    except ValueError as error:
        if method != "auto" or "of another class" not in str(error):
            raise
        layer = feature_map("clusters", **map_options or {})
        layer.calibrate(query, key, method=method, **options)
    return layer


def attend(layer, query, key, value, causal=False):
    """By the map's scores, in NumPy; that `attend` agrees with them is tested beside it."""
    scores = arrays(layer.log_scores(query, key)).astype("float64")
    return weighted(scores, value, causal)


def exact_attention(query, key, value, causal=False):
    groups = query.shape[2] // key.shape[2]
    scores = np.einsum("btnh,bsnh->bnts", query, np.repeat(key, groups, axis=2))
    return weighted(scores.astype("float64") / HEAD_DIM**0.5, value, causal)


def softmax(logits, visible=None):
    if visible is not None:
        logits = np.where(visible, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def weighted(scores, value, causal):
    visible = np.tri(*scores.shape[2:], dtype=bool) if causal else None
    value = np.repeat(value, scores.shape[1] // value.shape[2], axis=2)
    return np.einsum("bnts,bsnv->btnv", softmax(scores, visible), value)


def assert_finite(layer, query, key):
    for weight in layer.weights:
        assert np.isfinite(arrays(weight)).all(), weight.name
    assert np.isfinite(arrays(layer.attend(query, key, key))).all()


def output_error(layer, query, key, causal=False):
    """Median relative error of the output against softmax's, for centred keys as values."""
    value = key - key.mean(axis=1, keepdims=True)
    exact = exact_attention(query, key, value, causal)
    error = np.linalg.norm(attend(layer, query, key, value, causal) - exact, axis=-1)
    return np.median(error / np.maximum(np.linalg.norm(exact, axis=-1), 1e-9))


# What it makes of good data.


@methods
@pytest.mark.parametrize("refine", [True, False], ids=["refined", "closed-form"])
def test_every_method_fits_grouped_causal_and_masked_data(method, refine):
    query, key = data(groups=2)
    mask = np.arange(24) < np.array([[24], [10], [17], [24]])
    for options in ({"causal": True}, {"query_mask": mask, "key_mask": mask}):
        layer = calibrated(query, key, method=method, refine=refine, **options)
        assert_finite(layer, query, key)
        error = output_error(layer, query, key, causal="causal" in options)
        assert error < (2.0 if method in ("identity", "whitening") else 1.0)
        if method in DARK_METHODS:
            plain = {"proposal": 1, "log_weight": 0, "query_shift": 0, "key_shift": 0}
            moved = [np.any(arrays(getattr(layer, x)) != value) for x, value in plain.items()]
            assert moved == [method not in ("identity", "whitening")] * 4


@methods
def test_what_is_masked_has_no_say(method):
    query, key = data(groups=2)
    mask = np.arange(24) < np.array([[24], [10], [17], [24]])
    masks = {"query_mask": mask, "key_mask": mask}
    holes = [np.where(mask[:, :, None, None], x, np.float32(np.nan)) for x in (query, key)]
    clean = calibrated(query, key, method=method, **masks)
    assert_close(calibrated(*holes, method=method, **masks).get_weights(), clean.get_weights())


@on_one_backend
@methods
def test_one_seed_gives_one_fit_and_heads_differ(method):
    query, key = data()
    first, again, other = (
        calibrated(query, key, method=method, seed=seed).get_weights() for seed in (1, 1, 2)
    )
    assert_close(first, again, 0.0)
    assert differ(first[-1], other[-1]) or differ(first[1], other[1])
    assert differ(*first[1])


@on_one_backend
def test_errors_of_other_data_fall_from_identity_to_spectral_to_refined_to_clusters():
    query, key = data(length=48)
    unseen = data(length=48, seed=1)[0], data(length=48, seed=1)[1]
    mean = np.mean(arrays(key), axis=(0, 1)) - np.mean(arrays(unseen[1]), axis=(0, 1))
    unseen = unseen[0], (unseen[1] + mean).astype("float32")

    def error(**options):
        found = [
            output_error(calibrated(query, key, causal=True, seed=seed, **options), *unseen, True)
            for seed in range(3)
        ]
        return np.mean(found)

    identity = error(method="identity")
    spectral = error(method="spectral", refine=False)
    refined = error(method="spectral")
    assert spectral < 0.9 * identity
    assert refined < 0.9 * spectral
    assert error(method="clusters") < 0.9 * identity
    assert error(method="auto") < 0.9 * identity


@pytest.mark.parametrize("center", [True, False])
def test_centring_takes_means_off_and_puts_them_back(center):
    query, key = data(scale=0.3)
    layer = feature_map()
    layer.calibrate(query, key, method="identity", proposal="spectral", center=center)
    b, c = arrays([layer.query_shift, layer.key_shift])
    hat = HEAD_DIM**-0.25
    means = [hat * np.mean(x.astype("float64"), axis=(0, 1)) for x in (query, key)]
    assert_close([b, c], means if center else [np.zeros_like(m) for m in means])
    far = 12.0 + key
    for x in (key, far):
        layer = feature_map(num_features=2048)
        layer.calibrate(query, x, method="identity", proposal="spectral", center=True)
        assert output_error(layer, query, x) < 0.15


def test_geometries_of_their_own_start_as_one_and_can_part():
    query, key = data()
    layer = calibrated(query, key, {"tie_geometry": False})
    tied = calibrated(query, key)
    assert_close(layer.query_geometry, layer.geometry)
    expected = tied.attend(query, key, key)
    assert_close(layer.attend(query, key, key), expected)
    layer.query_geometry.assign(arrays(layer.query_geometry) + 0.2)
    assert differ(layer.attend(query, key, key), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "spectral", "proposal": "none", "center": False},
        {"method": "spectral", "proposal": "none"},
        {"method": "spectral", "center": False},
        {"method": "clusters"},
    ],
    ids=str,
)
def test_refining_takes_the_error_of_the_map_down(options):
    """... of the map, not of what its weights are rounded or reduced to."""
    query, key = data()

    def divergence(refine):
        layer = calibrated(query, key, refine=refine, **options)
        scores = arrays(layer.log_scores(query, key)).astype("float64")
        logits = np.einsum("btnh,bsnh->bnts", query, key).astype("float64")
        exact = softmax(logits / HEAD_DIM**0.5)
        return np.mean(np.sum(exact * (np.log(exact) - np.log(softmax(scores))), axis=-1))

    assert divergence(True) < divergence(False)
    if options["method"] == "spectral":
        layer = calibrated(query, key, **options | {"proposal": "none"})
        assert arrays(layer.log_weight).any()


# Degenerate data.

X = normal(*SHAPE)
ONES = np.ones(SHAPE, "float32")
DEGENERATE = {
    "constant_keys": (X, ONES),
    "constant_queries": (ONES, X),
    "constant_both": (ONES, 2 * ONES),
    "zeros": (0 * ONES, 0 * ONES),
    "zero_keys": (X, 0 * ONES),
    "few_tokens": (X[:1, :3], X[:1, :3] + 1),
    "a_token": (X[:1, :1], X[:1, :1] + 1),
    "single_tokens": (X[:, :1], X[:, :1] + 1),
    "duplicates": (np.repeat(X[:1, :2], 12, axis=1), np.repeat(X[:1, 2:4], 12, axis=1)),
    "one_direction": (X * np.eye(8, dtype="float32")[0], X * np.eye(8, dtype="float32")[0]),
    "large": (1e3 * X, 1e3 * X[::-1]),
    "huge": (1e8 * X, 1e8 * X[::-1]),
    "tiny": (1e-12 * X, 1e-12 * X[::-1]),
    "far_from_the_origin": (X + 100, X[::-1] - 300),
}


@on_one_backend
@pytest.mark.parametrize("method", [*DARK_METHODS, "clusters"])  # auto: in tests/fitting
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_leave_finite_weights_and_outputs(name, method):
    query, key = DEGENERATE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for causal in (False, True):
            layer = calibrated(query, key, method=method, causal=causal)
    assert_finite(layer, query, key)


@methods
@pytest.mark.parametrize("name", ["query", "key"])
def test_what_is_not_finite_or_masked_altogether_is_refused(name, method):
    for value in (np.nan, np.inf):
        bad = X.copy()
        bad[1, 3, 0, 2] = value
        layer = built(feature_map(method))
        with pytest.raises(ValueError, match=f"`{name}` must be finite"):
            layer.calibrate(**{"query": X, "key": X} | {name: bad}, method=method)
    masks = {f"{name}_mask": np.zeros(SHAPE[:2], bool)}
    with pytest.raises(ValueError, match="masked"):
        layer.calibrate(X, X, method=method, **masks)
    assert_close(layer.get_weights(), built(feature_map(method)).get_weights(), 0.0)


def built(layer):
    layer.build()
    return layer


@pytest.mark.parametrize("method", ["spectral", "identity", "clusters"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": X[:, :, :1]}, "`query`"),
        ({"key": X[..., :4]}, "`key`|`query` and `key`"),
        ({"key": X[0]}, "`key`"),
        ({"key": X[:2]}, "`query` and `key`"),
        ({"query_mask": np.ones((4, 23), bool)}, "`query_mask`"),
        ({"key_mask": np.ones((3, 24), bool)}, "`key_mask`"),
        ({"key_mask": np.ones((4, 24, 1), bool)}, "`key_mask`"),
        ({"max_tokens": 0}, "`max_tokens`"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else None,
)
def test_what_does_not_fit_is_named(arguments, message, method):
    with pytest.raises(ValueError, match=message):
        feature_map(method).calibrate(**{"query": X, "key": X, "method": method} | arguments)


@pytest.mark.parametrize(
    ("options", "map_options", "message"),
    [
        ({"method": "magic"}, {}, "`method` must be one of"),
        ({"proposal": "magic"}, {}, "`proposal` must be one of"),
        ({"method": "clusters", "proposal": "none"}, {}, "`proposal` is for"),
        ({"method": "auto", "proposal": "spectral"}, {}, "`proposal` is for"),
        ({"method": "clusters"}, {"sliding_window": 4}, "`sliding_window`"),
        ({}, {"rope_geometry": "before"}, "keras_darkformer.calibrate"),
    ],
    ids=str,
)
def test_options_that_exclude_each_other_are_refused(options, map_options, message):
    with pytest.raises(ValueError, match=message):
        feature_map(**map_options).calibrate(X, X, **options)


@pytest.mark.parametrize("method", ["clusters", *DARK_METHODS])
def test_a_map_of_the_class_that_another_method_makes_is_refused(method):
    query, key = data()
    layer = built(feature_map("spectral" if method == "clusters" else "clusters"))
    before = layer.get_weights()
    kind = "exponential" if method == "clusters" else "dark"
    own = f"`{layer.name}` is a {type(layer).__name__}"
    with pytest.raises(ValueError, match=f'of another class, `feature_map="{kind}"`; {own}'):
        layer.calibrate(query, key, method=method, refine=False)
    assert_close(layer.get_weights(), before, 0.0)


def test_masks_of_numbers_and_of_one_row_are_masks():
    query, key = data()
    mask = np.arange(24) < 13
    options = {"method": "clusters", "causal": True}
    expected = calibrated(
        query, key, query_mask=np.stack([mask] * 4), key_mask=np.stack([mask] * 4), **options
    )
    for given in (mask[None], np.stack([mask] * 4).astype("int32")):
        found = calibrated(query, key, query_mask=given, key_mask=given, **options)
        assert_close(found.get_weights(), expected.get_weights())


@pytest.mark.parametrize("method", ["spectral", "clusters"])
def test_halves_are_calibrated_on_as_the_numbers_they_are(method):
    half = [ops.cast(x, "bfloat16") for x in data()]
    full = [arrays(ops.cast(x, "float32")) for x in half]
    layer = calibrated(*half, method=method)
    assert_close(layer.get_weights(), calibrated(*full, method=method).get_weights())


def test_only_so_many_tokens_are_refined_on():
    query, key = data()
    weights = [calibrated(query, key, max_tokens=n).get_weights()[0] for n in (24, 10**6)]
    assert differ(*weights)
    assert_finite(calibrated(query, key, max_tokens=1), query, key)
