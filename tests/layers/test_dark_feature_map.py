import keras
import numpy as np
import pytest
from keras import ops

from keras_darkformer import DarkAttention, DarkFeatureMap
from keras_darkformer.ops import State, dark_attention, dark_features

from .helpers import (
    FEATURE_OPTIONS,
    OTHER_OPTIONS,
    arrays,
    assert_close,
    assert_config_is_complete,
    call,
    differ,
    dtype_policy,
    dtypes,
    normal,
    scrambled,
    shapes_and_dtypes,
    weight_gradients,
)

HEADS, HEAD_DIM, FEATURES = 2, 4, 8
INPUTS = normal(3, 5, HEADS, HEAD_DIM)


def feature_map(**options):
    layer = DarkFeatureMap(HEADS, HEAD_DIM, num_features=FEATURES, **{"seed": 0} | options)
    layer.build()
    return layer


def drawn(layer):
    return arrays(layer.projection)


def test_features_have_the_shape_of_the_inputs_but_for_the_last_axis():
    layer = DarkFeatureMap(HEADS, HEAD_DIM, num_features=FEATURES)
    features = layer(INPUTS)
    assert shapes_and_dtypes(features) == [((3, 5, HEADS, FEATURES), "float32")]
    assert shapes_and_dtypes(layer(keras.KerasTensor(INPUTS.shape))) == shapes_and_dtypes(features)
    assert layer.compute_output_shape((None, None, HEADS, HEAD_DIM)) == (None, None, 2, FEATURES)


def test_rank_sets_the_rows_of_the_geometry():
    layer = feature_map(rank=3, geometry_scale=0.5)
    assert_close(layer.geometry, np.stack([0.5 * np.eye(3, HEAD_DIM)] * HEADS))
    assert tuple(layer.projection.shape) == (HEADS, FEATURES, 3)
    assert tuple(layer(INPUTS).shape) == (3, 5, HEADS, FEATURES)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_weights_and_features_are_float32_under_every_policy(policy):
    with dtype_policy(policy):
        layer = DarkFeatureMap(HEADS, HEAD_DIM, num_features=FEATURES, seed=0)
        features = layer(INPUTS)
        half = ops.cast(INPUTS, layer.compute_dtype)
        output, state = call(layer.attend, half, half, half, causal=True, return_state=True)
    assert dtypes(output) == {layer.compute_dtype}
    assert dtypes([layer.geometry, layer.projection, features, state]) == {"float32"}
    assert_close(features, feature_map()(ops.cast(half, "float32")))


@pytest.mark.parametrize(
    ("train_geometry", "train_projection"), [(True, False), (False, False), (False, True)]
)
def test_what_is_trained_is_what_the_arguments_say(train_geometry, train_projection):
    layer = feature_map(train_geometry=train_geometry, train_projection=train_projection)
    assert layer.geometry.trainable is train_geometry
    assert layer.projection.trainable is train_projection
    gradients = weight_gradients(layer, INPUTS)
    expected = {"geometry"} if train_geometry else {"projection"} if train_projection else set()
    assert set(gradients) == expected
    assert all(gradient.any() for gradient in gradients.values())


def test_covariance_is_the_geometry_times_itself():
    layer = scrambled(feature_map(rank=3))
    geometry = arrays(layer.geometry)
    assert_close(layer.covariance(), np.stack([m.T @ m for m in geometry]))


def test_a_call_gives_the_features_of_its_weights():
    layer = scrambled(feature_map())
    assert_close(layer(INPUTS), dark_features(INPUTS, layer.geometry, layer.projection))


