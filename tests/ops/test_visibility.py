"""Which keys a query of `dark_attention` sees: none of the future, none that is masked."""

import numpy as np
import pytest

from keras_darkformer.ops.reference import dark_attention_reference

from .cases import Case, assert_close, attend, attend_with_gradients

causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def scaled_keys(case, scales):
    """The case's arrays with the keys of each position scaled."""
    return case.replaced(key=case.arrays[1] * np.asarray(scales, "float32")[:, None, None])


# Causality.


@pytest.mark.parametrize(("length", "present"), [(130, 40), (1500, 1100)])
def test_future_tokens_do_not_change_past_outputs(length, present):
    case = Case(length=length, causal=True, heads=(2, 1))
    future = (np.arange(length) >= present)[:, None, None]
    key_scale = np.array([0.0, 1.0, 1e6], "float32")[:, None, None, None]
    # The first row as it is, in each of the others another future.
    tokens = [
        np.concatenate([x, np.where(future, scale * x[:, ::-1] + np.zeros_like(key_scale), x)])
        for x, scale in zip(case.arrays[:3], (1.0, key_scale, 1e3), strict=True)
    ]
    before, *others = attend(case, (*tokens, case.arrays[3]))
    for after in others:
        np.testing.assert_allclose(after[:present], before[:present], rtol=0, atol=1e-6)
        assert np.abs(after - before)[present:].max() > 0.1


def test_future_tokens_get_no_gradient_from_past_outputs():
    case, present = Case(length=1500, causal=True, heads=(2, 1)), 750
    past = (np.arange(case.length) < present)[:, None, None]
    _, gradients = attend_with_gradients(case, upstream=np.where(past, case.upstream, 0))
    for gradient in gradients[:3]:
        assert gradient[:, :present].any()
        assert not gradient[:, present:].any()


@pytest.mark.parametrize(
    ("first", "last"), [(60.0, 0.1), (0.1, 60.0)], ids=["shrinking", "growing"]
)
def test_keys_whose_norms_change_along_the_sequence_are_all_seen(first, last):
    case = Case(length=300, causal=True)
    arrays = scaled_keys(case, np.geomspace(first, last, case.length))
    output = attend(case, arrays)
    expected, _ = dark_attention_reference(*arrays, **case.options)
    assert (np.abs(output).max(axis=-1) > 0).all()
    # Log-features reach -10^3, where float32 has steps of 10^-4.
    assert_close(output, expected, 2e-3)


def test_small_keys_after_large_ones_do_not_drown_them():
    # A maximum over the whole sequence would put the large keys' features below 1e-38.
    case = Case(length=130, causal=True)
    arrays = scaled_keys(case, np.where(np.arange(case.length) < 65, 30.0, 0.0))
    expected, _ = dark_attention_reference(*arrays, **case.options)
    assert_close(attend(case, arrays), expected, 2e-3)


# Padding.

LENGTH, PADDED = 90, 20
POSITIONS = {"front": 0, "middle": 33, "behind": LENGTH - PADDED}
GARBAGE = np.array([1e30, np.nan, np.inf], "float32")
# Rows of a batch: each garbage at each position.
KEY_MASK = np.stack(
    [
        (np.arange(LENGTH) < start) | (np.arange(LENGTH) >= start + PADDED)
        for start in POSITIONS.values()
        for _ in GARBAGE
    ]
)
FILL = np.tile(GARBAGE, len(POSITIONS))[:, None, None, None]


def padded_case(causal):
    return Case(length=LENGTH, batch=len(KEY_MASK), heads=(4, 2), value_dim=6, causal=causal)


def kept(x):
    """Each row without its padding."""
    return np.stack([row[mask] for row, mask in zip(x, KEY_MASK, strict=True)])


@causal_or_not
def test_what_stands_at_masked_keys_changes_nothing(causal):
    case = padded_case(causal)
    key, value = (np.where(KEY_MASK[:, :, None, None], x, FILL) for x in case.arrays[1:3])
    output, gradients = attend_with_gradients(
        case, case.replaced(key=key, value=value), key_mask=KEY_MASK
    )
    expected, expected_gradients = dark_attention_reference(
        *case.arrays, **case.options | {"key_mask": KEY_MASK}, upstream=case.upstream
    )
    assert_close(output, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)
    assert not gradients.key[~KEY_MASK].any()
    assert not gradients.value[~KEY_MASK].any()


@causal_or_not
def test_masked_keys_are_as_good_as_absent(causal):
    case = padded_case(causal)
    output = attend(case, key_mask=KEY_MASK)
    *tokens, geometry = case.arrays
    expected, _ = dark_attention_reference(*map(kept, tokens), geometry, **case.options)
    assert_close(kept(output), expected)


@causal_or_not
def test_mask_of_one_row_is_for_all_rows(causal):
    case = Case(length=70, batch=2, heads=(4, 2), causal=causal)
    key_mask = KEY_MASK[:1, :70]
    expected, _ = dark_attention_reference(
        *case.arrays, **case.options | {"key_mask": np.repeat(key_mask, 2, axis=0)}
    )
    assert_close(attend(case, key_mask=key_mask), expected)


@causal_or_not
def test_masked_keys_do_not_drown_large_ones(causal):
    # Their zeros would have larger features than any key, by a factor of e^500.
    case = Case(length=100, batch=2, causal=causal, masked=True)
    arrays = scaled_keys(case, np.full(case.length, 30.0))
    expected, _ = dark_attention_reference(*arrays, **case.options)
    assert_close(attend(case, arrays), expected, 2e-3)


@causal_or_not
def test_rows_with_nothing_to_attend_to_are_zero_and_pass_no_gradient(causal):
    case = Case(length=70, batch=2, heads=(4, 2), causal=causal, weighted=True)
    key_mask = np.array([[False], [True]]) & np.ones((2, case.length), bool)
    output, gradients = attend_with_gradients(case, key_mask=key_mask)
    for x in (output, *gradients[:3]):
        assert not x[0].any()
    expected, expected_gradients = dark_attention_reference(
        *case.arrays, **case.options | {"key_mask": key_mask}, upstream=case.upstream
    )
    assert_close(output, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)
