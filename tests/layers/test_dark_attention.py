import inspect

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES

from keras_darkformer import DarkAttention
from keras_darkformer.ops import exact_dark_attention_scores
from keras_darkformer.options import ATTENTION_MODES

from .helpers import (
    ATTENTION_OPTIONS,
    BATCH,
    EXPONENTIAL_OPTIONS,
    HEADS,
    LENGTH,
    OTHER_OPTIONS,
    PADDING,
    WIDTH,
    arrays,
    assert_close,
    assert_config_is_complete,
    attention,
    call,
    differ,
    normal,
    reference_attention,
    shapes_and_dtypes,
    weight_gradients,
    weight_names,
)

X = normal(BATCH, LENGTH, WIDTH)
MEMORY, MEMORY_KEY = normal(BATCH, 5, 10, seed=1), normal(BATCH, 5, 6, seed=2)
CROSS_SHAPES = (X.shape, MEMORY.shape, MEMORY_KEY.shape)
MEMORY_MASK = np.arange(5) < np.array([[3], [4]])
Stock = keras.layers.GroupQueryAttention


def parameters(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def test_it_is_called_like_group_query_attention():
    stock, ours = parameters(Stock.call), parameters(DarkAttention.call)
    assert list(ours.items())[: len(stock)] == list(stock.items())


def test_it_is_constructed_like_group_query_attention():
    stock, ours = parameters(Stock), parameters(DarkAttention)
    left_out = {"sliding_window", "flash_attention", "use_gate", "num_key_value_heads", "kwargs"}
    assert {name: ours.get(name, "missing") for name in stock if name not in left_out} == {
        name: default for name, default in stock.items() if name not in left_out
    }
    assert list(ours)[:3] == list(stock)[:3]
    assert ours["num_key_value_heads"] is None  # there: required


def stock_twin(layer, *shapes):
    """Keras' own layer with the weights of `layer`."""
    twin = Stock(**{name: HEADS[name] for name in list(HEADS)[:3]})
    twin.build(*shapes)
    denses = (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense)
    twin.set_weights([weight for dense in denses for weight in dense.get_weights()])
    return twin


def random_mask(*shape):
    mask = np.random.default_rng(3).random(shape) < 0.5
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"use_causal_mask": True}, id="causal"),
        pytest.param({"value_mask": PADDING}, id="value_mask"),
        pytest.param({"key_mask": PADDING, "use_causal_mask": True}, id="key_mask_and_causal"),
        pytest.param({"value_mask": PADDING, "key_mask": random_mask(BATCH, 7)}, id="two_masks"),
        pytest.param({"attention_mask": random_mask(7, 7)}, id="attention_mask_of_rank_2"),
        pytest.param({"attention_mask": random_mask(BATCH, 7, 7)}, id="attention_mask_of_rank_3"),
        pytest.param({"attention_mask": random_mask(BATCH, 4, 7, 7)}, id="heads_differ"),
    ],
)
def test_exact_mode_with_identity_geometry_is_group_query_attention(options):
    layer = attention(attention_mode="exact")
    layer.feature_map.geometry.assign(np.stack([np.eye(4)] * 2))
    expected = stock_twin(layer, X.shape, X.shape)(X, X, return_attention_scores=True, **options)
    assert_close(layer(X, X, return_attention_scores=True, **options), expected)
    assert_close(layer(X, X, **options), expected[0])


def test_exact_cross_attention_is_group_query_attention():
    layer = attention(CROSS_SHAPES, attention_mode="exact")
    layer.feature_map.geometry.assign(np.stack([np.eye(4)] * 2))
    options = {"key_mask": MEMORY_MASK, "return_attention_scores": True}
    stock = stock_twin(layer, *CROSS_SHAPES)
    expected = call(stock, X, MEMORY, MEMORY_KEY, **options)
    assert_close(call(layer, X, MEMORY, MEMORY_KEY, **options), expected)


