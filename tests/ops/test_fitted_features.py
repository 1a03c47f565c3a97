"""What fits features to data, against the float64 reference: geometries of the queries' own,
weights, shifts, and a window of the exact kernel beside them; features of any kernel."""

import functools

import numpy as np
import pytest
from backends import MODES, run, value_and_gradients
from keras import ops

from keras_darkformer.ops import (
    dark_attention,
    exact_dark_attention,
    initial_state,
)
from keras_darkformer.ops.attention import attend as attend_by_features
from keras_darkformer.ops.features import fold_exponential
from keras_darkformer.ops.reference import dark_attention_reference

from .cases import Case, assert_close, attend, attend_with_gradients, reference
from .states import assert_state_is_of, empty_state, in_pieces, mask_for_pieces, unscaled

FITTED = {"untied": True, "shifted": True, "weighted": True}
ODD = {"batch": 2, "rank": 5, "value_dim": 6, "masked": True, **FITTED}
WINDOWED = Case(length=33, heads=(4, 2), causal=True, window=6, **ODD)


def assert_agrees_with_reference(case, jit):
    output, gradients = attend_with_gradients(case, jit=jit)
    expected, expected_gradients = reference(case)
    assert_close(output, expected)
    for name in gradients._fields:
        assert_close(getattr(gradients, name), getattr(expected_gradients, name))


@pytest.mark.parametrize("jit", MODES)
def test_output_and_gradients_agree_with_the_reference(jit):
    assert_agrees_with_reference(WINDOWED, jit)


@pytest.mark.parametrize(
    "case",
    [
        Case(length=33, heads=(4, 2), causal=True, **ODD),
        Case(length=9, key_length=20, heads=(4, 1), **ODD),
    ],
    ids=str,
)
def test_output_and_gradients_agree_with_the_reference_without_a_window(case):
    assert_agrees_with_reference(case, MODES[0].values[0])


@pytest.mark.parametrize(
    "case",
    [
        Case(length=20, heads=(2, 1), causal=True, shifted=True),
        Case(length=20, heads=(2, 2), causal=True, window=5, rank=11),
        Case(length=20, heads=(4, 2), causal=True, window=5, window_alone=True, **ODD),
    ],
    ids=str,
)
def test_output_agrees_with_the_reference_for_some_of_them(case):
    assert_close(attend(case), reference(case)[0])


@pytest.mark.parametrize("window", [None, 5])
def test_shifts_without_a_geometry_are_those_of_the_identity(window):
    case = Case(length=20, heads=(4, 2), causal=True, shifted=True, weighted=True, window=window)
    identity = np.stack([np.eye(case.head_dim)] * 2)
    expected, _ = dark_attention_reference(*case.arrays[:3], identity, **case.options)

    def function(query, key, value, _, **options):
        return dark_attention(query, key, value, None, **options)

    assert_close(attend(case, function=function), expected)


def test_all_that_fits_features_can_be_trained(rng):
    case, step = WINDOWED, 1e-5
    names = ("projection", "query_geometry", "log_weight", "query_shift", "key_shift", "far_offset")
    weights = [case.options[name] for name in names]

    def scalar(*weights):
        output = dark_attention(
            *case.arrays, **case.options | dict(zip(names, weights, strict=True))
        )
        return ops.sum(output * ops.convert_to_tensor(case.upstream))

    def scalar_reference(**changes):
        output, _ = dark_attention_reference(*case.arrays, **case.options | changes)
        return np.sum(output * case.upstream)

    _, gradients = value_and_gradients(scalar, *weights)
    for name, weight, gradient in zip(names, weights, gradients, strict=True):
        direction = rng.standard_normal(weight.shape)
        above, below = (scalar_reference(**{name: weight + s * direction}) for s in (step, -step))
        assert_close(np.sum(gradient * direction), (above - below) / (2 * step))


@pytest.mark.parametrize("window", [None, 3])
def test_softmax_is_the_limit_of_many_features_whatever_shifts_and_geometries(window, rng):
    case = Case(length=12, heads=(2, 1), causal=True, scale=0.4, num_features=8192)
    geometry = np.eye(8) + 0.05 * rng.standard_normal((1, 8, 8))
    shifts = 0.2 * rng.standard_normal((2, 1, 8)).astype("float32")
    # M_q' M_k = I: softmax's kernel.
    inverse = np.linalg.inv(geometry).swapaxes(1, 2).astype("float32")
    output = attend(
        case,
        case.replaced(geometry=geometry.astype("float32")),
        query_geometry=inverse,
        query_shift=shifts[0],
        key_shift=shifts[1],
        sliding_window=window,
    )
    exact = run(lambda *x: exact_dark_attention(*x, causal=True), *case.arrays[:3])
    uniform = np.cumsum(case.arrays[2], axis=1) / np.arange(1, 13)[:, None, None]
    error = np.abs(output - exact).max()
    assert error < 0.25 * np.abs(np.repeat(uniform, 2, axis=2) - exact).max()


def test_window_as_long_as_the_sequence_is_softmax_whatever_the_features():
    output = attend(WINDOWED, sliding_window=WINDOWED.length)
    exact = run(
        lambda *x: exact_dark_attention(*x, causal=True, key_mask=WINDOWED.key_mask),
        *WINDOWED.arrays[:3],
    )
    assert_close(output, exact, 1e-5)


# In pieces.

