"""Fits of geometries before a rotation."""

import numpy as np
import pytest

from keras_darkformer.fitting.spectral import proposal_variance

from .fits import (
    HAT,
    HEAD_DIM,
    HEADS,
    SHUFFLED,
    assert_same,
    data,
    fitted,
)


@pytest.mark.parametrize("layout", [None, SHUFFLED], ids=["halves", "shuffled"])
def test_what_rotates_together_has_one_proposal(layout):
    fit = fitted(*data(), "before", how={"layout": layout})
    proposal = fit.weights["proposal"]
    unshuffled = np.empty_like(proposal)
    unshuffled[:, np.arange(HEAD_DIM) if layout is None else layout] = proposal
    np.testing.assert_array_equal(unshuffled[:, :4], unshuffled[:, 4:])
    assert np.ptp(unshuffled[:, :4]) > 0.05


def test_where_the_rotation_puts_coordinates_changes_only_where_they_are():
    plain, other = (fitted(*data(), "before", how={"layout": x}) for x in (None, SHUFFLED))
    geometry = plain.weights["geometry"]
    np.testing.assert_allclose(geometry, other.weights["geometry"], rtol=1e-5)
    expected = plain.weights["proposal"][:, SHUFFLED]
    np.testing.assert_allclose(other.weights["proposal"], expected, rtol=1e-4, atol=1e-6)
    assert (plain.weights["proposal"] != other.weights["proposal"]).any()


@pytest.mark.parametrize("method", ["scale", "whitening", "spectral"])
def test_a_geometry_before_the_rotation_knows_no_position(method):
    here, there = (fitted(*data(), "before", method=method, how={"start": x}) for x in (0, 1000))
    assert_same(here, there, rtol=0)
    np.testing.assert_allclose(
        here.weights["geometry"], np.swapaxes(here.weights["geometry"], 1, 2), atol=1e-12
    )


def test_before_the_rotation_the_proposal_is_of_what_the_geometry_leaves_of_planes():
    query, key = data()
    fit = fitted(query, key, "before")
    for head in range(HEADS):
        x, y = (
            HAT * z[:, :, head].reshape(-1, HEAD_DIM) @ fit.weights["geometry"][head].T
            for z in (query, key)
        )
        variances = np.mean(x**2 + y**2, axis=0).reshape(2, -1).mean(axis=0)
        expected = np.sqrt(proposal_variance(np.tile(variances, 2)))
        np.testing.assert_allclose(fit.weights["proposal"][head], expected, rtol=1e-5)
