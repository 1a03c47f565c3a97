"""A layer's feature map makes room for one of another class, as calibration by clusters asks."""

import json

import keras
import numpy as np
import pytest

from keras_darkformer import DarkAttention, DarkTransformerBlock, calibrate
from keras_darkformer.layers import DarkFeatureMap, ExponentialFeatureMap

from .helpers import HEADS, LENGTH, WIDTH, arrays, assert_close, call, differ, normal, weight_names

X = normal(2, LENGTH, WIDTH)
QUERY, KEY = normal(2, 12, 4, 4), normal(2, 12, 2, 4, seed=1)
CLASSES = {"dark": DarkFeatureMap, "exponential": ExponentialFeatureMap}
NAMES = {
    "dark": ["geometry", "projection", "proposal", "log_weight", "query_shift", "key_shift"],
    "exponential": ["query_kernel", "key_kernel", "key_bias"],
}
METHODS = {"dark": "spectral", "exponential": "clusters"}
kinds = pytest.mark.parametrize("kind", CLASSES)


def built(**options):
    layer = DarkAttention(**HEADS | {"seed": 0, "name": "mine"} | options)
    layer.build(X.shape, X.shape)
    return layer


def other(kind):
    return "dark" if kind == "exponential" else "exponential"


def swapped(kind, **options):
    """A layer that had a map of the other class before, and its calibrated map."""
    layer = built(feature_map=other(kind), **options)
    layer.swap_feature_map(kind)
    layer.feature_map.calibrate(QUERY, KEY, method=METHODS[kind], refine=False)
    return layer


def paths(weights):
    return [weight.path for weight in weights]


def test_a_layer_goes_from_map_to_map_with_the_weights_of_each():
    layer, untouched = built(), None
    for kind in ("exponential", "dark", "exponential", "dark"):
        before = layer.feature_map
        layer.swap_feature_map(kind)
        assert type(layer.feature_map) is CLASSES[kind]
        assert layer.options.feature_map == layer.get_config()["feature_map"] == kind
        assert before not in layer._flatten_layers()
        # As if it had been built with this map: names, paths and, for files, the order.
        fresh = built(feature_map=kind)
        assert paths(layer.weights) == paths(fresh.weights)
        assert paths(layer.trainable_weights) == paths(fresh.trainable_weights)
        assert [f"mine/feature_map/{name}" for name in NAMES[kind]] == (
            paths(layer.feature_map.weights)
        )
        assert_close(layer.feature_map.get_weights(), fresh.feature_map.get_weights())
        assert len({id(x) for x in layer.variables}) == len(fresh.variables)
        rest = [w for w in layer.weights if "feature_map" not in w.path]
        untouched = rest if untouched is None else untouched
        assert all(x is y for x, y in zip(untouched, rest, strict=True))


@kinds
def test_a_map_of_the_class_at_hand_stays(kind):
    layer = built(feature_map=kind)
    before = layer.feature_map
    layer.swap_feature_map(kind)
    assert layer.feature_map is before


@kinds
def test_options_go_on_to_the_new_map(kind):
    options = {"num_features": 6, "projection": "antithetic", "geometry_scale": 0.5, "seed": None}
    layer = built(feature_map=other(kind), **options)
    before = layer.feature_map
    layer.swap_feature_map(kind)
    changed = {"feature_map": (other(kind), kind)}
    pairs = zip(before.get_config().items(), layer.feature_map.get_config().items(), strict=True)
    assert {name: (x, y) for (name, x), (_, y) in pairs if x != y} == changed
    assert layer.options.seed is None
    assert layer.get_config() == built(feature_map=kind, **options).get_config()


@kinds
def test_what_is_frozen_stays_frozen(kind):
    for freeze in (lambda x: x, lambda x: x.feature_map):
        layer = built(feature_map=other(kind))
        freeze(layer).trainable = False
        layer.swap_feature_map(kind)
        trained = f"feature_map/{NAMES[kind][0]}"
        assert trained not in weight_names(layer.trainable_weights)
        freeze(layer).trainable = True
        assert trained in weight_names(layer.trainable_weights)
        assert not layer.non_trainable_weights or kind == "dark"


@kinds
def test_a_layer_not_built_yet_is_built_with_the_new_map(kind):
    layer = DarkAttention(**HEADS, seed=0, name="mine", feature_map=other(kind))
    layer.swap_feature_map(kind)
    layer.build(X.shape, X.shape)
    fresh = built(feature_map=kind)
    assert paths(layer.weights) == paths(fresh.weights)
    layer.set_weights(fresh.get_weights())
    assert_close(call(layer, X, X), call(fresh, X, X))


def test_a_map_that_can_not_be_is_refused_and_the_layer_stays_as_it_was():
    layer = built(sliding_window=3)
    before, expected = layer.feature_map, layer.get_config()
    with pytest.raises(ValueError, match='Features of `feature_map="exponential"'):
        layer.swap_feature_map("exponential")
    with pytest.raises(ValueError, match="`feature_map` must be one of"):
        layer.swap_feature_map("fixed")
    assert layer.feature_map is before
    assert layer.get_config() == expected


