"""The judge is judged: its gradients by finite differences, its sums by simpler formulas."""

import numpy as np
import pytest
from backends import numpy_only

from keras_darkformer.ops import draw_projection
from keras_darkformer.ops.reference import dark_attention_reference, dark_state_reference

from .cases import Case, assert_close, reference

numpy_only()

SMALL = Case(
    length=5, heads=(4, 2), batch=2, head_dim=3, rank=4, value_dim=2, num_features=5, weighted=True
)


FITTED = {"untied": True, "shifted": True, "masked": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": True, "masked": True},
        FITTED,
        {"shifted": True, "causal": True, "window": 2},
        {**FITTED, "causal": True, "window": 2},
    ],
    ids=str,
)
def test_gradients_agree_with_central_differences(changes):
    case = Case(**vars(SMALL) | changes)
    arrays = [x.astype("float64") for x in case.arrays]
    step = 1e-5

    def scalar():
        return np.sum(dark_attention_reference(*arrays, **case.options)[0] * case.upstream)

    for x, gradient in zip(arrays, reference(case)[1], strict=True):
        differences = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            value = x[index]
            x[index] = value + step
            above = scalar()
            x[index] = value - step
            differences[index] = (above - scalar()) / (2 * step)
            x[index] = value
        assert_close(gradient, differences, 1e-8)


@pytest.mark.parametrize(
    "fitted", [{}, {"weighted": True, "untied": True, "shifted": True}], ids=str
)
def test_state_read_by_queries_is_the_output(fitted):
    case = Case(length=9, batch=2, masked=True, **fitted)
    query, key, value, geometry = (x.astype("float64") for x in case.arrays)
    projection = case.options["projection"]
    options = {name: x for name, x in case.options.items() if name != "causal"}
    kv_state, key_state = dark_state_reference(key, value, geometry, **options)
    if case.untied:
        geometry = case.options["query_geometry"]
    # All that is constant to a query, or to a query's features, is left out.
    projected = np.einsum("btkh,krh->btkr", query * case.head_dim**-0.25, geometry)
    features = np.exp(np.einsum("btkr,kmr->btkm", projected, projection))
    output = np.einsum("btkm,bkmv->btkv", features, kv_state)
    output /= np.einsum("btkm,bkm->btk", features, key_state)[..., None]
    assert_close(output, reference(case)[0], 1e-12)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_many_features_approach_softmax_attention(causal):
    case = Case(length=12, heads=(1, 1), scale=0.3)
    query, key, value, _ = (x.astype("float64") for x in case.arrays)
    output, _ = dark_attention_reference(
        query, key, value, np.eye(8)[None], draw_projection(50_000, 8, seed=0), causal=causal
    )
    weights = np.exp(query[0, :, 0] @ key[0, :, 0].T * 8**-0.5)
    weights = np.tril(weights) if causal else weights
    expected = weights @ value[0, :, 0] / weights.sum(axis=1, keepdims=True)
    assert_close(output[0, :, 0], expected, 0.02)
