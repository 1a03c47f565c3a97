import warnings

import keras
import numpy as np
import pytest
from backends import value_and_gradients
from keras import ops

from keras_darkformer.options import ATTENTION_MODES

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
    keras_mask,
    normal,
)

X = normal(BATCH, LENGTH, WIDTH)
CAUSAL = np.tri(LENGTH, dtype=bool)
ROWS = np.repeat(PADDING[:, None], LENGTH, axis=1)
TOKENS = np.where(PADDING, np.arange(1, LENGTH + 1), 0)

modes = pytest.mark.parametrize("mode", ATTENTION_MODES)
causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])


@modes
@causal_or_not
def test_a_padded_row_gives_what_it_gives_alone(mode, causal):
    layer = attention(attention_mode=mode, rope_max_wavelength=100.0)
    padded = arrays(layer(X, X, value_mask=PADDING, use_causal_mask=causal))
    for row, length in enumerate(PADDING.sum(axis=1)):
        alone = X[row : row + 1, :length]
        expected = call(layer, alone, alone, use_causal_mask=causal)
        assert_close(padded[row : row + 1, :length], expected)


@modes
@causal_or_not
@pytest.mark.parametrize("which", ["value_mask", "key_mask"])
def test_what_stands_in_the_padding_changes_nothing(mode, causal, which):
    layer = attention(attention_mode=mode)
    options = {which: PADDING, "use_causal_mask": causal}

    def real_tokens(x, options):
        return arrays(layer(x, x, **options))[PADDING]

    expected = real_tokens(X, options)
    # Exact mode multiplies by zero what linear mode leaves out.
    for number in [1e4] if mode == "exact" else [1e4, np.inf, np.nan]:
        dirty = np.where(PADDING[..., None], X, np.float32(number))
        assert_close(real_tokens(dirty, options), expected)
    assert differ(real_tokens(X, {}), expected)


@modes
def test_value_mask_and_key_mask_apply_together(mode):
    layer = attention(attention_mode=mode)
    other = np.arange(LENGTH) % 2 == 0
    other = np.stack([other, ~other])
    both = layer(X, X, value_mask=PADDING, key_mask=other)
    assert_close(both, layer(X, X, value_mask=PADDING & other))
    assert differ(both, layer(X, X, value_mask=PADDING))


@modes
def test_masked_queries_give_the_output_of_attending_to_nothing(mode):
    layer = attention(attention_mode=mode)
    output = arrays(layer(X, X, query_mask=PADDING))
    assert_close(output[PADDING], arrays(layer(X, X))[PADDING])
    nothing = layer(X, X, value_mask=PADDING & False)
    assert_close(nothing, np.broadcast_to(arrays(layer.output_dense.bias), X.shape))
    assert_close(output[~PADDING], arrays(nothing)[~PADDING])


@modes
def test_masks_of_an_embedding_are_used_and_go_on(mode):
    embedding = keras.layers.Embedding(LENGTH + 1, WIDTH, mask_zero=True)
    layer = attention(attention_mode=mode)
    embedded = embedding(TOKENS)
    output = layer(embedded, embedded)
    assert_close(keras_mask(output), PADDING)
    plain = arrays(embedded)
    assert_close(output, layer(plain, plain, query_mask=PADDING, value_mask=PADDING))
    assert differ(output, layer(plain, plain))
    assert keras_mask(layer(plain, plain)) is None

    inputs = keras.Input((LENGTH,), dtype="int32")
    symbolic = embedding(inputs)
    model = keras.Model(inputs, layer(symbolic, symbolic))
    assert_close(model(TOKENS), output)
    assert_close(model.predict(TOKENS, verbose=0), output)


