"""The two classes of feature maps, calibrated and as they start."""

import keras
import numpy as np
import pytest
from fitting.data import anisotropic
from keras import ops

from keras_darkformer import DarkAttention, DarkFeatureMap
from keras_darkformer.layers import ExponentialFeatureMap, NoFeatureMap
from keras_darkformer.ops import dark_features, draw_projection

from .helpers import (
    FEATURE_OPTIONS,
    HEADS,
    NO_MEMORY,
    WIDTH,
    arrays,
    assert_close,
    assert_config_is_complete,
    call,
    differ,
    dtypes,
    normal,
)

QUERY, KEY = anisotropic(batch=2, length=12, heads=(4, 2), head_dim=4, scale=0.7)
# Class and calibration: a plain draw; a centred one from a proposal; fitted features.
CASES = {
    "plain": (DarkFeatureMap, {"method": "whitening"}),
    "centred": (DarkFeatureMap, {"method": "spectral", "refine": False}),
    "fitted": (ExponentialFeatureMap, {"method": "clusters", "refine": False}),
}
SHIFTS = ["proposal", "log_weight", "query_shift", "key_shift"]
NAMES = {
    DarkFeatureMap: ["geometry", "projection", *SHIFTS],
    ExponentialFeatureMap: ["query_kernel", "key_kernel", "key_bias"],
}
DARK = ["plain", "centred"]
cases = pytest.mark.parametrize("case", CASES)


def feature_map(case="plain", **options):
    layer = CASES[case][0](2, 4, **{"num_features": 8, "seed": 0} | options)
    layer.build()
    return layer


def calibrated(case, **options):
    layer = feature_map(case, **options)
    causal = bool(layer.memory)
    layer.calibrate(QUERY, KEY, causal=causal, **CASES[case][1])
    return layer


def names(weights):
    return [weight.name for weight in weights]


def test_a_map_calibrated_again_is_as_if_it_had_not_been_before():
    layer = feature_map()
    for case in ("centred", "plain", "centred"):
        layer.calibrate(QUERY, KEY, **CASES[case][1])
        assert names(layer.weights) == ["geometry", *NAMES[DarkFeatureMap][1:]]
        assert names(layer.trainable_weights) == ["geometry"]
        assert_close(layer.get_weights(), calibrated(case).get_weights())
        plain = {"proposal": 1, "log_weight": 0, "query_shift": 0, "key_shift": 0}
        moved = [np.any(arrays(getattr(layer, name)) != value) for name, value in plain.items()]
        assert moved == [case == "centred"] * 4
    layer.redraw(seed=0)  # from the proposal


@pytest.mark.parametrize("kind", ["orthogonal", "antithetic"])
def test_exponential_features_start_as_random_ones_without_their_norm(kind):
    layer = feature_map("fitted", projection=kind, geometry_scale=0.5)
    rng = np.random.default_rng(0)
    drawn = np.stack([draw_projection(8, 4, kind=kind, seed=rng) for _ in range(2)])
    logits = 0.5 * 4**-0.25 * np.einsum("btkh,kmh->btkm", KEY, drawn)
    for keys in (False, True):
        assert_close(layer(KEY, keys=keys), np.exp(logits))
    if kind == "antithetic":  # Hedgehog's
        kernel = arrays(layer.query_kernel)
        pairs = np.sort(np.concatenate([kernel, -kernel], axis=2), axis=2)
        assert_close(pairs[:, :, ::2], pairs[:, :, 1::2])


@pytest.mark.parametrize("cls", [DarkFeatureMap, ExponentialFeatureMap])
def test_a_map_is_of_its_class_only(cls):
    own, other = cls.kind, {"dark": "exponential", "exponential": "dark"}[cls.kind]
    assert cls(2, 4).get_config()["feature_map"] == own
    with pytest.raises(ValueError, match=f'`{cls.__name__}` is `feature_map="{own}"`.*{other}'):
        cls(2, 4, feature_map=other)
    with pytest.raises(ValueError, match="`feature_map` must be one of"):
        cls(2, 4, feature_map="fixed")


def test_the_config_of_an_exponential_map_holds_every_argument():
    sizes = {"num_heads": 3, "head_dim": 6, "num_query_heads": 6}
    options = FEATURE_OPTIONS | NO_MEMORY | {"rope_geometry": "before"}
    del options["feature_map"]  # the class says it
    assert_config_is_complete(ExponentialFeatureMap, sizes | options, but=tuple(NO_MEMORY))