@kinds
def test_calls_and_steps_compute_with_the_new_map(kind):
    layer = swapped(kind, rope_max_wavelength=100.0)
    fresh = built(feature_map=kind, rope_max_wavelength=100.0)
    fresh.set_weights(layer.get_weights())
    causal = {"use_causal_mask": True, "return_state": True}
    output, state = call(layer, X, X, **causal)
    assert_close((output, state), call(fresh, X, X, **causal))
    assert differ(output, call(built(rope_max_wavelength=100.0), X, X, **causal)[0])
    _, half = call(layer, X[:, :3], X[:, :3], **causal)
    rest, after = call(layer, X[:, 3:], X[:, 3:], initial_state=half, **causal)
    assert_close(rest, output[:, 3:], 1e-4)
    assert_close(after.position, state.position)


def model_of(kind="dark"):
    inputs = keras.Input((LENGTH, WIDTH))
    x = DarkTransformerBlock(24, 4, num_features=8, seed=1, feature_map=kind, name="block")(inputs)
    x = DarkAttention(**HEADS, seed=2, feature_map=kind, name="attention")(x, x)
    return keras.Model(inputs, x)


def maps(model):
    attention = model.get_layer("attention"), model.get_layer("block").attention
    return [layer.feature_map for layer in attention]


def test_weights_and_config_of_a_calibrated_model_restore_it(tmp_path):
    model = calibrate(model_of(), X, method="clusters", verbose=False)
    assert {type(x) for x in maps(model)} == {ExponentialFeatureMap}
    assert model.get_layer("block").get_config()["feature_map"] == "exponential"
    expected, path = arrays(model(X)), tmp_path / "calibrated.weights.h5"
    model.save_weights(path)
    for twin in (
        model_of("exponential"),
        keras.Model.from_config(json.loads(json.dumps(model.get_config()))),
    ):
        assert paths(twin.weights) == paths(model.weights)
        assert {type(x) for x in maps(twin)} == {ExponentialFeatureMap}
        assert differ(twin(X), expected)
        twin.load_weights(path)
        assert_close(twin(X), expected, 1e-6)
    twin.set_weights([0.0 * x for x in model.get_weights()])
    twin.set_weights(model.get_weights())
    assert_close(twin(X), expected, 1e-6)


def test_weights_of_a_calibrated_layer_are_refused_by_one_that_is_not_and_it_is_said_how(tmp_path):
    source, model = calibrate(model_of(), X, method="clusters", verbose=False), model_of()
    path = tmp_path / "calibrated.weights.h5"
    source.save_weights(path)
    how = r"`method=\"clusters\"` does\. .* `feature_map` among them, or load a file"
    differs = (
        r"'feature_map', of `feature_map='dark'`, has .*'geometry': .*; the file has .*'key_bias'"
    )
    with pytest.raises(ValueError, match=f"(?s){differs}.*{how}"):
        model.load_weights(path)
    for name in ("attention", "block"):
        layer, other = model.get_layer(name), source.get_layer(name)
        counts = len(layer.weights), len(other.weights)
        has = (
            f"'{name}' has {counts[0]} weights, with `feature_map='dark'`, and received {counts[1]}"
        )
        with pytest.raises(ValueError, match=f"(?s){has}.*'.*/feature_map/.*' of shape .*{how}"):
            layer.set_weights(other.get_weights())
    with pytest.raises(ValueError, match=r"'feature_map' has 6 weights.* and received 3"):
        maps(model)[0].set_weights(maps(source)[0].get_weights())
    assert_close(maps(model)[0].get_weights(), maps(model_of())[0].get_weights())


def test_weights_of_another_size_change_nothing():
    layer, other = built(), built(num_features=5)
    before = layer.get_weights()
    with pytest.raises(ValueError, match=r"projection' of shape .*, received shape .*5, "):
        layer.set_weights([0.0 * x for x in other.get_weights()])
    other.feature_map.save_own_variables(stored := {})
    with pytest.raises(ValueError, match=r"has the weights .*'projection'.*; the file has "):
        layer.feature_map.load_own_variables({k: arrays(x) for k, x in stored.items()})
    assert_close(layer.get_weights(), before, 0.0)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_anew_and_says_so(capsys):
    model = model_of()
    model.compile(keras.optimizers.Adam(0.02), "mse")
    target = normal(*X.shape, seed=1)
    model.train_on_batch(X, target)
    before = model.optimizer
    calibrate(model, X, method="whitening", refine=False)
    assert model.optimizer is before  # weights of the same maps have other values, no more
    assert "compiled anew" not in capsys.readouterr().out
    calibrate(model, X, method="clusters", refine=False)
    assert "2 of 2 feature maps are of another class now" in capsys.readouterr().out
    assert model.optimizer is not before
    assert model.optimizer.get_config() == before.get_config()

    kernels = arrays([x.query_kernel for x in maps(model)])
    losses = [model.train_on_batch(X, target) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all(
        np.abs(x - arrays(y.query_kernel)).max() > 1e-3
        for x, y in zip(kernels, maps(model), strict=True)
    )
    for verbose in (False, True):  # nothing is compiled
        plain = model_of()
        calibrate(plain, X, method="clusters", refine=False, verbose=verbose)
        assert "another class" not in capsys.readouterr().out