def test_exact_mode_uses_the_geometry():
    layer = attention(attention_mode="exact", rank=3)
    key = layer.key_dense(X)
    scores = exact_dark_attention_scores(layer.query_dense(X), key, layer.feature_map.geometry)
    assert_close(layer(X, X, return_attention_scores=True)[1], scores)
    layer.feature_map.geometry.assign(2.0 * layer.feature_map.geometry)
    assert differ(layer(X, X, return_attention_scores=True)[1], scores)


@pytest.mark.parametrize("rope", [None, 100.0], ids=["", "rope"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_linear_mode_agrees_with_the_reference(causal, masked, rope):
    layer = attention(rope_max_wavelength=rope)
    key_mask = PADDING if masked else None
    expected = reference_attention(layer, X, X, causal=causal, key_mask=key_mask)
    assert_close(layer(X, X, use_causal_mask=causal, value_mask=key_mask), expected, 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_key_value_heads": None}, id="a_key_for_every_query"),
        pytest.param({"num_key_value_heads": 1}, id="one_key_for_all_queries"),
        pytest.param({"use_bias": False, "rank": 3}, id="no_bias_and_low_rank"),
        pytest.param({"chunk_size": 2, "projection": "gaussian"}, id="small_chunks"),
    ],
)
def test_linear_mode_agrees_with_the_reference_for_other_heads(options):
    layer = attention(**options)
    expected = reference_attention(layer, X, X, causal=True)
    assert_close(call(layer, X, X, use_causal_mask=True), expected, 1e-4)


@pytest.mark.parametrize("rope", [None, 100.0], ids=["", "rope"])
def test_linear_cross_attention_agrees_with_the_reference(rope):
    layer = attention(CROSS_SHAPES, rope_max_wavelength=rope)
    expected = reference_attention(layer, X, MEMORY, MEMORY_KEY, key_mask=MEMORY_MASK)
    assert_close(call(layer, X, MEMORY, MEMORY_KEY, key_mask=MEMORY_MASK), expected, 1e-4)


def test_linear_mode_with_many_features_estimates_exact_mode():
    linear = attention(num_features=4096)
    exact = attention(num_features=4096, attention_mode="exact")
    exact.set_weights(linear.get_weights())
    x = 0.3 * X
    expected = arrays(exact(x, x))
    error = np.abs(arrays(call(linear, x, x)) - expected).max()
    assert error < 0.1 * np.abs(expected - arrays(exact(x, x, value_mask=PADDING))).max()


PROJECTIONS = [
    f"{name}/{kind}"
    for name in ("query", "key", "value", "attention_output")
    for kind in ("kernel", "bias")
]


@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_all_that_is_trainable_has_a_gradient(mode):
    layer = attention(attention_mode=mode)
    fixed = ["projection", "proposal", "log_weight", "query_shift", "key_shift"]
    assert weight_names(layer.non_trainable_weights) == [f"feature_map/{name}" for name in fixed]
    gradients = weight_gradients(layer, X, X, use_causal_mask=True)
    assert sorted(gradients) == sorted([*PROJECTIONS, "feature_map/geometry"])
    # Softmax does not see what the logits of one query have in common.
    expected = set(gradients) - ({"key/bias"} if mode != "linear" else set())
    assert {name for name, gradient in gradients.items() if np.abs(gradient).max() > 1e-4} == (
        expected
    )


def test_a_trained_projection_has_a_gradient_and_a_fixed_geometry_has_none():
    layer = attention(train_projection=True, train_geometry=False)
    gradients = weight_gradients(layer, X, X)
    assert sorted(gradients) == sorted([*PROJECTIONS, "feature_map/projection"])
    assert gradients["feature_map/projection"].any()


def attention_weights(layer):
    """What causal attention gives to each key, of shape (b, n, t, s)."""
    query, key = layer.query_dense(X), layer.key_dense(X)
    if layer.computes_exactly(LENGTH, LENGTH, causal=True):
        weights = exact_dark_attention_scores(query, key, layer.feature_map.geometry, causal=True)
        return arrays(weights)
    one_hot = np.broadcast_to(np.eye(LENGTH, dtype="float32")[:, None], (BATCH, LENGTH, 2, LENGTH))
    return arrays(call(layer.feature_map.attend, query, key, one_hot, causal=True)).swapaxes(1, 2)


@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_dropout_drops_whole_tokens_for_all_queries_and_keeps_the_mean(mode):
    below = {"exact_below": LENGTH + 1} if mode == "auto" else {}
    layer = attention(attention_mode=mode, dropout=0.5, **below)
    layer.query_dense.set_weights([0.1 * w for w in layer.query_dense.get_weights()])
    layer.value_dense.set_weights([np.zeros((WIDTH, 2, 4)), np.ones((2, 4))])
    layer.output_dense.set_weights([np.eye(WIDTH).reshape(4, 4, WIDTH), np.zeros(WIDTH)])
    weights = attention_weights(layer).astype("float64")

    def kept(**options):
        """What dropout multiplied each token with, of shape (b, n, s, h).

        Values are ones and the output projection does nothing, so the output
        is `P z`, P the attention weights: solved for z.
        """
        output = arrays(layer(X, X, use_causal_mask=True, **options))
        return np.linalg.solve(weights, output.reshape(BATCH, LENGTH, 4, 4).swapaxes(1, 2))

    for options in ({}, {"training": False}):
        assert_close(kept(**options), np.ones((BATCH, 4, LENGTH, 4)), 1e-3)
    tokens = np.concatenate([kept(training=True) for _ in range(10)])
    assert_close(tokens, np.round(tokens), 1e-2)
    tokens = np.round(tokens)
    assert set(tokens.ravel()) == {0.0, 2.0}
    assert (tokens == tokens[..., :1]).all()  # every channel
    np.testing.assert_array_equal(tokens[:, ::2], tokens[:, 1::2])  # heads of one key/value head
    assert (tokens[:, 0] != tokens[:, 2]).any()
    assert abs(tokens[:, ::2, :, 0].mean() - 1.0) < 0.25  # of 280 tokens: four deviations


def test_dropout_differs_from_call_to_call():
    layer = attention(dropout=0.5)
    assert differ(layer(X, X, training=True), layer(X, X, training=True))
    without = attention()
    without.set_weights(layer.get_weights())
    assert_close(layer(X, X), without(X, X))


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("linear", {"return_state": True}),
        ("exact", {"return_attention_scores": True}),
    ],
)
def test_symbolic_calls_promise_the_shapes_and_dtypes_of_real_ones(mode, options, dtype):
    layer = attention(attention_mode=mode, dtype=dtype, rope_max_wavelength=100.0)
    symbolic = keras.KerasTensor(X.shape)
    real, promised = call(layer, X, X, **options), layer(symbolic, symbolic, **options)
    assert shapes_and_dtypes(promised) == shapes_and_dtypes(real)
    assert shapes_and_dtypes(layer(symbolic, symbolic)) == shapes_and_dtypes(real[0])
    assert layer.compute_output_shape((None, None, 3), (None, 5, 4)) == (None, None, 3)


