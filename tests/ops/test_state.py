"""The state of `dark_attention`: a sequence in pieces is the whole."""

import keras
import numpy as np
import pytest
from backends import DEFAULT_JIT, compiled, run, to_numpy, value_and_gradients
from keras import ops

from keras_darkformer.ops import dark_attention, dark_attention_state, initial_state
from keras_darkformer.ops.reference import dark_state_reference

from .cases import Case, assert_close, attend, reference

ODD = {"batch": 2, "rank": 5, "value_dim": 6, "masked": True}
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def empty_state(case):
    value_dim = case.value_dim or case.head_dim
    return initial_state(case.batch, case.heads[1], case.num_features, value_dim)


def pieces(case, arrays, sizes):
    """Query, key, value and key mask of one piece after another."""
    stops = np.cumsum(sizes)
    assert stops[-1] == case.length
    for start, stop in zip(stops - sizes, stops, strict=True):
        mask = None if case.key_mask is None else case.key_mask[:, start:stop]
        yield *(x[:, start:stop] for x in arrays[:3]), mask


def in_pieces(case, sizes):
    """Causal output fed piece by piece, each through the same function, and the last state."""
    options = {name: x for name, x in case.options.items() if name != "key_mask"}
    geometry = case.arrays[3]

    def step(query, key, value, mask, state):
        return dark_attention(
            *(query, key, value, geometry),
            **options,
            key_mask=mask,
            initial_state=state,
            return_state=True,
        )

    step = compiled(step) if DEFAULT_JIT else step
    outputs, state = [], empty_state(case)
    shapes = [tuple(x.shape) for x in state]
    for piece in pieces(case, case.arrays, sizes):
        output, state = step(*piece, state)
        outputs.append(to_numpy(output))
        assert [tuple(x.shape) for x in state] == shapes
        assert {keras.backend.standardize_dtype(x.dtype) for x in state} == {"float32"}
    return np.concatenate(outputs, axis=1), to_numpy(state)


def unscaled(state):
    """The sums themselves."""
    kv_state, key_state, log_scale = (np.asarray(x, "float64") for x in state)
    scale = np.exp(log_scale)[..., None]
    return kv_state * scale[..., None], key_state * scale


def assert_same_state(actual, expected):
    for x, y in zip(unscaled(actual), unscaled(expected), strict=True):
        assert_close(x, y)


def whole(case):
    """Output and state of one call."""
    return attend(case, return_state=True)


@causal_or_not
def test_state_is_the_sum_over_keys_of_features_and_of_features_times_values(causal):
    case = Case(length=100, heads=(4, 2), causal=causal, **ODD)
    _, state = whole(case)
    _, key, value, geometry = case.arrays
    expected = dark_state_reference(
        key, value, geometry, case.options["projection"], key_mask=case.key_mask
    )
    for actual, sums in zip(unscaled(state), expected, strict=True):
        assert_close(actual, sums)


@causal_or_not
def test_what_fills_up_the_last_block_is_not_in_the_state(causal):
    case = Case(length=1103, heads=(1, 1), causal=causal)
    output, state = whole(case)
    assert_close(output, reference(case)[0])
    _, key, value, geometry = case.arrays
    expected = dark_state_reference(key, value, geometry, case.options["projection"])
    for actual, sums in zip(unscaled(state), expected, strict=True):
        assert_close(actual, sums)


def test_sequence_in_pieces_gives_the_outputs_of_the_whole():
    # The first piece is masked in one row: it starts with nothing to attend to.
    case = Case(length=301, heads=(4, 2), causal=True, weighted=True, **ODD)
    output, state = in_pieces(case, [1, 62, 1, 200, 37])
    expected, expected_state = whole(case)
    assert_close(output, expected, 1e-5)
    assert_same_state(state, expected_state)


def test_sequence_token_by_token_gives_the_outputs_of_the_whole():
    case = Case(length=40, heads=(4, 2), causal=True, weighted=True, **ODD)
    output, state = in_pieces(case, [1] * 40)
    expected, expected_state = whole(case)
    assert_close(output, expected, 1e-5)
    assert_same_state(state, expected_state)


def test_gradients_flow_through_the_state():
    case = Case(length=30, heads=(4, 2), causal=True, **ODD)

    def scalar(*arrays):
        outputs, state = [], None
        for *piece, mask in pieces(case, arrays, [7, 1, 22]):
            output, state = dark_attention(
                *(*piece, arrays[3]),
                **case.options | {"key_mask": mask},
                initial_state=state,
                return_state=True,
            )
            outputs.append(output)
        return ops.sum(ops.concatenate(outputs, axis=1) * ops.convert_to_tensor(case.upstream))

    _, gradients = value_and_gradients(scalar, *case.arrays)
    for gradient, expected in zip(gradients, reference(case)[1], strict=True):
        assert_close(gradient, expected)


def test_queries_of_the_last_keys_and_a_state_see_all_keys():
    case = Case(length=20, key_length=80, heads=(4, 2), weighted=True, **ODD)
    options = {name: x for name, x in case.options.items() if name not in ("key_mask", "causal")}

    def function(query, key, value, geometry):
        state = None
        for stop, size in ((10, 10), (11, 1), (50, 39)):
            piece = slice(stop - size, stop)
            state = dark_attention_state(
                *(key[:, piece], value[:, piece], geometry),
                **options,
                key_mask=case.key_mask[:, piece],
                initial_state=state,
            )
        return dark_attention(
            *(query, key[:, 50:], value[:, 50:], geometry),
            **options,
            key_mask=case.key_mask[:, 50:],
            initial_state=state,
        )

    assert_close(run(function, *case.arrays), reference(case)[0], 1e-4)


@causal_or_not
def test_state_without_the_output_is_the_state_with_it(causal):
    case = Case(length=100, heads=(4, 2), causal=causal, weighted=True, **ODD)
    options = {name: x for name, x in case.options.items() if name != "causal"}
    state = run(lambda *arrays: dark_attention_state(*arrays, **options), *case.arrays[1:])
    assert_same_state(state, whole(case)[1])


@causal_or_not
def test_log_scale_is_the_largest_log_feature_of_the_keys_seen(causal):
    # 100 tokens do not fill their chunks, and what fills them up is not seen.
    case = Case(length=100, causal=causal, masked=True, scale=30.0)
    _, (_, key_state, log_scale) = whole(case)
    _, key, _, geometry = (x.astype("float64") for x in case.arrays)
    projected = np.einsum("bskh,krh->bskr", key * case.head_dim**-0.25, geometry)
    log_features = np.einsum("bskr,kmr->bskm", projected, case.options["projection"])
    log_features -= 0.5 * np.sum(projected**2, axis=-1, keepdims=True)
    expected = np.max(log_features, axis=(1, 3), where=case.key_mask[..., None, None], initial=-1e9)
    np.testing.assert_allclose(log_scale, expected, rtol=1e-4)
    assert (key_state.max(axis=-1) >= 0.99).all()


@causal_or_not
def test_masked_keys_leave_the_state_as_it_was(causal):
    case = Case(length=20, causal=causal, masked=True)
    nothing = np.zeros_like(case.key_mask)
    output, state = attend(case, return_state=True, key_mask=nothing)
    assert not output.any()
    for actual, expected in zip(state, to_numpy(empty_state(case)), strict=True):
        np.testing.assert_array_equal(actual, expected)
