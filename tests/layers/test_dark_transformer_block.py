import keras
import numpy as np
import pytest
from backends import DEFAULT_JIT, MODES, compiled
from keras import ops

from keras_darkformer import DarkTransformerBlock
from keras_darkformer.options import ATTENTION_MODES

from .helpers import (
    ATTENTION_OPTIONS,
    BATCH,
    EXPONENTIAL_OPTIONS,
    LENGTH,
    OTHER_OPTIONS,
    PADDING,
    WIDTH,
    arrays,
    assert_close,
    assert_config_is_complete,
    call,
    differ,
    dtypes,
    keras_mask,
    normal,
    scrambled,
    shapes_and_dtypes,
)

SIZES = {"intermediate_dim": 24, "num_heads": 4, "num_key_value_heads": 2, "num_features": 8}
X = normal(BATCH, LENGTH, WIDTH)
TOKENS = np.where(PADDING, np.arange(1, LENGTH + 1), 0)

causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])


def block(seed=0, **options):
    """A built block, none of whose weights is at its initial value."""
    layer = DarkTransformerBlock(**SIZES | options, seed=seed)
    layer.build(X.shape)
    return scrambled(layer)


def language_model(length=None, num_blocks=2, **options):
    tokens = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(LENGTH + 1, WIDTH)(tokens)
    blocks = [DarkTransformerBlock(**SIZES, seed=seed, **options) for seed in range(num_blocks)]
    for layer in blocks:
        x = layer(x)
    return keras.Model(tokens, keras.layers.Dense(LENGTH + 1, dtype="float32")(x)), blocks


def fit_three_steps(model, jit):
    tokens = np.random.default_rng(0).integers(1, LENGTH + 1, (3 * BATCH, LENGTH + 1))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=jit)
    history = model.fit(tokens[:, :-1], tokens[:, 1:], batch_size=BATCH, verbose=0)
    return history.history["loss"]


@causal_or_not
@pytest.mark.parametrize("normalize_first", [False, True], ids=["post_norm", "pre_norm"])
def test_a_block_is_attention_and_a_feedforward_network_with_residuals(normalize_first, causal):
    layer = block(normalize_first=normalize_first, causal=causal, activation="gelu")

    def attend(x):
        return layer.attention(x, x, use_causal_mask=causal)

    def feedforward(x):
        hidden = keras.activations.gelu(
            x @ arrays(layer.feedforward_intermediate.kernel)
            + arrays(layer.feedforward_intermediate.bias)
        )
        return layer.feedforward_output(hidden)

    if normalize_first:
        middle = X + arrays(attend(layer.attention_norm(X)))
        expected = middle + arrays(feedforward(arrays(layer.feedforward_norm(middle))))
    else:
        middle = arrays(layer.attention_norm(X + arrays(attend(X))))
        expected = layer.feedforward_norm(middle + arrays(feedforward(middle)))
    assert_close(layer(X), expected)


@pytest.mark.parametrize("mode", ATTENTION_MODES)
@causal_or_not
def test_only_an_encoder_sees_the_future(causal, mode):
    layer = block(causal=causal, attention_mode=mode, rope_max_wavelength=100.0)
    changed = np.concatenate([X[:, :4], normal(BATCH, 3, WIDTH, seed=1)], axis=1)
    before, after = arrays([layer(X), layer(changed)])
    assert differ(before[:, 4:], after[:, 4:])
    if causal:
        assert_close(after[:, :4], before[:, :4])
    else:
        assert differ(before[:, :4], after[:, :4])


@causal_or_not
def test_a_padded_row_gives_what_it_gives_alone(causal):
    layer = block(causal=causal)
    dirty = np.where(PADDING[..., None], X, np.float32(np.nan))
    padded = arrays(layer(dirty, padding_mask=PADDING))
    for row, length in enumerate(PADDING.sum(axis=1)):
        alone = X[row : row + 1, :length]
        assert_close(padded[row : row + 1, :length], call(layer, alone))


def embedded():
    return keras.layers.Embedding(LENGTH + 1, WIDTH, mask_zero=True)(TOKENS)


