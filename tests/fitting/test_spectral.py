"""Geometries and proposals are the optima they claim to be."""

import numpy as np
import pytest

from keras_darkformer.fitting.spectral import (
    geometry_of,
    log_second_moment,
    proposal_scale,
    proposal_variance,
    spectral_multipliers,
    spectrum,
    variance_optimal_scale,
    whitening,
)
from keras_darkformer.ops.projections import draw_projection, proposal_log_weight

BETA = 2.0


def covariances(dim=6, seed=0):
    """Of queries and of keys."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((2, dim, dim)) * np.geomspace(0.1, 1.0, dim)
    return tuple(factor @ factor.T / dim for factor in factors)


def cost(a, v, num_features):
    """What the multipliers minimise, as it is written."""
    distortion = np.sum((1 - a**2) ** 2 * (v / 2) ** 2, axis=-1)
    excess = np.sum(log_second_moment(a**2 * v), axis=-1) - np.log(num_features)
    return distortion + BETA * np.log1p(np.exp(excess))


@pytest.mark.parametrize("v", [0.0, 0.1, 1.0, 7.0, 300.0])
def test_the_variance_of_the_proposal_minimises_the_second_moment(v):
    t = 0.5 + np.geomspace(1e-3, 1e4, 40_001)
    moments = np.log(t) - 0.5 * np.log(2 * t - 1) + v / (2 * t - 1)
    np.testing.assert_allclose(proposal_variance(v), t[moments.argmin()], rtol=2e-3)
    np.testing.assert_allclose(log_second_moment(v), moments.min(), atol=1e-6)
    assert proposal_variance(v) >= 1


def test_the_second_moment_is_that_of_a_feature():
    z, t = 1.3, 1.8
    w = np.linspace(-40, 40, 200_001)
    density = np.exp(-0.5 * w**2 / t) / np.sqrt(2 * np.pi * t)
    weight = 2 * proposal_log_weight(w[:, None], np.array([t**0.5])).astype("float64")
    feature = np.exp(weight + w * z - z**2 / 2)  # phi(q) phi(k) / exp(q.k), z = q + k
    step = w[1] - w[0]
    np.testing.assert_allclose(np.sum(density * feature) * step, 1.0, rtol=1e-5)
    expected = np.log(t) - 0.5 * np.log(2 * t - 1) + z**2 / (2 * t - 1)
    np.testing.assert_allclose(np.log(np.sum(density * feature**2) * step), expected, rtol=1e-4)


@pytest.mark.parametrize("num_features", [4, 64, 1000])
@pytest.mark.parametrize(
    "v",
    [[0.0, 0.0], [1e-3, 0.5], [1.0, 1.0], [0.3, 6.0], [5.0, 40.0], [200.0, 2e4]],
    ids=str,
)
def test_no_multipliers_of_two_directions_are_better(v, num_features):
    v = np.array(v)
    grid = np.linspace(0, 1, 401)
    best = cost(np.stack(np.meshgrid(grid, grid), axis=-1), v, num_features).min()
    a = spectral_multipliers(v, num_features)
    assert ((a >= 0) & (a <= 1)).all()
    assert cost(a, v, num_features) <= best + 1e-4 * max(best, 1e-3)


@pytest.mark.parametrize("num_features", [8, 256])
def test_no_multipliers_nearby_are_better(num_features, rng):
    v = np.geomspace(0.02, 20.0, 12)
    a = spectral_multipliers(v, num_features)
    found = cost(a, v, num_features)
    for size in (1e-3, 1e-2, 1e-1):
        others = np.clip(a + size * rng.standard_normal((2000, len(v))), 0, 1)
        assert found <= cost(others, v, num_features).min() + 1e-6


def test_one_multiplier_for_all_is_the_best_of_its_kind():
    v = np.geomspace(0.1, 10.0, 6)
    a = spectral_multipliers(v, 64, one_for_all=True)
    assert (a == a[0]).all()
    others = np.linspace(0, 1, 5001)[:, None] * np.ones(6)
    assert cost(a, v, 64) <= cost(others, v, 64).min() + 1e-3
    assert cost(spectral_multipliers(v, 64), v, 64) < cost(a, v, 64)


def test_more_features_damp_less():
    v = np.geomspace(0.1, 10.0, 6)
    sums = [spectral_multipliers(v, m).sum() for m in (4, 64, 1024, 2**20)]
    assert (np.diff(sums) > 0).all()


def test_the_spectral_geometry_damps_along_the_eigenvectors():
    covariance = sum(covariances())
    geometry = geometry_of("spectral", covariance, 64)
    product = geometry @ covariance @ geometry.T
    np.testing.assert_allclose(product, np.diag(np.diag(product)), atol=1e-10)
    gram = geometry @ geometry.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-10)
    scaled = geometry_of("scale", covariance, 64)
    np.testing.assert_allclose(scaled, scaled[0, 0] * np.eye(6))


@pytest.mark.parametrize("scale", [None, 1.0])
def test_whitening_whitens(scale):
    query_cov, key_cov = covariances()
    geometry = whitening(query_cov + key_cov, scale)
    size = 6**-0.25 if scale is None else scale
    white = geometry @ (query_cov + key_cov) @ geometry.T / 2
    np.testing.assert_allclose(white, size**2 * np.eye(6), atol=1e-9)


def test_whitening_of_what_does_not_vary_stays_finite():
    zeros = np.zeros((4, 4))
    np.testing.assert_allclose(whitening(zeros), 4**-0.25 * np.eye(4))
    one = np.diag([1.0, 0.0, 0.0, 0.0])
    assert np.isfinite(whitening(one)).all()


def test_the_variance_optimal_proposal_is_that_of_the_theorem():
    covariance = 0.3 * covariances()[0] / np.linalg.norm(covariances()[0], 2)
    values, rotation = spectrum(covariance)
    scale = variance_optimal_scale(values)
    np.testing.assert_array_equal(scale, proposal_scale("variance_optimal", 2 * values))
    identity = np.eye(6)
    expected = (identity + 2 * covariance) @ np.linalg.inv(identity - 2 * covariance)
    np.testing.assert_allclose((rotation * scale**2) @ rotation.T, expected, atol=1e-10)


@pytest.mark.parametrize("largest", [0.5, 0.75, 30.5])
def test_where_the_variance_optimal_proposal_does_not_exist_the_eigenvalue_is_named(largest):
    with pytest.raises(ValueError, match=rf"below 1/2.*largest eigenvalue {largest}"):
        variance_optimal_scale(np.array([largest, 0.1]))


def test_the_spectral_proposal_is_diagonal_in_what_the_geometry_makes_of_the_data(rng):
    covariance, geometry = sum(covariances()), rng.standard_normal((4, 6))
    values, rotation = spectrum(geometry @ covariance @ geometry.T)
    scale = proposal_scale("spectral", values)
    turned = rotation.T @ geometry
    product = turned @ covariance @ turned.T
    np.testing.assert_allclose(product, np.diag(np.diag(product)), atol=1e-10)
    np.testing.assert_allclose(scale**2, proposal_variance(np.diag(product)))


# Density ratios.


def test_the_log_weight_is_half_the_log_density_ratio():
    scale = np.array([0.7, 1.0, 2.5])
    w = scale * draw_projection(50, 3, seed=0)
    log_standard = -0.5 * np.sum(w**2, axis=1)
    log_proposal = -0.5 * np.sum((w / scale) ** 2, axis=1) - np.log(scale).sum()
    expected = 0.5 * (log_standard - log_proposal)
    np.testing.assert_allclose(proposal_log_weight(w, scale), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian", "antithetic"])
def test_density_ratios_integrate_to_one(kind):
    scale = np.array([[0.9, 1.0, 1.6], [1.2, 1.1, 1.0]])
    standard = np.stack([draw_projection(60_000, 3, kind=kind, seed=i) for i in range(2)])
    w = standard * scale[:, None]
    ratios = np.exp(2 * proposal_log_weight(w, scale).astype("float64"))
    assert ratios.shape == (2, 60_000)
    standard_error = ratios.std(axis=1) / 60_000**0.5
    assert (np.abs(ratios.mean(axis=1) - 1) < 4.5 * standard_error).all()


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_not_positive_are_refused(scale):
    with pytest.raises(ValueError, match="`scale` must be positive and finite"):
        proposal_log_weight(np.zeros((4, 2)), np.array([1.0, scale]))
