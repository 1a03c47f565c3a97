"""A map keeps only the weights of its form, and comes back in it."""

import keras
import numpy as np
import pytest
from calibration.data import anisotropic
from keras import ops

from keras_darkformer import DarkAttention, DarkFeatureMap, DarkTransformerBlock
from keras_darkformer.layers.dark_feature_map import FORMS
from keras_darkformer.ops import dark_features

from .helpers import (
    HEADS,
    LENGTH,
    WIDTH,
    arrays,
    assert_close,
    call,
    differ,
    dtypes,
    normal,
    weight_names,
)

QUERY, KEY = anisotropic(batch=2, length=12, heads=(4, 2), head_dim=4, scale=0.7)
OPTIONS = {
    "random": {"method": "whitening"},
    "centered": {"method": "spectral", "refine": False},
    "free": {"method": "clusters", "refine": False},
}
SHIFTS = ["proposal", "log_weight", "query_shift", "key_shift"]
NAMES = {
    "random": ["geometry", "projection"],
    "centered": ["geometry", "projection", *SHIFTS],
    "free": ["query_kernel", "key_kernel", "key_bias"],
}
forms = pytest.mark.parametrize("form", FORMS)


def feature_map(**options):
    layer = DarkFeatureMap(2, 4, 8, **{"seed": 0} | options)
    layer.build()
    return layer


def calibrated(form, **options):
    layer = feature_map(**options)
    causal = layer.sliding_window is not None
    layer.calibrate(QUERY, KEY, causal=causal, **OPTIONS[form])
    assert layer.form == form
    return layer


def names(weights):
    return [weight.name for weight in weights]


def test_a_map_goes_from_form_to_form_with_the_weights_of_each():
    layer = feature_map()
    for form in ("centered", "free", "random", "free", "centered", "random"):
        layer.calibrate(QUERY, KEY, **OPTIONS[form])
        assert layer.form == form
        assert sorted(names(layer.weights)) == sorted(NAMES[form])
        trained = {"free": NAMES["free"]}.get(form, ["geometry"])
        assert names(layer.trainable_weights) == trained
        assert [hasattr(layer, name) for name in (*SHIFTS, "query_kernel")] == (
            [form == "centered"] * 4 + [form == "free"]
        )
        fresh = calibrated(form)
        assert_close(layer.get_weights(), fresh.get_weights())
        assert dtypes(layer.weights) == {"float32"}


@forms
@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"train_geometry": False}, {"random": [], "centered": [], "free": []}),
        (
            {"train_geometry": False, "train_projection": True},
            {"random": ["projection"], "centered": ["projection"], "free": NAMES["free"]},
        ),
        (
            {"tie_geometry": False},
            {x: ["geometry", "query_geometry"] for x in FORMS} | {"free": NAMES["free"]},
        ),
        ({"trainable": False}, {"random": [], "centered": [], "free": []}),
    ],
    ids=str,
)
def test_what_is_trained_in_a_form_is_what_the_arguments_say(options, trained, form):
    layer = calibrated(form, **options)
    assert names(layer.trainable_weights) == trained[form]
    layer.trainable = True
    if "trainable" in options:
        expected = {"free": NAMES["free"]}.get(form, ["geometry"])
        assert names(layer.trainable_weights) == expected


@forms
def test_a_frozen_parent_stays_frozen_in_every_form(form):
    layer = DarkAttention(**HEADS, seed=0)
    layer.build((2, 12, WIDTH), (2, 12, WIDTH))
    layer.trainable = False
    layer.feature_map.calibrate(QUERY, KEY, **OPTIONS[form])
    assert layer.trainable_weights == []
    layer.trainable = True
    assert f"feature_map/{NAMES[form][0]}" in weight_names(layer.trainable_weights)


@forms
def test_config_and_weights_restore_a_calibrated_map(form):
    layer = calibrated(form)
    config = layer.get_config()
    assert config["form"] == form
    restored = DarkFeatureMap.from_config(config)
    restored.build()
    assert names(restored.weights) == names(layer.weights)
    restored.set_weights(layer.get_weights())
    for x, keys in ((QUERY[:, :, :2], False), (KEY, True)):
        assert_close(restored(x, keys=keys), layer(x, keys=keys))
    assert_close(restored.attend(QUERY, KEY, KEY), layer.attend(QUERY, KEY, KEY))


