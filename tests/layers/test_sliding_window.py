"""`DarkAttention` with a window of the exact kernel."""

import keras
import numpy as np
import pytest
from backends import DEFAULT_JIT, compiled
from keras import ops

from keras_darkformer import DarkAttention, DarkTransformerBlock
from keras_darkformer.ops import MemoryState, PositionedState
from keras_darkformer.ops.reference import dark_attention_reference

from .helpers import (
    BATCH,
    HEADS,
    LENGTH,
    PADDING,
    WIDTH,
    arrays,
    assert_close,
    attention,
    call,
    differ,
    normal,
    shapes_and_dtypes,
    weight_gradients,
)

X = normal(BATCH, LENGTH, WIDTH)
LEFT_OUT = -1e30  # a `far_offset` at which nothing is left of the far part
alone_or_not = pytest.mark.parametrize("alone", [False, True], ids=["features", "window_alone"])


def windowed(size=3, *, alone=False, **options):
    if alone:
        return attention(sliding_window=size, feature_map="none", **options)
    layer = attention(sliding_window=size, **options)
    layer.feature_map.far_offset.assign(0.5 * normal(4, seed=8))
    return layer


def with_dense_of(layer, other):
    """The layer with the projections of another."""
    for name in ("query_dense", "key_dense", "value_dense", "output_dense"):
        getattr(layer, name).set_weights(getattr(other, name).get_weights())
    return layer


def project(layer, x):
    return (arrays(dense(x)) for dense in (layer.query_dense, layer.key_dense, layer.value_dense))


@pytest.mark.parametrize("calibrated", [False, True])
def test_output_agrees_with_the_reference(calibrated):
    layer = windowed(tie_geometry=False)
    query, key, value = project(layer, X)
    if calibrated:
        layer.feature_map.calibrate(query, key, causal=True, refine=False)
        assert differ(layer.feature_map.far_offset, 0.5 * normal(4, seed=8))
        assert differ(layer.feature_map.far_offset, np.zeros(4))
    names = ["projection", "query_geometry", "far_offset", "log_weight", "query_shift", "key_shift"]
    weights = {name: arrays(getattr(layer.feature_map, name)) for name in names}
    attended, _ = dark_attention_reference(
        *(query, key, value, arrays(layer.feature_map.geometry)),
        **weights,
        sliding_window=3,
        causal=True,
        key_mask=PADDING,
    )
    expected = layer.output_dense(ops.convert_to_tensor(attended, dtype="float32"))
    found = call(layer, X, X, value_mask=PADDING, use_causal_mask=True)
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("size", [LENGTH, LENGTH + 5])
def test_window_as_long_as_the_sequence_is_softmax(size):
    layer = windowed(size, rope_max_wavelength=100.0)
    exact = with_dense_of(attention(attention_mode="exact", rope_max_wavelength=100.0), layer)
    exact.feature_map.geometry.assign(np.stack([np.eye(4)] * 2))
    expected = call(exact, X, X, use_causal_mask=True)
    assert_close(call(layer, X, X, use_causal_mask=True), expected)


@pytest.mark.parametrize("memory", [{}, {"num_sinks": 1, "cache_size": 2}], ids=["window", "kept"])
@alone_or_not
def test_steps_give_the_outputs_of_the_whole(alone, memory):
    layer = windowed(alone=alone, rope_max_wavelength=100.0, **memory)
    whole = {"use_causal_mask": True, "return_state": True}
    expected, expected_state = call(layer, X, X, **whole)

    def step(token, state):
        return layer(token, token, initial_state=state, **whole)

    step = compiled(step) if DEFAULT_JIT else step
    state, outputs = layer.get_initial_state(BATCH), []
    promised = shapes_and_dtypes(state)
    assert shapes_and_dtypes(expected_state) == promised
    for t in range(LENGTH):
        output, state = step(ops.convert_to_tensor(X[:, t : t + 1]), state)
        outputs.append(arrays(output))
        assert shapes_and_dtypes(state) == promised
    assert_close(np.concatenate(outputs, axis=1), expected, 1e-4)
    for x in (state, expected_state):
        assert isinstance(x, PositionedState)
        assert isinstance(x.attention, MemoryState)
    for tokens, expected_tokens in zip(
        *(x.attention[1:] for x in (state, expected_state)), strict=True
    ):
        assert_close(tokens, expected_tokens)
    assert_close(state.position, expected_state.position)

    token = keras.KerasTensor((BATCH, 1, WIDTH))
    symbolic = [keras.KerasTensor(shape, dtype=dtype) for shape, dtype in promised]
    spec = layer(token, token, initial_state=symbolic, **whole)
    assert shapes_and_dtypes(spec) == shapes_and_dtypes((output, state))


def test_the_far_part_can_be_left_out_at_any_time():
    layer = windowed()
    offset = arrays(layer.feature_map.far_offset)
    both = arrays(call(layer, X, X, use_causal_mask=True))
    layer.feature_map.far_offset.assign(np.full(4, LEFT_OUT))
    found = arrays(call(layer, X, X, use_causal_mask=True))
    assert differ(found, both)
    alone = with_dense_of(windowed(alone=True), layer)
    assert_close(found, call(alone, X, X, use_causal_mask=True))
    gradients = weight_gradients(layer, X, X, use_causal_mask=True)
    still = {"feature_map/geometry", "feature_map/far_offset", "key/bias"}
    assert {name for name, x in gradients.items() if np.abs(x).max() < 1e-5} == still
    layer.feature_map.far_offset.assign(offset)
    assert_close(call(layer, X, X, use_causal_mask=True), both)