def test_the_mask_of_an_embedding_is_used_and_goes_on():
    first, second = block(causal=False), block(causal=False, seed=1)
    x = embedded()
    plain = arrays(x)
    output = second(first(x))
    assert_close(keras_mask(output), PADDING)
    expected = second(first(plain, padding_mask=PADDING), padding_mask=PADDING)
    assert keras_mask(expected) is None
    # What padding gives is nobody's concern.
    assert_close(arrays(output)[PADDING], arrays(expected)[PADDING])
    assert differ(arrays(output)[PADDING], arrays(second(first(plain)))[PADDING])


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_the_mask_of_an_embedding_is_used_beside_a_state(dtype):
    layer = block(dtype=dtype)
    options = {"initial_state": layer.get_initial_state(BATCH), "return_state": True}
    x = embedded()
    output, after = layer(x, **options)
    assert_close(keras_mask(output), PADDING)
    assert [keras_mask(x) for x in after] == [None] * 3
    _, expected = layer(arrays(x), padding_mask=PADDING, **options)
    assert_close(after, expected)


@pytest.mark.parametrize("rope", [None, 100.0], ids=["", "rope"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_token_by_token_two_blocks_give_what_the_whole_gives(masked, rope):
    blocks = [block(seed, rope_max_wavelength=rope) for seed in range(2)]

    def step(x, mask, states):
        after = []
        for layer, state in zip(blocks, states, strict=True):
            x, state = layer(x, padding_mask=mask, initial_state=state, return_state=True)
            after.append(state)
        return x, after

    step = compiled(step) if DEFAULT_JIT else step
    mask = PADDING if masked else None
    outputs, states = [], [layer.get_initial_state(BATCH) for layer in blocks]
    shapes = shapes_and_dtypes(states)
    for t in range(LENGTH):
        now = slice(t, t + 1)
        output, states = step(X[:, now], None if mask is None else mask[:, now], states)
        outputs.append(output)
        assert shapes_and_dtypes(states) == shapes
    whole = step(X, mask, [None, None])
    assert_close((ops.concatenate(outputs, axis=1), states), whole, 1e-4)


@pytest.mark.parametrize("jit", MODES[-1:])
def test_fit_moves_every_geometry_and_no_projection(jit):
    model, blocks = language_model(LENGTH, rope_max_wavelength=100.0)

    def weights(name):
        return arrays([getattr(layer.attention.feature_map, name) for layer in blocks])

    geometry, projection = weights("geometry"), weights("projection")
    losses = fit_three_steps(model, jit)
    assert np.isfinite(losses).all()
    assert all(
        np.abs(after - before).max(axis=(1, 2)).min() > 1e-4  # each head's
        for before, after in zip(geometry, weights("geometry"), strict=True)
    )
    for before, after in zip(projection, weights("projection"), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.slow
def test_a_language_model_of_no_fixed_length_trains():
    model, _ = language_model(num_blocks=1, rope_max_wavelength=100.0)
    assert np.isfinite(fit_three_steps(model, DEFAULT_JIT)).all()
    assert model.predict(np.ones((1, 70), "int32"), verbose=0).shape == (1, 70, LENGTH + 1)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
def test_a_model_in_mixed_precision_trains_with_float32_features():
    model, blocks = language_model(LENGTH, 1, dtype="mixed_bfloat16", dropout=0.1)
    assert np.isfinite(fit_three_steps(model, DEFAULT_JIT)).all()
    for layer in blocks:
        feature_map = layer.attention.feature_map
        assert dtypes([feature_map.geometry, feature_map.projection]) == {"float32"}


def test_in_mixed_precision_the_state_is_float32_and_passes_unrounded():
    layer = block(dtype="mixed_bfloat16")
    output, state = call(layer, X, return_state=True)
    assert dtypes(output) == {"bfloat16"}
    assert dtypes(state) == {"float32"}
    nothing = PADDING & False
    _, after = call(layer, X, padding_mask=nothing, initial_state=state, return_state=True)
    assert_close(after, state, 0)


def test_dropout_acts_in_training_only():
    layer, without = block(dropout=0.5), block()
    without.set_weights(layer.get_weights())
    assert_close(layer(X), without(X))
    assert differ(layer(X, training=True), layer(X))
    assert differ(layer(X, training=True), layer(X, training=True))


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_symbolic_calls_promise_the_shapes_and_dtypes_of_real_ones(dtype):
    symbolic = keras.KerasTensor(X.shape)
    layer = block(rope_max_wavelength=100.0, dtype=dtype)
    real = call(layer, X, return_state=True)
    assert shapes_and_dtypes(layer(symbolic, return_state=True)) == shapes_and_dtypes(real)
    assert shapes_and_dtypes(layer(symbolic)) == shapes_and_dtypes(real[0])
    assert layer.compute_output_shape((None, None, WIDTH)) == (None, None, WIDTH)


def test_arguments_reach_the_sublayers():
    options = {
        "head_dim": 6,
        "num_features": 10,
        "dropout": 0.25,
        "layer_norm_epsilon": 1e-3,
        "kernel_initializer": "zeros",
        "bias_initializer": "ones",
        "attention_mode": "exact",
        "chunk_size": 3,
        "remat": True,
        "rope_max_wavelength": 50.0,
        "rank": 3,
        "projection": "gaussian",
        "train_geometry": False,
        "train_projection": True,
        "geometry_scale": 0.5,
    }
    layer = DarkTransformerBlock(**SIZES | options, seed=5)
    layer.build(X.shape)
    attention = layer.attention.get_config()
    names = [name for name in options if name in attention and "initializer" not in name]
    assert len(names) == len(options) - 3
    assert {name: attention[name] for name in names} == {name: options[name] for name in names}
    assert (attention["num_query_heads"], attention["num_key_value_heads"]) == (4, 2)
    assert attention["seed"] == 5
    assert layer.attention_norm.epsilon == layer.feedforward_norm.epsilon == 1e-3
    assert layer.branch_dropout.rate == 0.25
    denses = [layer.attention.query_dense, layer.feedforward_intermediate, layer.feedforward_output]
    for dense in denses:
        assert not arrays(dense.kernel).any()
        assert (arrays(dense.bias) == 1.0).all()
    assert tuple(layer.feedforward_intermediate.kernel.shape) == (WIDTH, 24)


def test_config_holds_every_argument():
    arguments = {
        "intermediate_dim": 24,
        "num_heads": 4,
        "dropout": 0.25,
        "activation": "gelu",
        "layer_norm_epsilon": 1e-3,
        "kernel_initializer": keras.initializers.RandomNormal(stddev=0.1, seed=1),
        "bias_initializer": keras.initializers.Constant(0.5),
        "normalize_first": False,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "causal": False,
        "rope_max_wavelength": 50.0,
    } | ATTENTION_OPTIONS
    assert_config_is_complete(DarkTransformerBlock, arguments, OTHER_OPTIONS, EXPONENTIAL_OPTIONS)


def test_a_width_that_heads_do_not_divide_needs_a_head_dim():
    with pytest.raises(ValueError, match=r"Without `head_dim`.*num_heads=3"):
        DarkTransformerBlock(24, 3).build(X.shape)
    layer = DarkTransformerBlock(24, 3, head_dim=4, num_features=8)
    assert layer(keras.KerasTensor(X.shape)).shape == X.shape


def test_a_block_has_no_state_before_it_is_built():
    layer = DarkTransformerBlock(**SIZES)
    with pytest.raises(ValueError, match="call it on an input or build it first"):
        layer.get_initial_state(BATCH)
    layer.build(X.shape)
    expected = [((BATCH, 2, 8, 4), "float32"), ((BATCH, 2, 8), "float32"), ((BATCH, 2), "float32")]
    assert shapes_and_dtypes(layer.get_initial_state(BATCH)) == expected


def test_exact_blocks_have_no_state():
    with pytest.raises(ValueError, match="`return_state` need"):
        block(attention_mode="exact")(X, return_state=True)
