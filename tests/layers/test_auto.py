"""`attention_mode="auto"`: short sequences exactly, others with features."""

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES, compiled, on_one_backend
from keras import ops

from keras_darkformer import AttentionOptions, DarkAttention
from keras_darkformer.layers import core
from keras_darkformer.layers.core import fitted
from keras_darkformer.ops.backend import accelerated
from keras_darkformer.ops.crossover import MEASURED, crossover

from .helpers import (
    BATCH,
    LENGTH,
    PADDING,
    WIDTH,
    arrays,
    assert_close,
    attention,
    call,
    differ,
    normal,
    weight_gradients,
)

X = normal(BATCH, LENGTH, WIDTH)
KEYS = normal(BATCH, 5, WIDTH, seed=1)
ROTARY = {"rope_max_wavelength": 100.0}
MEMORY = {"sliding_window": 4, "num_sinks": 1, "cache_size": LENGTH - 5}


def twin(layer, **options):
    """A layer with the same weights and other options."""
    other = DarkAttention.from_config(layer.get_config() | {"exact_below": None} | options)
    other.build((BATCH, None, WIDTH), (BATCH, None, WIDTH))
    other.set_weights(layer.get_weights())
    return other


@pytest.fixture(scope="module")
def layers():
    """The same layer in the modes auto, exact and linear."""
    auto = attention(attention_mode="auto", exact_below=LENGTH + 1, **ROTARY)
    return auto, *(twin(auto, attention_mode=mode) for mode in ("exact", "linear"))


@pytest.mark.parametrize(
    "options",
    [
        {"use_causal_mask": True},
        {"use_causal_mask": True, "key_mask": PADDING},
        {"use_causal_mask": True, "key_mask": PADDING[:, ::-1].copy(), "training": True},
        {"value_mask": PADDING, "query_mask": PADDING},
    ],
    ids=["causal", "padded behind", "padded before", "all"],
)
def test_it_is_exact_below_the_length_and_linear_from_there(layers, options):
    auto, exact, linear = layers
    short = arrays(call(auto, X, X, **options))
    assert_close(short, arrays(call(exact, X, X, **options)), 1e-6)
    assert differ(short, arrays(call(linear, X, X, **options)))
    long = twin(auto, exact_below=LENGTH)
    assert_close(arrays(call(long, X, X, **options)), arrays(call(linear, X, X, **options)), 1e-6)


def test_gradients_are_those_of_the_exact_form(layers):
    auto, exact, _ = layers
    found = weight_gradients(auto, X, X, use_causal_mask=True)
    expected = weight_gradients(exact, X, X, use_causal_mask=True)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-5)
    assert np.abs(found["feature_map/geometry"]).max() > 1e-3


def test_the_state_is_that_of_linear_attention_and_goes_on(layers):
    auto, exact, linear = layers
    options = {"use_causal_mask": True, "return_state": True, "key_mask": PADDING}
    output, state = call(auto, X, X, **options)
    of_features, expected = call(linear, X, X, **options)
    assert_close(arrays(output), arrays(exact(X, X, use_causal_mask=True, key_mask=PADDING)), 1e-6)
    assert differ(arrays(output), arrays(of_features))
    for a, b in zip(keras.tree.flatten(state), keras.tree.flatten(expected), strict=True):
        assert a.dtype == b.dtype
    after = {"use_causal_mask": True, "return_state": True}
    found = call(auto, X[:, :3], X[:, :3], initial_state=state, **after)
    wanted = call(linear, X[:, :3], X[:, :3], initial_state=expected, **after)
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(wanted), strict=True):
        assert_close(arrays(a), arrays(b), 1e-5)


def test_a_state_goes_on_linearly_however_short_the_piece(layers):
    auto, _, linear = layers
    state = auto.get_initial_state(BATCH)
    options = {"use_causal_mask": True, "initial_state": state}
    assert_close(arrays(call(auto, X, X, **options)), arrays(call(linear, X, X, **options)), 1e-6)


@pytest.mark.parametrize(("sinks", "is_exact"), [(1, True), (0, False)])
def test_what_fits_into_an_exact_memory_is_softmax_itself(sinks, is_exact):
    """One token more than fits: what is far then has features."""
    auto = attention(attention_mode="auto", **ROTARY, **MEMORY | {"num_sinks": sinks})
    assert auto.computes_exactly(LENGTH, LENGTH, causal=True) == is_exact
    linear = twin(auto, attention_mode="linear")
    for options in ({}, {"key_mask": PADDING}):
        found = arrays(call(auto, X, X, use_causal_mask=True, **options))
        expected = arrays(call(linear, X, X, use_causal_mask=True, **options))
        real = options.get("key_mask", PADDING | True)
        assert_close(found[real], expected[real], 1e-5)
    output, state = call(auto, X, X, use_causal_mask=True, return_state=True)
    expected = call(linear, X, X, use_causal_mask=True, return_state=True)
    for a, b in zip(keras.tree.flatten((output, state)), keras.tree.flatten(expected), strict=True):
        assert_close(arrays(a), arrays(b), 1e-5)