def test_scores_of_cross_attention_have_the_length_of_the_keys():
    layer = attention(CROSS_SHAPES, attention_mode="exact")
    symbolic = [keras.KerasTensor(shape) for shape in CROSS_SHAPES]
    promised = layer(*symbolic, return_attention_scores=True)
    real = call(layer, X, MEMORY, MEMORY_KEY, return_attention_scores=True)
    assert shapes_and_dtypes(promised) == shapes_and_dtypes(real)
    assert tuple(real[1].shape) == (BATCH, 4, LENGTH, 5)


def functional_model(length=None, **options):
    inputs = keras.Input((length, WIDTH))
    layer = DarkAttention(**HEADS, seed=0, **options)
    return keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True)), layer


def test_a_functional_model_takes_every_length():
    model, layer = functional_model(rope_max_wavelength=100.0)
    assert model.output_shape == (None, None, WIDTH)
    for length in (LENGTH, 70, 5):
        x = normal(BATCH, length, WIDTH)
        assert_close(model.predict(x, verbose=0), call(layer, x, x, use_causal_mask=True))


@pytest.mark.parametrize("jit", MODES)
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_a_model_trains_and_predicts(mode, jit):
    model, layer = functional_model(LENGTH, attention_mode=mode, rope_max_wavelength=100.0)
    model.compile("sgd", "mse", jit_compile=jit)
    before = arrays(layer.feature_map.geometry)
    expected = model.predict_on_batch(X)
    assert_close(expected, layer(X, X, use_causal_mask=True))
    loss = model.train_on_batch(X, normal(*X.shape, seed=1))
    assert np.isfinite(loss)
    assert differ(model.predict_on_batch(X), expected)
    assert np.abs(arrays(layer.feature_map.geometry) - before).max() > 1e-6


