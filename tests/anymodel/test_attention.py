"""Keras' own attention layers as dark ones: exact mode is softmax, linear mode the definition."""

import keras
import numpy as np
import pytest
from backends import BACKEND, compiled, further, on_one_backend, to_numpy
from keras import ops
from layers.helpers import assert_close, differ, keras_mask, weight_gradients

from keras_darkformer import DarkAttention, convert_to_dark

from .models import (
    CAUSAL,
    KINDS,
    LENGTH,
    OTHER_PADDING,
    PADDING,
    WIDTH,
    X,
    Y,
    Z,
    built,
    outputs,
    reference,
    weights_of,
)

EXACT = {"attention_mode": "exact", "geometry_scale": 1.0, "num_features": 8}
PAIRS = np.random.default_rng(3).random((2, LENGTH, LENGTH)) < 0.7
# Inputs and arguments of a call.
CALLS = {
    "self": ((X, X), {}),
    "cross": ((X, Y, Z), {}),
    "causal": ((X, X), {"use_causal_mask": True}),
    "padding": ((X, Y), {"value_mask": OTHER_PADDING, "key_mask": OTHER_PADDING[::-1]}),
    "pairs": ((X, X), {"attention_mask": PAIRS, "value_mask": PADDING}),
}
# What linear attention makes of it: the masks of the definition.
MASKS = {
    "self": {},
    "cross": {},
    "causal": {"causal": True},
    "padding": {"key_mask": OTHER_PADDING & OTHER_PADDING[::-1]},
}


def dark(layer, **options):
    return convert_to_dark(layer, **{"num_features": 8, "seed": 3} | options)


def answers(layer, calls=CALLS):
    """Of all calls, compiled as one on JAX, where each would take seconds."""
    given = {
        name: {"inputs": inputs, "masks": {k: v for k, v in options.items() if v is not True}}
        for name, (inputs, options) in CALLS.items()
        if name in calls
    }

    def all_of_them(given):
        return {
            name: layer(*x["inputs"], **x["masks"], use_causal_mask=name == "causal")
            for name, x in given.items()
        }

    return to_numpy(compiled(all_of_them)(given) if BACKEND == "jax" else all_of_them(given))


# Keras' own attention layers take no other size of values on JAX.
STOCK_KINDS = [
    kind for kind in KINDS if BACKEND != "jax" or kind not in ("of other sizes", "gated")
]


@pytest.mark.parametrize("kind", STOCK_KINDS)
def test_exact_mode_is_the_stock_layer(kind):
    layer = built(kind)
    expected, before = answers(layer), weights_of(layer)
    assert dark(layer, **EXACT) is layer
    found = answers(layer)
    for name in CALLS:
        assert_close(found[name], expected[name])
    assert weights_of(layer).keys() == before.keys()
    layer.feature_map.geometry.assign(layer.feature_map.geometry * 0.5)
    assert differ(answers(layer, ["self"])["self"], expected["self"])


@pytest.mark.parametrize("kind", ["multi-head", "grouped and gated"])
def test_gradients_of_exact_mode_are_those_of_the_stock_layer(kind):
    layer = built(kind)
    masks = {"use_causal_mask": True, "value_mask": PADDING}
    expected = weight_gradients(layer, X, X, **masks)
    found = weight_gradients(dark(layer, **EXACT), X, X, **masks)
    assert len(found) == len(expected) + 1
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


@pytest.mark.parametrize("kind", ["multi-head", "grouped"])
def test_exact_mode_returns_scores_and_drops_weights_as_the_stock_layer(kind):
    layer = built(kind, dropout=0.5, seed=4)
    twin = built(kind, dropout=0.5, seed=4)
    twin.set_weights(layer.get_weights())
    dark(layer, **EXACT)
    for mine, stock in zip(
        layer(X, X, return_attention_scores=True, training=True),
        twin(X, X, return_attention_scores=True, training=True),
        strict=True,
    ):
        assert_close(mine, stock)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_mode_is_the_definition(kind):
    layer = dark(built(kind))
    found = answers(layer, MASKS)
    for name, masks in MASKS.items():
        expected = reference(layer, *CALLS[name][0], **masks)
        assert_close(found[name], expected, 1e-4)
    symbolic = layer(*(keras.Input(x.shape[1:]) for x in (X, Y)))
    assert tuple(symbolic.shape[1:]) == expected.shape[1:]


