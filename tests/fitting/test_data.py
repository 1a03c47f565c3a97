"""Fits to degenerate and to bad data, and the sample they are made with."""

import warnings

import numpy as np
import pytest

from keras_darkformer.fitting import (
    LayerStatistics,
)

from .fits import (
    HEAD_DIM,
    HEADS,
    LENGTH,
    MASK,
    assert_fit,
    assert_same,
    data,
    fitted,
    methods,
)

# Degenerate and bad data.

X = np.random.default_rng(8).standard_normal((4, LENGTH, HEADS, HEAD_DIM)).astype("float32")
ONES = np.ones_like(X)
DEGENERATE = {
    "constant_keys": (X, ONES),
    "constant_queries": (ONES, X),
    "constant_both": (ONES, 2 * ONES),
    "zeros": (0 * ONES, 0 * ONES),
    "few_tokens": (X[:1, :3], X[:1, :3] + 1),
    "a_token": (X[:1, :1], X[:1, :1] + 1),
    "single_tokens": (X[:, :1], X[:, :1] + 1),
    "duplicates": (np.repeat(X[:1, :2], 12, axis=1), np.repeat(X[:1, 2:4], 12, axis=1)),
    "one_direction": (X * np.eye(8, dtype="float32")[0], X * np.eye(8, dtype="float32")[0]),
    "large": (1e3 * X, 1e3 * X[::-1]),
    "huge": (1e8 * X, 1e8 * X[::-1]),
    "tiny": (1e-12 * X, 1e-12 * X[::-1]),
    "far_from_the_origin": (X + 100, X[::-1] - 300),
}


@methods
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_leave_finite_weights(name, place, method):
    query, key = DEGENERATE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for causal in (False, True):
            fit = fitted(query, key, place, method=method, how={"causal": causal})
            assert_fit(fit)


@methods
@pytest.mark.parametrize("name", ["query", "key"])
def test_what_is_not_finite_or_masked_altogether_is_refused(name, place, method):
    bad = X.copy()
    bad[1, 3, 0, 2] = np.nan
    query, key = (bad, X) if name == "query" else (X, bad)
    with pytest.raises(ValueError, match=f"`{name}` must be finite"):
        fitted(query, key, place, method=method)
    with pytest.raises(ValueError, match="was masked: there is nothing to fit"):
        fitted(X, X, place, method=method, how={f"{name}_mask": np.zeros(X.shape[:2], bool)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": X[:, :, :1]}, "`query` does not fit 2 key/value heads"),
        ({"key": X[..., :4]}, "`key` does not fit 2 key/value heads"),
        ({"key": X[0]}, "`query` and `key` must have the same batch size"),
        ({"key": X[:2]}, "`query` and `key` must have the same batch size"),
        ({"query_mask": np.ones((4, 23), bool)}, r"`query_mask` must have shape .* = \(4, 24\)"),
        ({"key_mask": np.ones((3, 24), bool)}, "`key_mask` must have shape"),
        ({"key_mask": np.ones((4, 24, 1), bool)}, "`key_mask` must have shape"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else None,
)
def test_what_does_not_fit_is_named(arguments, message):
    seen = LayerStatistics(HEADS, HEAD_DIM, needs_sample=True, max_tokens=100, seed=0)
    with pytest.raises(ValueError, match=message):
        seen.update(**{"query": X, "key": X} | arguments)


def test_masks_of_numbers_and_of_one_row_are_masks():
    mask = np.arange(LENGTH) < 13
    whole = np.stack([mask] * 4)
    first, *others = (
        fitted(*data(), method="clusters", how={"query_mask": x, "key_mask": x, "causal": True})
        for x in (whole, mask[None], whole.astype("int32"))
    )
    for other in others:
        assert_same(first, other, rtol=0)


# Samples.


def test_a_sample_is_of_whole_sequences_within_its_tokens_and_grows_no_further():
    query, key = data(groups=2)
    seen = LayerStatistics(HEADS, HEAD_DIM, needs_sample=True, max_tokens=50, seed=0)
    for row in range(4):
        part = slice(row, row + 1)
        seen.update(query[part], key[part], key_mask=MASK[part], causal=True)
    sample = seen.of_head(1).sample
    assert sample.query.shape == (2, LENGTH, 2, HEAD_DIM)
    assert sample.causal
    kept = [next(r for r in range(4) if (key[r, :, 1] == x).all()) for x in sample.key]
    assert len(set(kept)) == 2
    np.testing.assert_array_equal(sample.query, query[kept][:, :, 2:])
    np.testing.assert_array_equal(sample.key_mask, MASK[kept])
    assert sample.query_mask.all()


def test_sequences_of_different_lengths_are_padded_and_long_ones_cut():
    query, key = data()
    seen = LayerStatistics(HEADS, HEAD_DIM, needs_sample=True, max_tokens=20, seed=0)
    for length in (3, 5, 24):
        seen.update(query[:1, :length], key[:1, :length])
    sample = seen.of_head(0).sample
    lengths = sample.key_mask.sum(axis=1)
    assert lengths.max() <= 20
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(sample.key[row, :length], key[0, :length, 0])
        assert not sample.key[row, length:].any()
    none = LayerStatistics(HEADS, HEAD_DIM, needs_sample=False, max_tokens=20, seed=0)
    none.update(query, key)
    assert none.of_head(0).sample is None


def test_every_sequence_may_be_the_one_that_stays():
    query, key = data()
    kept = set()
    for seed in range(30):
        seen = LayerStatistics(HEADS, HEAD_DIM, needs_sample=True, max_tokens=LENGTH, seed=seed)
        for row in range(4):
            seen.update(query[row : row + 1], key[row : row + 1])
        (one,) = seen.of_head(0).sample.key
        kept.add(next(row for row in range(4) if (key[row, :, 0] == one).all()))
    assert kept == {0, 1, 2, 3}


def test_only_so_many_tokens_are_refined_on():
    few, all_ = (fitted(*data(), how={"max_tokens": n}) for n in (24, 10**6))
    assert (few.weights["geometry"] != all_.weights["geometry"]).any()
    assert_fit(fitted(*data(), how={"max_tokens": 1}))
