"""Layers compute under every `floatx` and dtype that stock layers take."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_darkformer import DarkAttention, DarkTransformerBlock

from .helpers import HEADS, PADDING, WIDTH, arrays, call, normal

KINDS = {
    "rope": {"rope_max_wavelength": 100.0},
    "exponential": {"feature_map": "exponential"},
    "memory": {"sliding_window": 3, "num_sinks": 1, "cache_size": 2},
    "exact": {"attention_mode": "exact"},
}


@pytest.fixture
def floatx(request):
    before = keras.config.floatx()
    keras.config.set_floatx(request.param)
    yield request.param
    keras.config.set_floatx(before)


def output_of(layer, x):
    """Attention fed in two pieces, the last of one token, where there is a state."""
    given = {"use_causal_mask": True}
    if not layer.is_linear:
        return call(layer, x, x, value_mask=PADDING, **given)
    given["return_state"] = True
    first, last = x[:, :-1], x[:, -1:]
    output, state = call(layer, first, first, value_mask=PADDING[:, :-1], **given)
    after, _ = call(layer, last, last, value_mask=PADDING[:, -1:], initial_state=state, **given)
    return ops.concatenate([output, after], axis=1)


@pytest.mark.parametrize(
    ("floatx", "dtype", "kind"),
    [
        *(("float64", "float64", kind) for kind in KINDS),
        ("float64", "float32", "memory"),
        ("float32", "float64", "memory"),
        ("float16", "float32", "memory"),
    ],
    indirect=["floatx"],
)
def test_outputs_are_those_of_float32_in_the_dtype_of_stock_layers(floatx, dtype, kind):
    x = normal(2, 7, WIDTH)
    layers = [DarkAttention(**HEADS | KINDS[kind], seed=0, dtype=d) for d in ("float32", dtype)]
    for layer in layers:
        layer.build(x.shape, x.shape)
    layers[1].set_weights(arrays(layers[0].weights))
    expected, found = (
        arrays(output_of(layer, ops.cast(x, layer.compute_dtype))) for layer in layers
    )
    stock = keras.layers.Dense(2, dtype=dtype)
    assert found.dtype == arrays(stock(ops.cast(x, dtype))).dtype
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("floatx", ["float64"], indirect=True)
def test_a_block_computes_and_is_fitted_in_float64(floatx):
    inputs = keras.Input((7, WIDTH), dtype="float64")
    block = DarkTransformerBlock(8, 4, num_features=8, rope_max_wavelength=100.0, dtype="float64")
    model = keras.Model(inputs, block(inputs))
    model.compile("sgd", "mse", run_eagerly=keras.backend.backend() == "tensorflow")
    x = normal(2, 7, WIDTH).astype("float64")
    assert np.isfinite(model.fit(x, x, verbose=0).history["loss"]).all()