def test_attention_masks_that_are_padding_or_causal_are_read():
    layer = dark(built("multi-head"))
    keys = reference(layer, X, X, key_mask=PADDING)
    both = reference(layer, X, X, key_mask=PADDING, causal=True)
    for mask, expected in (
        (PADDING[:, None], keys),
        (np.repeat(PADDING[:, None], LENGTH, axis=1), keys),
        (PADDING[:, None, None], keys),
        (CAUSAL & PADDING[:, None], both),
        ((CAUSAL & PADDING[:, None])[:, None], both),
    ):
        assert_close(outputs(layer, X, X, attention_mask=mask), expected, 1e-4)
    alone = outputs(layer, X, X, attention_mask=CAUSAL)
    assert_close(alone, reference(layer, X, X, causal=True), 1e-4)
    given = outputs(layer, X, X, use_causal_mask=True, attention_mask=PADDING[:, None])
    assert_close(given, both, 1e-4)


def test_other_masks_are_refused_by_the_layers_path_with_what_to_pass():
    inputs = keras.Input((LENGTH, WIDTH))
    mask = keras.Input((LENGTH, LENGTH), dtype="bool")
    layer = keras.layers.MultiHeadAttention(2, 4, name="mine")
    model = keras.Model([inputs, mask], layer(inputs, inputs, attention_mask=mask))
    convert_to_dark(model, num_features=8)
    with pytest.raises(ValueError, match=r"Attention layer 'mine': .*arbitrary `attention_mask`"):
        model([X, PAIRS])
    causal = np.broadcast_to(CAUSAL, PAIRS.shape)
    if BACKEND == "torch":
        assert_close(outputs(model, [X, causal]), reference(layer, X, X, causal=True), 1e-4)
    else:
        with pytest.raises(ValueError, match=r"(?s)'mine': .*Pass `use_causal_mask=True`"):
            compiled(lambda x, y: model([x, y]))(ops.convert_to_tensor(X), causal)
    with pytest.raises(ValueError, match=r"'mine': .*no values yet"):
        layer(inputs, inputs, attention_mask=mask)
    for options in ({"return_attention_scores": True}, {"attention_mask": PAIRS[:, :, :3]}):
        with pytest.raises(ValueError, match="'mine': `"):
            layer(X, X, **options)


def test_masks_of_keras_reach_the_layer_and_go_on():
    tokens = np.array([[1, 2, 3, 0, 0, 0], [3, 2, 1, 4, 5, 0]])
    embedding = keras.layers.Embedding(9, WIDTH, mask_zero=True)
    for kind in ("multi-head", "grouped"):
        layer = dark(built(kind))
        x = embedding(tokens)
        output = layer(x, x)
        expected = reference(layer, to_numpy(x), to_numpy(x), key_mask=tokens > 0)
        assert_close(to_numpy(output)[tokens > 0], expected[tokens > 0], 1e-4)
        assert (to_numpy(keras_mask(output)) == (tokens > 0)).all()
        bias = to_numpy(layer._output_dense.bias.value)
        assert_close(to_numpy(output)[tokens == 0], np.broadcast_to(bias, (4, WIDTH)))


@pytest.mark.parametrize("kind", ["multi-head", "grouped"])
def test_a_sliding_window_is_kept_exactly_in_linear_time(kind):
    layer = built(kind, sliding_window=2)
    masks = {"use_causal_mask": True, "value_mask": PADDING}
    expected = outputs(layer, X, X, **masks)
    dark(layer)
    assert (layer.feature_map.kind, layer.feature_map.memory.sliding_window) == ("none", 2)
    assert layer.is_linear
    real = PADDING
    assert_close(outputs(layer, X, X, **masks)[real], expected[real])
    with pytest.raises(ValueError, match=r"need `use_causal_mask=True`.*sliding_window=2"):
        layer(X, X)


