"""`torch.compile` makes one graph of a layer or converted model, and one more for all lengths."""

import keras
import numpy as np
import pytest
from backends import BACKEND, to_numpy
from keras_hub.models import GemmaBackbone

from keras_darkformer import DarkAttention, convert_to_dark

from .models import SIZES, dark

if BACKEND != "torch":
    pytest.skip("a compiler of torch", allow_module_level=True)

import torch

HEADS = {"head_dim": 4, "num_query_heads": 2, "num_key_value_heads": 1, "num_features": 8}


def batch(length):
    values = np.random.default_rng(length).standard_normal((2, length, 8))
    return torch.tensor(values, dtype=torch.float32)


def layer():
    attention = DarkAttention(**HEADS, rope_max_wavelength=1e4)
    attention(batch(4), batch(4))
    return lambda x: attention(x, x, use_causal_mask=True)


def converted():
    inputs = keras.Input((None, 8))
    hidden = keras.layers.MultiHeadAttention(2, 4)(inputs, inputs, use_causal_mask=True)
    hidden = keras.layers.LayerNormalization()(inputs + hidden)
    model = keras.Model(inputs, keras.layers.Dense(3)(hidden))
    convert_to_dark(model, num_features=8)
    return model


def gemma():
    return dark(GemmaBackbone(num_layers=1, **SIZES))


def ids(length):
    return {
        "token_ids": torch.tensor(np.random.default_rng(length).integers(1, 20, (2, length))),
        "padding_mask": torch.ones((2, length), dtype=torch.bool),
    }


@pytest.mark.parametrize(
    ("make", "inputs", "lengths"),
    [
        pytest.param(layer, batch, {70: 1, 80: 2, 300: 2}, id="layer"),
        pytest.param(converted, batch, {70: 1, 80: 2, 300: 2}, id="converted"),
        pytest.param(gemma, ids, {70: 1}, id="gemma"),
    ],
)
def test_one_graph_then_one_for_all_lengths(make, inputs, lengths):
    torch._dynamo.reset()
    model, graphs = make(), []

    def backend(module, example):
        graphs.append(module)
        return module.forward

    program = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for length, count in lengths.items():
            output, expected = program(inputs(length)), model(inputs(length))
            np.testing.assert_allclose(to_numpy(output), to_numpy(expected), rtol=0, atol=1e-5)
            assert len(graphs) == count, length