@forms
def test_a_map_refuses_forms_it_does_not_know_or_can_not_take(form):
    layer = calibrated(form)
    before = arrays(layer.weights)
    with pytest.raises(ValueError, match="`form` must be one of"):
        layer.set_form("fixed")
    layer.set_form(form)  # as it is
    assert_close(arrays(layer.weights), before)
    if form != "free":
        windowed = calibrated(form, sliding_window=3, num_query_heads=4)
        weights = arrays(windowed.weights)
        with pytest.raises(ValueError, match='of `form="free"`'):
            windowed.set_form("free")
        assert windowed.form == form
        assert_close(arrays(windowed.weights), weights)


def test_calls_give_the_features_of_the_form():
    layer = calibrated("centered", tie_geometry=False)
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

    layer = calibrated("free")
    query_kernel, key_kernel, bias = arrays(layer.weights)
    assert_close(layer(query), np.exp(np.einsum("btkh,khm->btkm", query, query_kernel)), 1e-4)
    expected = np.exp(np.einsum("btkh,khm->btkm", KEY, key_kernel) + bias)
    assert_close(layer(KEY, keys=True), expected, 1e-4)
    with pytest.raises(ValueError, match="free features, which have no geometry"):
        layer.covariance()


@forms
def test_features_scores_and_attention_agree(form):
    """`call`, `log_scores`, `attend` and `accumulate` are four ways to say one thing."""
    layer = calibrated(form)
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
    options = {"return_state": True}
    _, state = layer.attend(QUERY, KEY, value, **options)
    assert_close(layer.accumulate(KEY, value), state, 1e-4)


def test_redraw_of_a_centred_map_keeps_all_but_the_draw_and_its_weight():
    layer = calibrated("centered")
    before = dict(zip(names(layer.weights), arrays(layer.weights), strict=True))
    layer.redraw(seed=3)
    after = dict(zip(names(layer.weights), arrays(layer.weights), strict=True))
    changed = {name for name in before if differ(before[name], after[name])}
    assert changed == {"projection", "log_weight"}


def test_redraw_of_a_free_map_is_refused():
    layer = calibrated("free")
    before = arrays(layer.weights)
    with pytest.raises(ValueError, match="fitted to data, not drawn"):
        layer.redraw(seed=1)
    assert_close(arrays(layer.weights), before)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
@forms
def test_calibrated_weights_and_features_are_float32_under_every_policy(form, policy):
    plain, layer = calibrated(form), feature_map(dtype=policy)
    layer.calibrate(QUERY, KEY, **OPTIONS[form])
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
@pytest.mark.parametrize("form", ["random", "centered"])
def test_softmax_of_the_exact_query_is_the_kernel(form, tied):
    layer = calibrated(form, tie_geometry=tied)
    if not tied:
        layer.query_geometry.assign(arrays(layer.query_geometry) + 0.3 * normal(2, 4, 4))
    hat = 4**-0.25
    moved = arrays(layer.exact_query(QUERY)).astype("float64")
    m_k = arrays(layer.geometry)
    m_q = m_k if tied else arrays(layer.query_geometry)
    zeros = np.zeros((2, 4))
    b, c = arrays([layer.query_shift, layer.key_shift]) if form == "centered" else (zeros, zeros)
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
            feature_form="centered",
        )
        for mode in ("linear", "exact")
    )
    small = calibrated("centered")  # damped as for few features
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


# Files.


def test_models_with_calibrated_layers_come_back_from_a_file_as_they_were(tmp_path):
    inputs = x = keras.Input((LENGTH, WIDTH))
    calibrated_forms = ("centered", "free")
    for form in calibrated_forms:
        block = DarkTransformerBlock(24, 4, num_features=8, seed=1, name=form)
        x = block(x)
        query = normal(2, 12, 4, WIDTH // 4)
        block.attention.feature_map.calibrate(query, query[::-1], **OPTIONS[form])
    attention = DarkAttention(**HEADS, seed=2, sliding_window=3, tie_geometry=False)
    model = keras.Model(inputs, attention(x, x, use_causal_mask=True))
    attention.feature_map.calibrate(QUERY, KEY, causal=True)
    attention.feature_map.far_offset.assign(np.arange(4))
    path, data = tmp_path / "model.keras", normal(2, LENGTH, WIDTH)
    model.save(path)
    restored = keras.models.load_model(path)
    assert_close(restored.predict(data, verbose=0), model.predict(data, verbose=0), 1e-6)
    forms = [restored.get_layer(form).attention.feature_map.form for form in calibrated_forms]
    assert forms == list(calibrated_forms)

    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    for weight in restored.weights:
        weight.assign(0.0 * weight)
    restored.load_weights(path)
    for before, after in zip(model.get_weights(), restored.get_weights(), strict=True):
        np.testing.assert_array_equal(after, before)