def test_a_window_of_the_conversion_meets_the_last_tokens_exactly():
    layer = dark(built("grouped"), sliding_window=2, num_sinks=1)
    masks = {"causal": True, "sliding_window": 2, "num_sinks": 1}
    masks["far_offset"] = to_numpy(layer.feature_map.far_offset.value)
    assert_close(outputs(layer, X, X, use_causal_mask=True), reference(layer, X, X, **masks), 1e-4)


def test_dropout_drops_whole_tokens_the_same_for_every_query():
    layer = built("multi-head", dropout=0.5, seed=1)
    with pytest.warns(UserWarning, match=r"drops from attention layers \[0\]: .*whole tokens"):
        dark(layer)
    same = np.broadcast_to(X[:, :1], X.shape)  # a query like any other
    dropped = outputs(layer, same, X, training=True)
    assert_close(dropped, np.broadcast_to(dropped[:, :1], dropped.shape))
    assert differ(dropped, outputs(layer, same, X))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", *further("mixed_float16")])
def test_mixed_precision_changes_little(policy):
    for kind in ("gated", "grouped"):
        whole, half = built(kind), built(kind, dtype=policy)
        half.set_weights(whole.get_weights())
        assert {w.dtype for w in dark(half).feature_map.weights} == {"float32"}
        found = half(X, X, use_causal_mask=True)
        assert keras.backend.standardize_dtype(found.dtype) == policy.removeprefix("mixed_")
        expected = outputs(dark(whole), X, X, use_causal_mask=True)
        assert_close(to_numpy(ops.cast(found, "float32")), expected, 0.1)


@on_one_backend
def test_a_config_makes_the_layer_dark_again():
    for kind in KINDS:
        layer = dark(built(kind, name="mine"), rank=2)
        config = layer.get_config()
        again = type(layer).from_config(config)
        again.build_from_config(layer.get_build_config())
        again.set_weights(layer.get_weights())
        assert again.get_config() == config
        assert_close(outputs(again, X, X), outputs(layer, X, X))


def test_a_layer_that_is_not_built_becomes_dark_when_it_is():
    layer = dark(KINDS["grouped"](name="late"))
    expected = dark(built("grouped"))
    output = layer(X, X, use_causal_mask=True)
    assert layer.feature_map.path == "late/feature_map"
    assert_close(output, reference(layer, X, X, causal=True), 1e-4)
    assert_close(layer.feature_map.projection, expected.feature_map.projection)


@pytest.mark.parametrize("kind", ["multi-head", "grouped"])
def test_dark_attention_takes_the_weights_of_a_stock_layer(kind):
    layer = built(kind)
    layer.trainable = False
    alike = DarkAttention.from_attention(layer, attention_mode="exact", num_features=4, name="new")
    assert (alike.name, alike.trainable, alike.built) == ("new", False, True)
    for options in ({}, {"use_causal_mask": True, "value_mask": PADDING}):
        assert_close(outputs(alike, X, X, **options), outputs(layer, X, X, **options))
    local = built(kind, sliding_window=2)
    alike, causal = DarkAttention.from_attention(local), {"use_causal_mask": True}
    assert_close(outputs(alike, X, X, **causal), outputs(local, X, X, **causal))
    again = DarkAttention.from_config(alike.get_config())
    assert again.options == alike.options


def test_dark_attention_refuses_layers_that_it_can_not_be():
    for layer, reason in (
        (built("gated"), "has a gate"),
        (KINDS["multi-head"](), "must be a built"),
        (keras.layers.Dense(2), "must be a built"),
        (built("of other sizes"), "values are of another size"),
    ):
        with pytest.raises(ValueError, match=reason):
            DarkAttention.from_attention(layer)
    narrow = keras.layers.MultiHeadAttention(2, 4, output_shape=3)
    narrow.build(X.shape, X.shape)
    with pytest.raises(ValueError, match=r"its queries \(`output_shape`\). Use `keras_darkformer"):
        DarkAttention.from_attention(narrow)