@on_one_backend
def test_of_two_lengths_the_harmonic_mean_counts():
    layer = attention(attention_mode="auto", exact_below=10)
    assert [layer.computes_exactly(n, n) for n in (9, 10)] == [True, False]
    assert layer.computes_exactly(1, 1000)  # a query of its own: a row of scores
    assert [layer.computes_exactly(6, n) for n in (29, 30)] == [True, False]
    assert not layer.computes_exactly(0, 0)  # linear attention knows no tokens
    assert not layer.computes_exactly(None, 3)
    assert not layer.computes_exactly(3, None)


def test_cross_attention_is_exact_where_it_is_short(layers):
    auto, exact, linear = layers
    assert_close(arrays(call(auto, X, KEYS)), arrays(call(exact, X, KEYS)), 1e-6)
    assert differ(arrays(call(auto, X, KEYS)), arrays(call(linear, X, KEYS)))


@on_one_backend
def test_what_was_learned_and_not_drawn_has_no_exact_form():
    for options in ({"train_projection": True}, {"feature_map": "exponential"}):
        assert not attention(attention_mode="auto", **options).computes_exactly(4, 4)
    assert attention(attention_mode="auto").computes_exactly(4, 4)
    assert attention(attention_mode="exact", train_projection=True).computes_exactly(4, 4)
    assert not attention().computes_exactly(4, 4)


@on_one_backend
def test_features_that_are_being_fitted_are_used():
    layer = attention(attention_mode="auto")
    with fitted([layer]):
        assert not layer.computes_exactly(4, 4)
        with fitted([layer]):
            pass
        assert not layer.computes_exactly(4, 4)
    assert layer.computes_exactly(4, 4)


@on_one_backend
def test_the_length_is_that_of_the_shape_and_training_uses_the_features(monkeypatch):
    asked = []

    def note(*sizes, causal):
        asked.append((sizes, causal))
        return LENGTH + causal

    monkeypatch.setattr(core, "crossover", note)
    layer = attention(attention_mode="auto", num_features=12)
    assert not layer.computes_exactly(LENGTH, LENGTH)
    assert layer.computes_exactly(LENGTH, LENGTH, causal=True)
    assert asked == [((4, 12, 2), False), ((4, 12, 2), True)]
    exact, causal = twin(layer, attention_mode="exact"), {"use_causal_mask": True}
    expected = arrays(exact(X, X, **causal))
    assert_close(arrays(layer(X, X, **causal)), expected, 1e-6)
    assert differ(arrays(layer(X, X, training=True, **causal)), expected)
    given = twin(layer, exact_below=LENGTH + 1)
    assert_close(arrays(given(X, X, training=True, **causal)), expected, 1e-6)


@on_one_backend
def test_more_features_take_longer_to_pay_and_groups_pay_sooner():
    assert set(MEASURED) == {"tensorflow", "jax", "torch"}
    for kinds in MEASURED.values():
        for measured in kinds.values():
            assert measured.at(256, 64, 1) > measured.at(64, 64, 1)
            assert measured.at(128, 64, 8) < measured.at(128, 64, 1)
            assert 32 < measured.at(128, 64, 1) < 8192
    if not accelerated():
        assert crossover(64, 128, 1, causal=True) == MEASURED[BACKEND][True].at(128, 64, 1)


@pytest.mark.parametrize("jit", MODES)
def test_a_length_that_is_not_known_is_linear(layers, jit):
    if BACKEND != "tensorflow":
        pytest.skip("only TensorFlow traces lengths that are not known")
    import tensorflow as tf

    auto, _, linear = layers
    if jit:
        found = compiled(lambda x: auto(x, x, use_causal_mask=True))(X)
        assert differ(arrays(found), arrays(linear(X, X, use_causal_mask=True)))
        return
    signature = [tf.TensorSpec((BATCH, None, WIDTH), "float32")]
    traced = tf.function(lambda x: auto(x, x, use_causal_mask=True), input_signature=signature)
    assert_close(arrays(traced(X)), arrays(linear(X, X, use_causal_mask=True)), 1e-5)


@on_one_backend
@pytest.mark.parametrize("options", [{"exact_below": 0}, {"exact_below": 2.5}, {"exact_below": 4}])
def test_lengths_that_can_not_be_are_refused(options):
    mode = "linear" if options["exact_below"] == 4 else "auto"
    with pytest.raises(ValueError, match="`exact_below`"):
        AttentionOptions(attention_mode=mode, **options)


def test_a_model_with_it_is_saved_and_loaded(tmp_path):
    inputs = keras.Input((LENGTH, WIDTH))
    layer = DarkAttention(4, 4, 2, num_features=8, attention_mode="auto", exact_below=LENGTH + 1)
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(arrays(loaded(ops.convert_to_tensor(X))), arrays(model(X)), 1e-6)
    assert loaded.layers[-1].options.exact_below == LENGTH + 1
