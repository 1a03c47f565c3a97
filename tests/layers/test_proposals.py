"""Calibrated maps estimate their kernel without bias, wherever W comes from.

Heads that see the same data have draws of their own: one call holds many.
"""

import functools

import numpy as np
import pytest

from keras_darkformer import DarkFeatureMap
from keras_darkformer.options import PROJECTIONS

from .helpers import arrays, assert_close, call

DIM, FEATURES, DRAWS, TOKENS = 4, 16, 128, 6
HAT = DIM**-0.25
# See tests/ops/test_estimator.py: an unbiased mean is further off with probability 7e-6.
LIMIT = 4.5
proposals = pytest.mark.parametrize("proposal", ["none", "variance_optimal", "spectral"])


@functools.lru_cache
def data():
    """Queries and keys of one head, `(b, t, 1, h)`, small enough for theorem 3.2."""
    rng = np.random.default_rng(0)
    size = np.array([0.75, 0.6, 0.4, 0.2])
    query, key = size * rng.standard_normal((2, 4, 64, 1, DIM))
    return (query + 0.2).astype("float32"), (key - 0.1).astype("float32")


def calibrated(*, kind="orthogonal", method="identity", untied=False, **options):
    """A map whose heads differ in their draws alone."""
    options_of_map = {"projection": kind, "tie_geometry": not untied, "seed": 0}
    layer = DarkFeatureMap(DRAWS, DIM, num_features=FEATURES, **options_of_map)
    query, key = (np.repeat(x, DRAWS, axis=2) for x in data())
    layer.calibrate(query, key, method=method, refine=False, **options)
    if untied:
        noise = 0.2 * np.random.default_rng(1).standard_normal((DIM, DIM))
        layer.query_geometry.assign(arrays(layer.query_geometry) + noise)
    return layer


def estimates(layer):
    """phi(q) . phi(k) of a few pairs, `(draws, pairs)`."""
    query, key = (np.repeat(x[:1, :TOKENS], DRAWS, axis=2) for x in data())
    phi_q, phi_k = (arrays(call(layer, x, keys=k)) for x, k in ((query, False), (key, True)))
    return np.sum(phi_q.astype("float64") * phi_k, axis=-1)[0].T


def weights(layer, name):
    return arrays(getattr(layer, name)).astype("float64")


def truths(layer):
    """exp(x' M_q' M_k y + b . k^) of the same pairs, by each head's own weights."""
    x, y = (HAT * z[0, :TOKENS, 0].astype("float64") for z in data())
    b, c = (weights(layer, name) for name in ("query_shift", "key_shift"))
    m_k = weights(layer, "geometry")
    m_q = m_k if layer.options.tie_geometry else weights(layer, "query_geometry")
    mx = np.einsum("krh,kth->ktr", m_q, x - b[:, None])
    my = np.einsum("krh,kth->ktr", m_k, y - c[:, None])
    return np.exp(np.sum(mx * my, axis=-1) + np.einsum("kh,th->kt", b, y))


def standard_errors_off(layer, found=None):
    ratio = (estimates(layer) if found is None else found) / truths(layer)
    return np.abs(ratio.mean(axis=0) - 1) / (ratio.std(axis=0, ddof=1) / len(ratio) ** 0.5)


@proposals
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_features_are_unbiased_as_calibrated_and_drawn_anew(kind, proposal):
    layer = calibrated(kind=kind, proposal=proposal, center=True)
    first = estimates(layer)
    assert standard_errors_off(layer).max() < LIMIT
    layer.redraw(seed=5)
    second = estimates(layer)
    assert np.abs(first - second).max() > 1e-3
    assert standard_errors_off(layer, second).max() < LIMIT


@pytest.mark.parametrize(
    "options",
    [
        {"method": "spectral", "untied": True},
        {"method": "whitening", "proposal": "spectral"},
        {"method": "scale", "center": False},
        {"method": "spectral", "proposal": "none", "center": False},
    ],
    ids=str,
)
def test_features_of_every_geometry_are_unbiased(options):
    layer = calibrated(**options)
    assert standard_errors_off(layer).max() < LIMIT


@pytest.mark.parametrize("proposal", ["variance_optimal", "spectral"])
def test_without_the_density_ratio_the_same_features_are_biased(proposal):
    layer = calibrated(proposal=proposal, center=True)
    layer.log_weight.assign(0.0 * layer.log_weight)
    assert standard_errors_off(layer).max() > 1.4 * LIMIT


def test_without_the_tilt_of_the_keys_centred_features_are_biased():
    layer = calibrated(proposal="none", center=True)
    keys = np.repeat(data()[1][:1, :TOKENS], DRAWS, axis=2)
    tilt = np.exp(np.einsum("kh,btkh->tk", arrays(layer.query_shift), HAT * keys)).T
    assert standard_errors_off(layer, estimates(layer) / tilt).max() > LIMIT


@proposals
def test_redraw_keeps_the_proposal_and_its_density(proposal):
    layer = calibrated(proposal=proposal, center=True)
    layer.redraw(seed=3)
    scale, w = (weights(layer, name)[0] for name in ("proposal", "projection"))
    standard = w / scale
    log_ratio = np.log(scale).sum() + 0.5 * np.sum(standard**2 - w**2, axis=1)
    assert_close(layer.log_weight[0], 0.5 * log_ratio, 1e-4)
    assert (scale == 1).all() == (proposal == "none")
    # orthogonal: standard rows of one block are
    products = standard[:DIM] @ standard[:DIM].T
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-4)


def test_where_it_exists_the_variance_optimal_proposal_has_less_variance_than_none():
    second_moments = {}
    for proposal in ("none", "variance_optimal"):
        layer = calibrated(kind="gaussian", proposal=proposal, center=True)
        query, key = (np.repeat(x[:2], DRAWS, axis=2) for x in data())
        phi_q, phi_k = (
            arrays(call(layer, x, keys=k)).astype("float64")
            for x, k in ((query, False), (key, True))
        )
        single = phi_q * phi_k * FEATURES  # of one feature
        tilt = np.einsum("kh,btkh->btk", arrays(layer.query_shift), HAT * key)
        x, y = HAT * query - arrays(layer.query_shift), HAT * key - arrays(layer.key_shift)
        m = arrays(layer.geometry)
        mx, my = (np.einsum("krh,btkh->btkr", m, z) for z in (x, y))
        truth = np.exp(np.sum(mx * my, axis=-1) + tilt)
        second_moments[proposal] = np.mean((single / truth[..., None]) ** 2)
    assert second_moments["variance_optimal"] < 0.8 * second_moments["none"]


def test_where_the_variance_optimal_proposal_does_not_exist_it_is_refused():
    layer = DarkFeatureMap(1, 8, num_features=FEATURES, seed=0)
    query, key = (3 * np.concatenate([x, x[:, ::-1]], axis=-1) for x in data())
    layer.calibrate(query, key, method="identity")
    before = arrays(layer.weights)
    with pytest.raises(ValueError, match=r"below 1/2.*largest eigenvalue [0-9.]+"):
        layer.calibrate(query, key, method="identity", proposal="variance_optimal")
    assert_close(arrays(layer.weights), before)
    # A geometry that damps enough makes room for it: the variances are h^(-1/2) then.
    layer.calibrate(query, key, method="whitening", proposal="variance_optimal", center=True)
    expected = np.sqrt((1 + 2 * 8**-0.5) / (1 - 2 * 8**-0.5))
    assert_close(layer.proposal, np.full((1, 8), expected), 1e-3)
