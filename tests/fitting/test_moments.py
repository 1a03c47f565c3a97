"""One pass gives the moments of NumPy, however the data come in."""

import numpy as np
import pytest

from keras_darkformer.fitting.moments import Moments

HEADS, HEAD_DIM = 2, 5
HAT = HEAD_DIM**-0.25


@pytest.fixture
def data(rng):
    """Queries in groups of 3, with a mean far from zero, keys, and masks."""
    query = 100 + rng.standard_normal((6, 7, 3 * HEADS, HEAD_DIM))
    key = rng.standard_normal((6, 9, HEADS, HEAD_DIM)) * 3
    return query, key, rng.random((6, 7)) < 0.6, rng.random((6, 9)) < 0.6


def counted(query, key, query_mask=None, key_mask=None):
    return Moments(HEADS, HEAD_DIM).update(query, key, query_mask, key_mask)


def assert_moments(moments, query, key, query_mask, key_mask):
    for head in range(HEADS):
        group = query[:, :, 3 * head : 3 * head + 3]
        rows = HAT * group[query_mask].reshape(-1, HEAD_DIM)
        both = rows, HAT * key[:, :, head][key_mask]
        for side, x in enumerate(both):
            assert moments.count[side] == len(x)
            cov = np.cov(x.T, bias=True)
            np.testing.assert_allclose(moments.mean[side, head], x.mean(axis=0), atol=1e-12)
            np.testing.assert_allclose(moments.cov[side, head], cov, atol=1e-9)
        of_head = moments.of_head(head)
        np.testing.assert_array_equal(of_head[:2], moments.mean[:, head])
        np.testing.assert_allclose(of_head.covariance, moments.cov[:, head].sum(axis=0))


def test_moments_are_those_of_numpy(data):
    query, key, query_mask, key_mask = data
    assert_moments(counted(*data), *data)
    everything = np.ones_like(query_mask), np.ones_like(key_mask)
    assert_moments(counted(query, key), query, key, *everything)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_parts_merge_in_any_order(data, order):
    parts = [counted(*(x[2 * i : 2 * i + 2] for x in data)) for i in order]
    assert_moments(parts[0].merge(parts[1]).merge(parts[2]), *data)
    late = counted(*(x[2 * order[1] : 2 * order[1] + 2] for x in data))
    late.merge(counted(*(x[2 * order[2] : 2 * order[2] + 2] for x in data)))
    assert_moments(counted(*(x[2 * order[0] : 2 * order[0] + 2] for x in data)).merge(late), *data)


def test_updates_one_after_the_other_are_one_update(data):
    moments = Moments(HEADS, HEAD_DIM)
    for row in range(6):
        moments.update(*(x[row : row + 1] for x in data))
    assert_moments(moments, *data)


def test_batches_that_are_masked_altogether_change_nothing(data):
    query, key, query_mask, key_mask = data
    moments = Moments(HEADS, HEAD_DIM)
    moments.update(query, key, np.zeros_like(query_mask), np.zeros_like(key_mask))
    assert not moments.count.any()
    assert not moments.cov.any()
    moments.update(*data)
    moments.merge(Moments(HEADS, HEAD_DIM))
    assert_moments(moments, *data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["query", "key"])
def test_what_is_not_finite_is_refused_where_it_counts(data, name, value):
    query, key, query_mask, key_mask = (x.copy() for x in data)
    x, mask = (query, query_mask) if name == "query" else (key, key_mask)
    x[~mask] = value
    assert_moments(counted(query, key, query_mask, key_mask), query, key, query_mask, key_mask)
    x[np.argwhere(mask)[0][0], np.argwhere(mask)[0][1], 0, 0] = value
    with pytest.raises(ValueError, match=f"`{name}` must be finite"):
        counted(query, key, query_mask, key_mask)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("query", (6, 7, 5, HEAD_DIM)), ("key", (6, 9, HEADS, 4)), ("key", (9, HEADS, HEAD_DIM))],
)
def test_shapes_that_do_not_fit_are_refused(data, name, shape):
    arrays = {"query": data[0], "key": data[1]} | {name: np.zeros(shape)}
    with pytest.raises(ValueError, match=f"`{name}` does not fit 2 key/value heads of size 5"):
        counted(**arrays)


def test_about_the_origin_the_covariance_is_the_second_moment_of_a_query_and_a_key(data):
    query, key, *_ = data
    moments = counted(query[:, :, :HEADS], key).of_head(1).uncentred()
    assert not np.any(moments[:2])
    x, y = (HAT * z[:, :, 1].reshape(-1, HEAD_DIM) for z in (query, key))
    z = (x[:, None] + y).reshape(-1, HEAD_DIM)  # every query with every key
    np.testing.assert_allclose(moments.covariance, z.T @ z / len(z), rtol=1e-6)