def test_linear_mode_has_no_scores():
    layer = attention()
    for x in (X, keras.KerasTensor(X.shape)):
        with pytest.raises(ValueError, match=r'return_attention_scores.*attention_mode="exact"'):
            layer(x, x, return_attention_scores=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_query_heads": 4, "num_key_value_heads": 3}, "`num_query_heads` must be a multiple"),
        ({"num_query_heads": 0}, "`num_query_heads` must be"),
        ({"attention_mode": "cosine"}, "`attention_mode` must be one of .*'cosine'"),
        ({"head_dim": 5, "rope_max_wavelength": 100.0}, "`head_dim` must be even .*5"),
        ({"num_features": 0}, "`num_features` must be a positive integer"),
        ({"projection": "sobol"}, "`projection` must be one of"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        DarkAttention(**HEADS | arguments)


def test_regularizers_constraints_and_initializers_apply_to_the_projections():
    layer = attention(
        kernel_regularizer=keras.regularizers.L2(0.1),
        bias_constraint=keras.constraints.NonNeg(),
        kernel_initializer=keras.initializers.RandomNormal(seed=0),
        bias_initializer="ones",
    )
    layer(X, X)
    denses = (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense)
    expected = 0.1 * sum(np.square(arrays(dense.kernel)).sum() for dense in denses)
    assert_close(sum(arrays(layer.losses)), expected, 1e-4)
    assert all(dense.bias.constraint is layer.dense_options.bias_constraint for dense in denses)
    assert all(arrays(dense.bias).mean() > 0.5 for dense in denses)


def test_an_initializer_with_a_seed_does_not_repeat_itself():
    """... beyond what `keras.layers.GroupQueryAttention` does with it."""
    initializer = keras.initializers.RandomNormal(seed=None)
    layer = DarkAttention(**HEADS, kernel_initializer=initializer)
    layer.build(X.shape, X.shape)
    assert differ(layer.key_dense.kernel, layer.value_dense.kernel)


def test_config_holds_every_argument():
    arguments = {
        "head_dim": 6,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "dropout": 0.25,
        "rope_max_wavelength": 50.0,
        "use_bias": False,
        "kernel_initializer": keras.initializers.RandomNormal(stddev=0.1, seed=1),
        "bias_initializer": keras.initializers.Constant(0.5),
        "kernel_regularizer": keras.regularizers.L1(0.1),
        "bias_regularizer": keras.regularizers.L2(0.2),
        "activity_regularizer": keras.regularizers.L2(0.3),
        "kernel_constraint": keras.constraints.MaxNorm(2.0),
        "bias_constraint": keras.constraints.NonNeg(),
    } | ATTENTION_OPTIONS
    assert_config_is_complete(DarkAttention, arguments, OTHER_OPTIONS, EXPONENTIAL_OPTIONS)


@pytest.mark.parametrize("mode", ["exact"] if BACKEND == "jax" else ATTENTION_MODES)
def test_integers_are_floats_to_it(mode):
    layer, whole = attention(attention_mode=mode), np.round(3 * X).astype("int64")
    found = layer(whole, whole, use_causal_mask=True)
    as_floats = whole.astype("float32")
    assert_close(arrays(found), arrays(layer(as_floats, as_floats, use_causal_mask=True)), 1e-6)
