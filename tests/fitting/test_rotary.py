"""Fits of geometries before a rotation, and of scalars that commute with it."""

import numpy as np
import pytest

from keras_darkformer.fitting.spectral import proposal_variance

from .data import rotated
from .fits import (
    HAT,
    HEAD_DIM,
    HEADS,
    LENGTH,
    SHUFFLED,
    assert_same,
    data,
    fitted,
)


@pytest.mark.parametrize("place", ["before", "planes"])
@pytest.mark.parametrize("layout", [None, SHUFFLED], ids=["halves", "shuffled"])
def test_what_rotates_together_has_one_proposal(place, layout):
    fit = fitted(*data(), place, how={"layout": layout})
    proposal = fit.weights["proposal"]
    unshuffled = np.empty_like(proposal)
    unshuffled[:, np.arange(HEAD_DIM) if layout is None else layout] = proposal
    np.testing.assert_array_equal(unshuffled[:, :4], unshuffled[:, 4:])
    assert np.ptp(unshuffled[:, :4]) > 0.05


def test_where_the_rotation_puts_coordinates_changes_only_where_they_are():
    plain, other = (fitted(*data(), "planes", how={"layout": x}) for x in (None, SHUFFLED))
    geometry = plain.weights["geometry"]
    np.testing.assert_allclose(geometry, other.weights["geometry"], rtol=1e-5)
    for name in ("proposal", "query_shift", "key_shift"):
        expected = plain.weights[name][:, SHUFFLED]
        np.testing.assert_allclose(other.weights[name], expected, rtol=1e-4, atol=1e-6)
    assert (plain.weights["query_shift"] != other.weights["query_shift"]).any()


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


def test_scalars_damp_the_planes_of_little_variance():
    rng = np.random.default_rng(3)
    size = np.tile([2.0, 1.5, 0.3, 0.2], 2)
    query, key = ((size * rng.standard_normal((4, 64, 2, 8))).astype("float32") for _ in range(2))
    scalars = fitted(query, key, "planes").weights["geometry"]
    assert scalars[:, :2].min() > 2 * scalars[:, 2:].max()
    same = fitted(query, key, "planes", method="scale").weights["geometry"]
    np.testing.assert_array_equal(same, np.repeat(same[:, :1], 4, axis=1))


def test_shifts_of_planes_are_the_means_after_the_scalars():
    query, key = data(groups=2)
    fit = fitted(query, key, "planes")
    scalars = np.tile(fit.weights["geometry"], 2)
    query = rotated(query).reshape(4, LENGTH, HEADS, -1, HEAD_DIM).mean(axis=(0, 1, 3))
    for name, mean in (("query_shift", query), ("key_shift", rotated(key).mean(axis=(0, 1)))):
        np.testing.assert_allclose(fit.weights[name], HAT * scalars * mean, atol=1e-5)
