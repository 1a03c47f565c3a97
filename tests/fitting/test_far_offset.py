"""The offset at which the far part of features has softmax's mass."""

import numpy as np
import pytest

from keras_darkformer.fitting import FarOffset

EVERYTHING = np.ones((1, 1, 1), bool)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def solved(*batches):
    offset = FarOffset()
    for batch in batches:
        offset.add(*batch)
    return offset.solve()


@pytest.fixture
def odds(rng):
    """Of the features and of softmax, `(b, n, t)`, a scale of its own for every head."""
    exact = 2 * rng.standard_normal((3, 4, 20)) - 1
    noise = rng.standard_normal(exact.shape) * np.linspace(0.2, 3, 4)[:, None]
    return exact + noise - np.linspace(0, 5, 4)[:, None], exact


def test_masses_agree_at_the_offset(odds):
    found = solved((*odds, EVERYTHING))
    assert found.shape == (4,)
    assert found.dtype == np.float32
    mass = sigmoid(odds[0] + found[:, None]).sum(axis=(0, 2))
    np.testing.assert_allclose(mass, sigmoid(odds[1]).sum(axis=(0, 2)), rtol=1e-6)


def test_what_features_are_off_by_is_given_back(odds):
    shift = np.array([0.0, -3.0, 1.5, 40.0])
    found = solved((odds[1] - shift[:, None], odds[1], EVERYTHING))
    np.testing.assert_allclose(found, shift, atol=1e-5)


def test_the_offset_minimises_the_divergence_of_near_and_far(odds):
    p = sigmoid(odds[1])

    def divergence(offset):
        q = sigmoid(odds[0] + offset[:, None])
        return -(p * np.log(q) + (1 - p) * np.log1p(-q)).sum(axis=(0, 2))

    found = solved((*odds, EVERYTHING)).astype("float64")
    for step in (-0.01, 0.01):
        assert (divergence(found) < divergence(found + step)).all()


def test_batches_add_up_and_only_what_counts_does(odds, rng):
    counts = rng.random((3, 1, 20)) < 0.6
    holes = [np.where(counts, x, np.nan) for x in odds]
    rows = [tuple(x[row : row + 1] for x in (*holes, counts)) for row in range(3)]
    found = solved(*rows)
    np.testing.assert_array_equal(found, solved((*holes, counts)))
    kept = [x.transpose(1, 0, 2)[:, counts[:, 0]][None] for x in odds]
    np.testing.assert_allclose(found, solved((*kept, EVERYTHING)), atol=1e-6)


def test_a_head_of_which_nothing_counts_gets_no_offset(odds):
    counts = np.ones((1, 4, 1), bool)
    counts[:, 2] = False
    found = solved((*odds, counts))
    expected = solved((*odds, EVERYTHING))
    assert found[2] == 0.0
    np.testing.assert_array_equal(np.delete(found, 2), np.delete(expected, 2))


def test_masses_of_nothing_and_of_all_stay_finite():
    log_odds = np.zeros((1, 2, 5))
    exact = np.array([[[-1e4] * 5, [1e4] * 5]])
    low, high = solved((log_odds, exact, EVERYTHING))
    assert -100 < low < -30
    assert 30 < high < 100


def test_without_any_query_there_is_nothing_to_solve():
    with pytest.raises(ValueError, match="No query was added"):
        FarOffset().solve()