def test_an_exponential_map_has_no_window():
    with pytest.raises(ValueError, match=r'Features of `feature_map="exponential".*=3'):
        feature_map("fitted", sliding_window=3)


@cases
@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, ["geometry"]),
        ({"train_geometry": False}, []),
        ({"train_geometry": False, "train_projection": True}, ["projection"]),
        ({"tie_geometry": False}, ["geometry", "query_geometry"]),
        ({"trainable": False}, []),
    ],
    ids=str,
)
def test_what_is_trained_is_what_the_arguments_say(options, trained, case):
    layer = calibrated(case, **options)
    fitted = NAMES[ExponentialFeatureMap]
    if case == "fitted":
        trained = fitted if trained else []
    assert names(layer.trainable_weights) == trained
    layer.trainable = True
    if "trainable" in options:
        expected = fitted if case == "fitted" else ["geometry"]
        assert names(layer.trainable_weights) == expected


@cases
def test_config_and_weights_restore_a_calibrated_map(case):
    layer = calibrated(case)
    restored = type(layer).from_config(layer.get_config())
    restored.build()
    assert names(restored.weights) == names(layer.weights)
    restored.set_weights(layer.get_weights())
    for x, keys in ((QUERY[:, :, :2], False), (KEY, True)):
        assert_close(restored(x, keys=keys), layer(x, keys=keys))
    assert_close(restored.attend(QUERY, KEY, KEY), layer.attend(QUERY, KEY, KEY))


def test_calls_give_the_features_of_the_weights():
    layer = calibrated("centred", tie_geometry=False)
    layer.query_geometry.assign(arrays(layer.query_geometry) + 0.1)
    weights = {name: arrays(getattr(layer, name)) for name in ("geometry", "projection", *SHIFTS)}
    options = {"log_weight": weights["log_weight"]}
    query, shift = QUERY[:, :, :2], weights["query_shift"]
    expected = dark_features(
        query, arrays(layer.query_geometry), weights["projection"], shift=shift, **options
    )
    assert_close(layer(query), expected)
    options |= {"shift": weights["key_shift"], "tilt": shift}
    expected = dark_features(KEY, weights["geometry"], weights["projection"], **options)
    assert_close(layer(KEY, keys=True), expected)

    layer = calibrated("fitted")
    query_kernel, key_kernel, bias = arrays(layer.weights)
    assert_close(layer(query), np.exp(np.einsum("btkh,khm->btkm", query, query_kernel)), 1e-4)
    expected = np.exp(np.einsum("btkh,khm->btkm", KEY, key_kernel) + bias)
    assert_close(layer(KEY, keys=True), expected, 1e-4)
    of_dark_maps = (*NAMES[DarkFeatureMap], "covariance", "matrix")
    assert not any(hasattr(layer, name) for name in of_dark_maps)
    assert_close(layer.exact_query(query), query, 0.0)
    assert_close(layer.before_rotation(query), query, 0.0)


@cases
def test_features_scores_and_attention_agree(case):
    """`call`, `log_scores`, `attend` and its state are four ways to say one thing."""
    layer = calibrated(case)
    value = normal(*KEY.shape, seed=3)
    phi_k = arrays(layer(KEY, keys=True))
    phi_q = np.concatenate([arrays(layer(QUERY[:, :, [i, i + 2]])) for i in range(2)], axis=2)
    phi_q = phi_q[:, :, [0, 2, 1, 3]]  # back to heads in order
    products = np.einsum("btnm,bsnm->bnts", phi_q, np.repeat(phi_k, 2, axis=2))
    weights = products / products.sum(axis=-1, keepdims=True)
    scores = arrays(layer.log_scores(QUERY, KEY)).astype("float64")
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    assert_close(scores / scores.sum(axis=-1, keepdims=True), weights.astype("float64"), 1e-4)
    output = np.einsum("bnts,bsnv->btnv", weights, np.repeat(value, 2, axis=2))
    assert_close(layer.attend(QUERY, KEY, value), output, 1e-4)
    _, state = layer.attend(QUERY, KEY[:, :5], value[:, :5], return_state=True)
    found = layer.attend(QUERY, KEY[:, 5:], value[:, 5:], initial_state=state)
    assert_close(found, output, 1e-4)


