"""`exact_dark_attention` against softmax in NumPy float64."""

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES, run
from keras import ops

from keras_darkformer.ops import exact_dark_attention, exact_dark_attention_scores
from keras_darkformer.ops.reference import dark_attention_reference

from .cases import Case, assert_close, attend, attend_with_gradients

ODD = {"batch": 2, "rank": 5, "value_dim": 6}
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def exact(case, arrays=None, *, gradients=False, function=exact_dark_attention, **options):
    """`exact_dark_attention` of the case."""

    def call(*tensors, causal, key_mask, projection, log_weight, **options):
        return function(*tensors, causal=causal, key_mask=key_mask, **options)

    call_it = attend_with_gradients if gradients else attend
    return call_it(case, arrays, function=call, **options)


def weights_reference(case, key_mask=None, attention_mask=True):
    """`(b, n, t, s)`, in float64; zero for queries with nothing to attend to."""
    query, key, _, geometry = (x.astype("float64") for x in case.arrays)
    groups = case.heads[0] // case.heads[1]
    geometry, key = np.repeat(geometry, groups, axis=0), np.repeat(key, groups, axis=2)
    logits = np.einsum("btnh,nrh,nrg,bsng->bnts", query, geometry, geometry, key)
    visible = np.ones_like(logits, bool) & attention_mask
    key_mask = case.key_mask if key_mask is None else key_mask
    if key_mask is not None:
        visible &= key_mask[:, None, None, :]
    if case.causal:
        visible &= np.tri(case.length, dtype=bool)
    weights = np.exp(logits * case.head_dim**-0.5) * visible
    sums = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)


def output_reference(case, **masks):
    value = np.repeat(case.arrays[2].astype("float64"), case.heads[0] // case.heads[1], axis=2)
    return np.einsum("bnts,bsnv->btnv", weights_reference(case, **masks), value)


CASES = [
    Case(length=1, causal=True),
    Case(length=40, heads=(4, 2), causal=True, masked=True, **ODD),
    Case(length=40, heads=(4, 1), masked=True, **ODD),
    Case(length=40, heads=(4, 2), causal=True, rank=11),
    Case(length=40, value_dim=11),
    Case(length=7, key_length=40, heads=(4, 2), masked=True, **ODD),
]


@pytest.mark.parametrize("jit", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_is_softmax_attention_of_transformed_queries_and_keys(case, jit):
    assert_close(exact(case, jit=jit), output_reference(case), 1e-5)


@pytest.mark.parametrize("case", CASES[1:3] + CASES[5:], ids=str)
def test_scores_are_the_weights_of_the_values(case):
    scores = exact(
        case, function=lambda q, k, v, m, **options: exact_dark_attention_scores(q, k, m, **options)
    )
    assert_close(scores, weights_reference(case), 1e-5)


@causal_or_not
def test_attention_mask_applies_together_with_the_others(causal, rng):
    case = Case(length=20, heads=(4, 2), causal=causal, masked=True, **ODD)
    attention_mask = rng.random((2, 4, 20, 20)) < 0.5
    attention_mask[1, :, 7] = False
    output = exact(case, attention_mask=attention_mask)
    assert_close(output, output_reference(case, attention_mask=attention_mask), 1e-5)
    assert not output[1, 7].any()


@causal_or_not
def test_key_mask_of_one_row_is_for_all_rows(causal, rng):
    case = Case(length=20, heads=(4, 2), causal=causal, **ODD)
    key_mask = rng.random((1, 20)) < 0.7
    assert_close(exact(case, key_mask=key_mask), output_reference(case, key_mask=key_mask), 1e-5)


@causal_or_not
def test_identity_geometry_makes_it_ordinary_attention(causal):
    case = Case(length=40, heads=(4, 2), batch=2, causal=causal)
    *tokens, geometry = case.arrays
    identity = np.broadcast_to(np.eye(8, dtype="float32"), geometry.shape)
    ordinary = run(lambda q, k, v: ops.dot_product_attention(q, k, v, is_causal=causal), *tokens)
    assert_close(exact(case, (*tokens, identity)), ordinary, 1e-5)


@causal_or_not
def test_rows_with_nothing_to_attend_to_are_zero_and_pass_no_gradient(causal):
    case = Case(length=20, heads=(4, 2), causal=causal, **ODD)
    key_mask = np.array([[False], [True]]) & np.ones((2, 20), bool)
    key_mask[1, :3] = False
    output, gradients = exact(case, gradients=True, key_mask=key_mask)
    assert_close(output, output_reference(case, key_mask=key_mask), 1e-5)
    for x in (output, *gradients):
        assert np.isfinite(x).all()
    for x in (output, *gradients[:3]):
        assert not x[0].any()
    assert not gradients.key[~key_mask].any()
    assert not gradients.value[~key_mask].any()
    if causal:
        assert not gradients.query[1, :3].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_output_has_the_dtype_of_the_inputs(dtype):
    if BACKEND == "jax" and dtype == "float16":
        pytest.skip("jax.nn.dot_product_attention has no float16 on CPU")
    case = Case(length=20, heads=(4, 2), masked=True)

    def function(*tensors, **options):
        output = exact_dark_attention(*(ops.cast(x, dtype) for x in tensors), **options)
        assert keras.backend.standardize_dtype(output.dtype) == dtype
        return ops.cast(output, "float32")

    assert_close(exact(case, function=function), output_reference(case), 0.05)


def test_gradients_are_the_limit_of_those_of_many_features():
    # The hand-written gradients of the reference, at so many features that they are exact's.
    case = Case(length=6, heads=(1, 1), num_features=100_000, scale=0.3)
    _, gradients = exact(case, gradients=True)
    _, expected = dark_attention_reference(*case.arrays, **case.options, upstream=case.upstream)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert_close(gradient, expected_gradient, 0.03)