@pytest.mark.parametrize("causal", [True, False])
def test_attend_uses_the_weights_of_the_map(causal):
    layer = scrambled(feature_map())
    query, key, value = normal(3, 5, 4, HEAD_DIM, seed=1), INPUTS, normal(3, 5, HEADS, 6, seed=2)
    weights = arrays([layer.geometry, layer.projection])
    key_mask = np.arange(5) < np.array([[2], [5], [4]])
    options = {"causal": causal, "return_state": True, "chunk_size": 2}
    _, before = call(layer.attend, query, key, value, **options)
    assert_close(before, call(dark_attention, query, key, value, *weights, **options)[1])
    options |= {"key_mask": key_mask, "initial_state": before}
    if causal:
        options["write_mask"] = np.arange(5) < np.array([[1], [3], [5]])

    output, state = call(layer.attend, query, key, value, **options)
    expected = call(dark_attention, query, key, value, *weights, **options)
    assert_close((output, state), expected)
    initial = layer.get_initial_state(3, 6)
    assert isinstance(initial, State)
    assert isinstance(state, State)
    assert shapes_and_dtypes(initial) == shapes_and_dtypes(state)


@pytest.mark.parametrize("method", ["attend", "log_scores"])
def test_methods_work_before_the_first_call(method):
    inputs = [INPUTS] * (3 if method == "attend" else 2)
    unbuilt = DarkFeatureMap(HEADS, HEAD_DIM, num_features=FEATURES, seed=0)
    result = getattr(unbuilt, method)(*inputs)
    assert_close(result, call(getattr(feature_map(), method), *inputs))


def test_redraw_changes_the_projection_and_nothing_else():
    layer = scrambled(feature_map())
    geometry, first = arrays([layer.geometry, layer.projection])
    layer.redraw(seed=1)
    second = drawn(layer)
    assert differ(first, second)
    assert_close(layer.geometry, geometry)
    layer.redraw()
    assert differ(second, layer.projection)
    layer.redraw(seed=1)
    assert_close(layer.projection, second)
    layer.redraw(seed=0)
    assert_close(layer.projection, first)


def test_redraw_refuses_to_throw_away_a_trained_projection():
    layer = feature_map(train_projection=True)
    before = drawn(layer)
    with pytest.raises(ValueError, match="train_projection=True"):
        layer.redraw(seed=1)
    assert_close(layer.projection, before)


def test_one_seed_gives_one_projection_wherever_it_is_drawn():
    attention = DarkAttention(HEAD_DIM, HEADS, num_features=FEATURES, seed=3)
    attention.build((1, 2, 8), (1, 2, 8))
    assert_close(feature_map(seed=3).projection, feature_map(seed=3).projection)
    assert_close(attention.feature_map.projection, feature_map(seed=3).projection)
    assert differ(feature_map(seed=3).projection, feature_map(seed=4).projection)
    gaussian = feature_map(seed=3, projection="gaussian")
    assert differ(feature_map(seed=3).projection, gaussian.projection)


def test_heads_have_projections_of_their_own():
    assert differ(*drawn(feature_map()))


def test_without_a_seed_the_seed_of_keras_decides():
    def two():
        return [drawn(feature_map(seed=None)) for _ in range(2)]

    keras.utils.set_random_seed(7)
    first = two()
    keras.utils.set_random_seed(7)
    second = two()
    assert differ(*first)
    assert_close(first, second)


def test_config_holds_every_argument():
    arguments = {
        "num_heads": 3,
        "head_dim": 6,
        "num_query_heads": 6,
    } | FEATURE_OPTIONS
    del arguments["feature_map"]  # the class says it
    assert_config_is_complete(DarkFeatureMap, arguments, OTHER_OPTIONS)
    assert DarkFeatureMap(**arguments).get_config()["feature_map"] == "dark"


def test_config_holds_the_seed_that_was_drawn():
    layer = feature_map(seed=None)
    restored = DarkFeatureMap.from_config(layer.get_config())
    restored.build()
    assert_close(restored.projection, layer.projection)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 0),
        ("head_dim", 4.0),
        ("num_features", -1),
        ("num_features", None),
        ("rank", 0),
        ("projection", "sobol"),
        ("geometry_scale", 0.0),
    ],
)
def test_errors_name_the_argument_and_what_came(name, value):
    arguments = {"num_heads": 2, "head_dim": 4, "num_features": 8} | {name: value}
    with pytest.raises(ValueError, match=rf"(?s)`{name}` must.*Received: .*{value!r}"):
        DarkFeatureMap(**arguments)