PIECES = [1, 1, 14, 1, 1, 14, 1]  # single tokens go through M and W one after the other


@pytest.mark.parametrize(
    "changes",
    [{}, {"window": 6}, {"window": 6, "window_alone": True}],
    ids=["features", "window", "window-alone"],
)
def test_sequence_in_pieces_gives_the_outputs_and_the_state_of_the_whole(changes):
    case = Case(length=sum(PIECES), heads=(4, 2), causal=True, **ODD, **changes)
    key_mask = mask_for_pieces(case.batch, PIECES)
    expected, _ = dark_attention_reference(*case.arrays, **case.options | {"key_mask": key_mask})

    def step(query, key, value, mask, state):
        more = {"key_mask": mask, "initial_state": state, "return_state": True}
        return dark_attention(query, key, value, case.arrays[3], **case.options | more)

    output, state = in_pieces(step, empty_state(case), case.arrays[:3], key_mask, PIECES)
    assert_close(output, expected)
    assert_state_is_of(state, case, key_mask)


# Features of any kernel.


def feature_attention(query, key, value, query_kernel, key_kernel, key_bias, **options):
    """Attention with exponential features, as `ExponentialFeatureMap` folds them."""
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    features = fold_exponential(query_kernel, key_kernel, key_bias)
    return attend_by_features(query, key, value, features, **options)


DIRECT = Case(length=sum(PIECES), heads=(4, 2), batch=2, value_dim=6, masked=True)


@functools.lru_cache
def kernels():
    rng = np.random.default_rng(5)
    shapes = ((2, 8, 16), (2, 8, 16), (2, 16))
    return tuple(0.5 * rng.standard_normal(shape).astype("float32") for shape in shapes)


def feature_attention_reference(query, key, value, query_kernel, key_kernel, key_bias, visible):
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    key, value = (np.repeat(x, 2, axis=2) for x in (key, value))
    query_kernel, key_kernel, key_bias = (
        np.repeat(x, 2, axis=0) for x in (query_kernel, key_kernel, key_bias)
    )
    phi_q = np.exp(np.einsum("btnh,nhm->bntm", query, query_kernel))
    phi_k = np.exp(np.einsum("bsnh,nhm->bnsm", key, key_kernel) + key_bias[:, None])
    weights = phi_q @ phi_k.swapaxes(2, 3) * visible
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    return np.einsum("bnts,bsnv->btnv", weights, value)


def assert_state_is_of_kernels(state, written):
    key, value = (x.astype("float64") for x in DIRECT.arrays[1:3])
    features = np.exp(np.einsum("bskh,khm->bskm", key, kernels()[1]) + kernels()[2])
    features *= written[:, :, None, None]
    kv_state, key_state = unscaled(state)
    assert_close(key_state, features.sum(axis=1))
    assert_close(kv_state, np.einsum("bskm,bskv->bkmv", features, value))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_features_of_any_kernel_agree_with_their_definition(causal, rng):
    visible = DIRECT.key_mask[:, None, None, :]
    if causal:
        visible = visible & np.tri(DIRECT.length, dtype=bool)
    arrays = (*DIRECT.arrays[:3], *kernels())
    upstream, step = DIRECT.upstream, 1e-5

    def scalar(*arrays):
        output = feature_attention(*arrays, causal=causal, key_mask=DIRECT.key_mask)
        return ops.sum(output * ops.convert_to_tensor(upstream)), output

    (_, output), gradients = value_and_gradients(scalar, *arrays, has_aux=True)
    assert_close(output, feature_attention_reference(*arrays, visible))
    for index, (x, gradient) in enumerate(zip(arrays, gradients, strict=True)):
        direction = rng.standard_normal(x.shape)

        def moved(size, index=index, direction=direction):
            changed = [x.astype("float64") for x in arrays]
            changed[index] += size * direction
            return np.sum(feature_attention_reference(*changed, visible) * upstream)

        assert_close(np.sum(gradient * direction), (moved(step) - moved(-step)) / (2 * step))


def test_features_of_any_kernel_in_pieces_are_those_of_the_whole():
    key_mask = DIRECT.key_mask
    visible = key_mask[:, None, None, :] & np.tri(DIRECT.length, dtype=bool)
    expected = feature_attention_reference(*DIRECT.arrays[:3], *kernels(), visible)

    def step(query, key, value, mask, state):
        more = {"key_mask": mask, "initial_state": state, "return_state": True}
        return feature_attention(query, key, value, *kernels(), causal=True, **more)

    empty = initial_state(2, 2, 16, 6)
    output, state = in_pieces(step, empty, DIRECT.arrays[:3], key_mask, PIECES)
    assert_close(output, expected)
    assert_state_is_of_kernels(state, key_mask)


def test_write_mask_says_which_features_of_any_kernel_enter_the_state():
    visible = DIRECT.key_mask[:, None, None, :] & np.tri(DIRECT.length, dtype=bool)
    expected = feature_attention_reference(*DIRECT.arrays[:3], *kernels(), visible)
    write_mask = np.arange(DIRECT.length) < np.array([[9], [20]])

    def function(*arrays):
        masks = {"key_mask": DIRECT.key_mask, "write_mask": write_mask}
        return feature_attention(*arrays, causal=True, return_state=True, **masks)

    output, state = run(function, *DIRECT.arrays[:3], *kernels())
    assert_close(output, expected)
    assert_state_is_of_kernels(state, DIRECT.key_mask & write_mask)