def test_redraw_of_a_centred_map_keeps_all_but_the_draw_and_its_weight():
    layer = calibrated("centred")
    before = dict(zip(names(layer.weights), arrays(layer.weights), strict=True))
    layer.redraw(seed=3)
    after = dict(zip(names(layer.weights), arrays(layer.weights), strict=True))
    changed = {name for name in before if differ(before[name], after[name])}
    assert changed == {"projection", "log_weight"}


def test_redraw_of_a_fitted_map_is_refused():
    layer = calibrated("fitted")
    before = arrays(layer.weights)
    with pytest.raises(ValueError, match="fitted to data, not drawn"):
        layer.redraw(seed=1)
    assert_close(arrays(layer.weights), before)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
@cases
def test_calibrated_weights_and_features_are_float32_under_every_policy(case, policy):
    plain, layer = calibrated(case), calibrated(case, dtype=policy)
    assert dtypes([*layer.weights, layer(KEY, keys=True)]) == {"float32"}
    assert_close(arrays(layer.weights), arrays(plain.weights))
    half = [ops.cast(x, layer.compute_dtype) for x in (QUERY, KEY)]
    output, state = layer.attend(*half, half[1], return_state=True)
    assert dtypes(output) == dtypes(layer.exact_query(half[0])) == {layer.compute_dtype}
    assert dtypes(state) == {"float32"}
    rounded = [ops.cast(x, "float32") for x in half]
    expected = plain.attend(*rounded, rounded[1])
    assert_close(ops.cast(output, "float32"), expected, 0.02)
    exact = ops.cast(layer.exact_query(half[0]), "float32")
    assert_close(exact, plain.exact_query(rounded[0]), 0.02)


# Exact mode.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", DARK)
def test_softmax_of_the_exact_query_is_the_kernel(case, tied):
    layer = calibrated(case, tie_geometry=tied)
    if not tied:
        layer.query_geometry.assign(arrays(layer.query_geometry) + 0.3 * normal(2, 4, 4))
    hat = 4**-0.25
    moved = arrays(layer.exact_query(QUERY)).astype("float64")
    m_k = arrays(layer.geometry)
    m_q = m_k if tied else arrays(layer.query_geometry)
    b, c = arrays([layer.query_shift, layer.key_shift])
    assert b.any() == c.any() == (case == "centred")
    for head in range(4):
        k = head // 2
        x, y = hat * QUERY[:, :, head] - b[k], hat * KEY[:, :, k] - c[k]
        logits = np.einsum("btr,bsr->bts", x @ m_q[k].T, y @ m_k[k].T)
        logits = logits + (hat * KEY[:, :, k] @ b[k])[:, None]
        found = np.einsum("bth,bsh->bts", moved[:, :, head], KEY[:, :, k]) / 2
        for z in (logits, found):
            z -= z.max(axis=-1, keepdims=True)
        kernel, weights = np.exp(logits), np.exp(found)
        assert_close(
            weights / weights.sum(axis=-1, keepdims=True),
            (kernel / kernel.sum(axis=-1, keepdims=True)).astype("float64"),
            1e-4,
        )


def test_exact_mode_of_a_calibrated_layer_is_what_its_features_estimate():
    x = 0.5 * normal(2, 12, WIDTH)
    linear, exact = (
        DarkAttention(
            **HEADS | {"num_features": 4096},
            seed=0,
            attention_mode=mode,
        )
        for mode in ("linear", "exact")
    )
    small = calibrated("centred")  # damped as for few features
    for layer in (linear, exact):
        layer.build(x.shape, x.shape)
    for name in ("geometry", "proposal", "query_shift", "key_shift"):
        getattr(linear.feature_map, name).assign(getattr(small, name))
    linear.feature_map.redraw(seed=1)
    exact.set_weights(linear.get_weights())
    expected = arrays(call(exact, x, x))
    values = np.repeat(arrays(exact.value_dense(x)), 2, axis=2)
    uniform = arrays(exact.output_dense(values.mean(axis=1, keepdims=True)))
    error = np.abs(arrays(call(linear, x, x)) - expected).max()
    assert error < 0.2 * np.abs(uniform - expected).max()


def test_a_map_without_features_has_none_to_return():
    layer = NoFeatureMap(2, 4, sliding_window=3)
    for inputs in (KEY, keras.KerasTensor(KEY.shape)):
        with pytest.raises(ValueError, match="has no features to return"):
            layer(inputs)
    assert not layer.weights