@modes
def test_masked_inputs_cause_no_warning(mode):
    embedded = keras.layers.Embedding(LENGTH + 1, WIDTH, mask_zero=True)(TOKENS)
    layer = attention(attention_mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        layer(embedded, embedded)


@modes
def test_the_mask_that_goes_on_is_the_querys(mode):
    embedding = keras.layers.Embedding(LENGTH + 1, WIDTH, mask_zero=True)
    layer = attention(attention_mode=mode)
    output = layer(X, embedding(TOKENS))
    assert keras_mask(output) is None
    assert_close(output, layer(X, arrays(embedding(TOKENS)), value_mask=PADDING))
    output = layer(embedding(TOKENS), X)
    assert_close(keras_mask(output), PADDING)


def test_the_state_carries_no_mask():
    embedded = keras.layers.Embedding(LENGTH + 1, WIDTH, mask_zero=True)(TOKENS)
    output, state = attention()(embedded, embedded, return_state=True)
    assert_close(keras_mask(output), PADDING)
    assert [keras_mask(x) for x in state] == [None] * 3


@modes
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        pytest.param(ROWS[:, :1], {"value_mask": PADDING}, id="padding_in_one_row"),
        pytest.param(ROWS, {"value_mask": PADDING}, id="padding"),
        pytest.param(ROWS[:, None], {"value_mask": PADDING}, id="padding_with_a_head_axis"),
        pytest.param(CAUSAL, {"use_causal_mask": True}, id="causal"),
        pytest.param(CAUSAL[None], {"use_causal_mask": True}, id="causal_with_a_batch_axis"),
        pytest.param(
            ROWS & CAUSAL, {"value_mask": PADDING, "use_causal_mask": True}, id="causal_and_padding"
        ),
    ],
)
def test_an_attention_mask_does_what_the_other_masks_do(mode, mask, options):
    layer = attention(attention_mode=mode)
    assert_close(layer(X, X, attention_mask=mask), layer(X, X, **options))


@modes
def test_an_attention_mask_adds_to_the_other_masks(mode):
    layer = attention(attention_mode=mode)
    other = np.arange(LENGTH) % 2 == 0
    other = np.stack([other, ~other])
    output = layer(X, X, value_mask=other, attention_mask=ROWS, use_causal_mask=True)
    assert_close(output, layer(X, X, value_mask=other & PADDING, use_causal_mask=True))


def test_linear_mode_refuses_masks_it_cannot_express():
    mask = np.random.default_rng(0).random((BATCH, LENGTH, LENGTH)) < 0.5
    with pytest.raises(ValueError, match="can't express an arbitrary `attention_mask`"):
        attention()(X, X, attention_mask=mask)


def mask_model(mode, mask_shape):
    inputs, mask = keras.Input((LENGTH, WIDTH)), keras.Input(mask_shape, dtype="bool")
    layer = attention(attention_mode=mode)
    return layer, keras.Model([inputs, mask], layer(inputs, inputs, attention_mask=mask))


def test_linear_mode_refuses_masks_it_cannot_look_at():
    with pytest.raises(ValueError, match="no values yet"):
        mask_model("linear", (LENGTH, LENGTH))
    layer, model = mask_model("exact", (LENGTH, LENGTH))
    assert_close(model([X, ROWS]), layer(X, X, value_mask=PADDING))


@modes
def test_a_padding_mask_of_one_row_may_be_symbolic(mode):
    layer, model = mask_model(mode, (1, LENGTH))
    expected = layer(X, X, value_mask=PADDING)
    assert_close(model([X, ROWS[:, :1]]), expected)
    assert_close(model.predict([X, ROWS[:, :1]], verbose=0), expected)


@causal_or_not
def test_masked_tokens_pass_no_gradient(causal):
    """Neither the loss of real tokens nor that of padding reaches what the padding holds."""
    layer = attention()
    upstream = PADDING[..., None] * normal(*X.shape, seed=3)

    def scalar(x):
        output = layer(x, x, value_mask=PADDING, use_causal_mask=causal)
        return ops.sum(output * ops.convert_to_tensor(upstream))

    _, (gradient,) = value_and_gradients(scalar, X)
    assert not gradient[~PADDING].any()
    assert np.abs(gradient[PADDING]).max() > 1e-3