def test_a_window_alone_is_softmax_over_it():
    layer = windowed(alone=True)
    exact = with_dense_of(attention(attention_mode="exact"), layer)
    exact.feature_map.geometry.assign(np.stack([np.eye(4)] * 2))
    age = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    expected = call(exact, X, X, attention_mask=((age >= 0) & (age < 3))[None])
    assert_close(call(layer, X, X, use_causal_mask=True), expected)


def test_only_the_last_tokens_are_seen_by_a_window_alone():
    layer = windowed(alone=True)
    moved = X.copy()
    moved[:, 0] += 1.0
    both = np.concatenate([X, moved])
    first, second = np.split(arrays(call(layer, both, both, use_causal_mask=True)), 2)
    changed = np.abs(second - first).max(axis=(0, 2))
    assert (changed[:3] > 1e-4).all()
    assert (changed[3:] < 1e-6).all()


def test_a_model_with_a_window_trains():
    inputs = keras.Input((LENGTH, WIDTH))
    layer = DarkAttention(**HEADS, seed=0, sliding_window=3)
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True))
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=DEFAULT_JIT)
    target = normal(*X.shape, seed=1)
    before = arrays(layer.feature_map.far_offset)
    losses = [model.train_on_batch(X, target) for _ in range(5)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert np.abs(arrays(layer.feature_map.far_offset) - before).min() > 1e-4


def test_all_that_is_trainable_has_a_gradient():
    gradients = weight_gradients(windowed(), X, X, use_causal_mask=True)
    assert all(np.abs(x).max() > 1e-5 for x in gradients.values())
    gradients = weight_gradients(windowed(alone=True), X, X, use_causal_mask=True)
    assert {name for name, x in gradients.items() if np.abs(x).max() < 1e-5} == {"key/bias"}


@pytest.mark.parametrize("x", [X, keras.KerasTensor(X.shape)], ids=["real", "symbolic"])
def test_calls_that_are_not_causal_are_refused(x):
    layer = windowed()
    with pytest.raises(ValueError, match="need `use_causal_mask=True`"):
        layer(x, x)
    with pytest.raises(ValueError, match="need `use_causal_mask=True`"):
        layer(x, x, attention_mask=np.ones((1, LENGTH), bool))
    # A causal `attention_mask` says the same.
    mask, symbolic = np.tri(LENGTH, dtype=bool), keras.KerasTensor(X.shape)
    promised = layer(symbolic, symbolic, attention_mask=mask)
    assert shapes_and_dtypes(promised) == [(X.shape, "float32")]


def test_exact_mode_has_no_need_of_a_window():
    layer = windowed(attention_mode="exact")
    plain = with_dense_of(attention(attention_mode="exact"), layer)
    plain.feature_map.geometry.assign(layer.feature_map.geometry)
    assert_close(layer(X, X), plain(X, X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": 0}, "`sliding_window` must be a positive integer"),
        ({"sliding_window": 2.5}, "`sliding_window` must be a positive integer"),
        (
            {"sliding_window": 3, "feature_map": "exponential"},
            'Features of `feature_map="exponential"`',
        ),
        ({"feature_map": "none"}, '`feature_map="none"` needs a `sliding_window` or `num_sinks`'),
    ],
    ids=str,
)
def test_windows_that_can_not_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DarkAttention(**HEADS | options)


def test_keys_and_values_are_kept_in_the_dtype_that_they_come_in():
    layer = attention(sliding_window=3, num_sinks=1, cache_size=2, dtype="mixed_bfloat16")
    layer.feature_map.far_offset.assign(0.5 * normal(4, seed=8))
    x = ops.cast(ops.convert_to_tensor(X), "bfloat16")
    whole = {"use_causal_mask": True, "return_state": True}
    output, state = call(layer, x, x, **whole)
    zeros = layer.get_initial_state(BATCH)
    assert shapes_and_dtypes(state) == shapes_and_dtypes(zeros)
    for tokens in state[1:]:
        dtypes = [keras.backend.standardize_dtype(leaf.dtype) for leaf in tokens]
        assert dtypes == ["bfloat16", "bfloat16", "float32"]

    def step(token, state):
        return layer(token, token, initial_state=state, **whole)

    step = compiled(step) if DEFAULT_JIT else step
    for t in range(LENGTH):
        last, zeros = step(x[:, t : t + 1], zeros)
    assert_close(ops.cast(last, "float32"), ops.cast(output[:, -1:], "float32"), 0.05)
    for of_steps, of_whole in zip(zeros[1:], state[1:], strict=True):
        np.testing.assert_array_equal(
            *(arrays(ops.cast(x[0], "float32")) for x in (of_steps, of_whole))
        )


def test_a_functional_model_takes_a_block_with_a_window():
    inputs = keras.Input((None, WIDTH))
    block = DarkTransformerBlock(8, 4, num_features=8, sliding_window=3, num_sinks=1)
    model = keras.Model(inputs, block(inputs))
    assert_close(model(X), block(X))
