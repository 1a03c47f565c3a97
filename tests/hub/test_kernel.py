"""Converted layers compute the dark kernel: exactly, or its estimate with no (t, t) tensor."""

import numpy as np
import pytest
from backends import largest_intermediate, to_numpy
from keras import ops

from keras_darkformer import convert_to_dark
from keras_darkformer.ops.reference import dark_attention_reference

from .models import FAMILIES, LENGTH, attentions, dark, gemma, gemma2, inputs, outputs, real

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

PADDING = real(LENGTH, 9, 5)


def projected(attention, x):
    """Query, key and value as the stock layer makes them."""
    query, key = attention.query_dense(x), attention.key_dense(x)
    if getattr(attention, "use_query_key_norm", False):
        query, key = attention.query_norm(query), attention.key_norm(key)
    return (
        attention._apply_rope(query, 0),
        attention._apply_rope(key, 0),
        attention.value_dense(x),
    )


def assert_attends(actual, expected, attention):
    """`expected` has yet to go through the output projection."""
    expected = np.einsum("btnh,nhd->btd", expected, to_numpy(attention.output_dense.kernel))
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(to_numpy(actual), expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("mask", [None, PADDING], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_layer_is_the_reference_between_its_own_projections(family, mask, rng):
    attention = attentions(dark(FAMILIES[family](), layers=[-1]))[-1]
    x = ops.convert_to_tensor(rng.standard_normal((3, LENGTH, 16)), "float32")
    expected, _ = dark_attention_reference(
        *to_numpy(projected(attention, x)),
        to_numpy(attention.feature_map.geometry.value),
        to_numpy(attention.feature_map.projection.value),
        causal=True,
        key_mask=mask,
    )
    actual = attention(x, attention_mask=None if mask is None else ops.cast(mask, "int32"))
    assert_attends(actual, expected, attention)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_layer_in_exact_mode_is_softmax_between_what_its_geometry_makes(family, rng):
    attention = attentions(dark(FAMILIES[family](), layers=[-1], attention_mode="exact"))[-1]
    x = ops.convert_to_tensor(rng.standard_normal((3, LENGTH, 16)), "float32")
    query, key, value = (to_numpy(part).astype("float64") for part in projected(attention, x))
    key, value = (np.repeat(part, 2, axis=2) for part in (key, value))  # a head for each query's
    geometry = np.repeat(to_numpy(attention.feature_map.geometry.value), 2, axis=0)
    query, key = (np.einsum("btnh,nrh->btnr", part, geometry) for part in (query, key))
    logits = np.einsum("btnr,bsnr->bnts", query, key) / np.sqrt(8)
    causal = np.tri(LENGTH, dtype=bool)
    weights = np.where(causal, np.exp(logits - logits.max(-1, keepdims=True)), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bnts,bsnh->btnh", weights, value)
    actual = attention(x, attention_mask=ops.convert_to_tensor(np.stack([causal] * 3)))
    assert_attends(actual, expected, attention)


def test_a_converted_sliding_window_layer_sees_all_the_past():
    """The first token reaches the last one, three windows on, through one local layer."""
    batch = inputs(LENGTH, LENGTH, LENGTH)
    batch["token_ids"][:] = batch["token_ids"][0]
    batch["token_ids"][1, 0] += 1

    def effect(model):
        logits = outputs(model, batch)[:, -1]
        return np.abs(logits[0] - logits[1]).max()

    source = gemma2(num_layers=1, soft_cap=None)
    assert effect(source) == 0
    assert effect(dark(source, layers="all", num_features=64)) > 1e-4


def test_padding_behind_changes_nothing_before_it():
    model = dark(gemma())
    whole, padded = inputs(LENGTH, LENGTH, LENGTH), inputs(LENGTH, 9, 1)
    expected, actual = outputs(model, whole), outputs(model, padded)
    for row, length in enumerate((LENGTH, 9, 1)):
        np.testing.assert_array_equal(padded["token_ids"][row, length:], 0)
        expected_row, actual_row = expected[row, :length], actual[row, :length]
        np.testing.assert_allclose(actual_row, expected_row, rtol=1e-4, atol=1e-4)


def test_with_many_features_linear_logits_approach_the_exact_ones():
    source = gemma()
    for attention in attentions(source):  # moderate logits: few enough features suffice
        for dense in (attention.query_dense, attention.key_dense):
            dense.kernel.assign(0.2 * to_numpy(dense.kernel.value))
    batch = inputs(LENGTH, 5, 9)
    exact = outputs(source, batch)

    def error(num_features):
        options = {"num_features": num_features, "geometry_scale": 1.0, "copy": True}
        error = np.abs(outputs(convert_to_dark(source, **options), batch) - exact)
        return error.mean() / np.abs(exact).mean()

    few, many = error(16), error(4096)
    assert few > 0.2
    assert many < 0.05


@pytest.mark.parametrize(("mode", "quadratic"), [("linear", False), ("exact", True)])
def test_only_exact_mode_makes_a_tensor_of_length_squared(mode, quadratic):
    length = 2048
    model = convert_to_dark(gemma(num_layers=1).backbone, num_features=16, attention_mode=mode)
    token_ids = np.ones((1, length), "int32")

    def forward(token_ids, padding_mask):
        return model({"token_ids": token_ids, "padding_mask": padding_mask})

    largest = largest_intermediate(forward, token_ids, np.ones_like(token_ids))
    assert (largest >= length**2) is quadratic
