"""Where the geometry sits relative to the rotation, and what that makes of positions."""

import keras
import numpy as np
import pytest

from keras_darkformer import DarkAttention, DarkFeatureMap, calibrate

from .helpers import HEADS, WIDTH, arrays, assert_close, call, differ, normal, weight_gradients

X = 0.5 * normal(2, 10, WIDTH)


def attention(place, *, mode="linear", num_features=8, **options):
    """With a geometry far from the identity."""
    layer = DarkAttention(
        **HEADS | {"num_features": num_features},
        attention_mode=mode,
        rope_max_wavelength=20.0,
        rope_geometry=place,
        seed=0,
        **options,
    )
    layer.build(X.shape, X.shape)
    geometry = layer.feature_map.geometry
    noise = normal(*geometry.shape)
    geometry.assign(0.6 * arrays(geometry) + 0.2 * noise)
    return layer


def at(layer, position, **options):
    """Output with the first token at a position."""
    layer.position_offset = position
    try:
        return arrays(layer(X, X, **options))
    finally:
        layer.position_offset = None


def test_exact_mode_sees_relative_positions_only():
    layer = attention("before", mode="exact")
    assert_close(at(layer, 13), at(layer, 0), 1e-4)
    # ... and does see them.
    backwards = arrays(layer(X[:, ::-1], X[:, ::-1]))[:, ::-1]
    assert differ(backwards, at(layer, 0))


def test_a_geometry_after_the_rotation_sees_where_tokens_are():
    layer = attention("after", mode="exact")
    assert differ(at(layer, 13), at(layer, 0))
    layer.feature_map.geometry.assign(0.7 * np.stack([np.eye(4)] * 2))
    assert_close(at(layer, 13), at(layer, 0), 1e-4)


@pytest.mark.parametrize("place", ["before", "after"])
def test_linear_mode_with_many_features_approximates_exact_mode(place):
    linear = attention(place, num_features=4096)
    exact = attention(place, num_features=4096, mode="exact")
    exact.set_weights(linear.get_weights())
    expected = at(exact, 0)
    error = np.abs(arrays(call(linear, X, X)) - expected).max()
    uniform = DarkAttention(**HEADS, attention_mode="exact", seed=0)
    uniform.build(X.shape, X.shape)
    for dense in ("query_dense", "value_dense", "output_dense"):
        getattr(uniform, dense).set_weights(getattr(exact, dense).get_weights())
    uniform.key_dense.set_weights([0 * x for x in exact.key_dense.get_weights()])
    assert error < 0.3 * np.abs(arrays(uniform(X, X)) - expected).max()


def test_the_geometry_is_trained_where_it_sits():
    layer = attention("before")
    gradients = weight_gradients(layer, X, X, use_causal_mask=True)
    assert np.abs(gradients["feature_map/geometry"]).max() > 1e-4


def test_features_are_of_what_comes_out_of_the_rotation():
    layer, plain = attention("before").feature_map, DarkFeatureMap(2, 4, num_features=8, seed=0)
    key = normal(2, 5, 2, 4)
    assert_close(layer(key), plain(key))
    query = normal(2, 5, 4, 4)
    assert_close(layer.exact_query(query), query)
    moved = arrays(layer.before_rotation(query))
    for head in range(4):
        expected = query[:, :, head] @ arrays(layer.geometry)[head // 2].T
        assert_close(moved[:, :, head], expected)
    half = keras.ops.cast(query, "bfloat16")
    assert keras.backend.standardize_dtype(layer.before_rotation(half).dtype) == "bfloat16"


@pytest.mark.parametrize("method", ["spectral", "identity"])
def test_a_model_is_calibrated_around_the_rotation(method):
    inputs = keras.Input((10, WIDTH))
    layer = attention("before", num_features=64)
    model = keras.Model(inputs, layer(inputs, inputs))
    calibrate(model, 2 * normal(8, 10, WIDTH), method=method, batch_size=4, verbose=False)
    fitted = layer.feature_map
    # A plain draw has no proposal and no shifts. Shifts before the rotation would turn with it.
    plain = {"proposal": 1, "log_weight": 0, "query_shift": 0, "key_shift": 0}
    values = {name: arrays(getattr(fitted, name)) for name in plain}
    moved = {name for name, value in values.items() if (value != plain[name]).any()}
    assert moved == (set() if method == "identity" else {"proposal", "log_weight"})
    assert all(np.isfinite(x).all() for x in fitted.get_weights())
    # What rotates together has one proposal; so relative positions are still all that counts.
    proposal = arrays(fitted.proposal)
    assert_close(proposal[:, :2], proposal[:, 2:])
    exact = attention("before", num_features=64, mode="exact")
    exact.set_weights(layer.get_weights())
    assert_close(at(exact, 9), at(exact, 0), 1e-4)
    error = np.abs(at(layer, 0) - at(exact, 0)).mean()
    assert error < 0.4 * np.abs(at(exact, 0)).mean()  # of one draw, another on a GPU


@pytest.mark.parametrize(
    "options", [{"tie_geometry": False}, {"rank": 3}, {"head_dim": 5}], ids=str
)
def test_a_geometry_that_can_not_sit_there_is_refused(options):
    arguments = {"num_heads": 2, "head_dim": 4, "num_features": 8} | options
    with pytest.raises(ValueError, match=r"`rope_geometry=.* needs"):
        DarkFeatureMap(**arguments, rope_geometry="before")
