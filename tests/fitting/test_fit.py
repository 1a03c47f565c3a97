"""`fit_features`: what every method makes of good data, and by which formulas."""

import numpy as np
import pytest

from keras_darkformer.ops.projections import draw_projection
from keras_darkformer.options import FeatureOptions

from .fits import (
    FEATURES,
    HAT,
    HEAD_DIM,
    HEADS,
    LENGTH,
    MASK,
    assert_fit,
    assert_same,
    data,
    divergence,
    fitted,
    methods,
    output_error,
    places,
)

# What it makes of good data.


@methods
@pytest.mark.parametrize("refine", [True, False], ids=["refined", "closed-form"])
def test_every_method_fits_grouped_causal_and_masked_data(place, method, refine):
    query, key = data(groups=2)
    for how in ({"causal": True}, {"query_mask": MASK, "key_mask": MASK}):
        fit = fitted(query, key, place, how=how, method=method, refine=refine)
        assert_fit(fit)
        error = output_error(query, key, fit, place, causal="causal" in how)
        assert error < (2.5 if method in ("identity", "whitening") else 1.0)
        if method != "auto":
            assert fit.kind == ("exponential" if method == "clusters" else "dark")


@methods
def test_what_is_masked_has_no_say(place, method):
    query, key = data(groups=2)
    how = {"query_mask": MASK, "key_mask": MASK}
    holes = [np.where(MASK[:, :, None, None], x, np.float32(np.nan)) for x in (query, key)]
    assert_same(*(fitted(*x, place, how=how, method=method) for x in (holes, (query, key))))


@methods
def test_one_seed_gives_one_fit_and_heads_differ(place, method):
    first, again, other = (
        fitted(*data(), place, method=method, seed=seed, how={"causal": True}) for seed in (1, 1, 2)
    )
    assert_same(first, again, rtol=0)
    if first.kind == other.kind:
        name = "query_kernel" if first.kind == "exponential" else "projection"
        assert (first.weights[name] != other.weights[name]).any()
        assert (first.weights[name][0] != first.weights[name][1]).any()


def test_errors_of_other_data_fall_from_identity_to_spectral_to_refined_to_clusters():
    query, key = data(length=48)
    unseen, other = data(length=48, seed=1)
    other = (other + np.mean(key, axis=(0, 1)) - np.mean(other, axis=(0, 1))).astype("float32")

    def error(**options):
        fits = (fitted(query, key, how={"causal": True}, seed=s, **options) for s in range(3))
        return np.mean([output_error(unseen, other, fit, causal=True) for fit in fits])

    identity = error(method="identity")
    spectral = error(method="spectral", refine=False)
    assert spectral < 0.9 * identity
    assert error(method="spectral") < 0.9 * spectral
    assert error(method="clusters") < 0.9 * identity
    assert error(method="auto") < 0.9 * identity


@places
def test_spectral_is_better_than_identity_wherever_the_geometry_sits(place):
    query, key = data(length=48, scale=1.5)
    features = FeatureOptions(num_features=64)

    def error(method):
        fits = (
            fitted(query, key, place, features, method=method, refine=False, seed=seed)
            for seed in range(3)
        )
        return np.mean([divergence(query, key, fit, place) for fit in fits])

    assert error("spectral") < 0.7 * error("identity")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "spectral", "proposal": "none", "center": False},
        {"method": "spectral", "proposal": "none"},
        {"method": "spectral", "center": False},
        {"method": "clusters"},
    ],
    ids=str,
)
def test_refining_takes_the_divergence_down(options):
    query, key = data()
    refined, closed = (fitted(query, key, refine=refine, **options) for refine in (True, False))
    assert divergence(query, key, refined) < divergence(query, key, closed)
    if options["method"] == "spectral":
        assert fitted(query, key, **options | {"proposal": "none"}).weights["log_weight"].any()


# Formulas.


@places
def test_identity_is_a_plain_draw(place):
    fit = fitted(*data(), place, method="identity", seed=4)
    assert_fit(fit)
    expected = np.eye(HEAD_DIM)
    for head in range(HEADS):
        np.testing.assert_array_equal(fit.weights["geometry"][head], expected)
        drawn = draw_projection(FEATURES, HEAD_DIM, seed=[4, head])
        np.testing.assert_array_equal(fit.weights["projection"][head], drawn)
    assert (fit.weights["proposal"] == 1).all()
    for name in ("log_weight", "query_shift", "key_shift"):
        assert not fit.weights[name].any(), name


@places
@pytest.mark.parametrize("proposal", ["none", "variance_optimal", "spectral"])
def test_directions_are_drawn_from_the_proposal_and_carry_their_density_ratio(place, proposal):
    fit = fitted(*data(scale=0.15), place, method="identity", proposal=proposal, seed=4)
    for head in range(HEADS):
        scale, w = (fit.weights[name][head] for name in ("proposal", "projection"))
        np.testing.assert_allclose(w / scale, draw_projection(FEATURES, HEAD_DIM, seed=[4, head]))
        log_ratio = np.log(scale).sum() + 0.5 * np.sum((w / scale) ** 2 - w**2, axis=1)
        np.testing.assert_allclose(fit.weights["log_weight"][head], log_ratio / 2, atol=1e-5)
    assert (fit.weights["proposal"] == 1).all() == (proposal == "none")


@pytest.mark.parametrize("center", [True, False, None])
@pytest.mark.parametrize("method", ["identity", "spectral"])
def test_shifts_are_the_means_where_it_is_centred(method, center):
    query, key = data(groups=2)
    fit = fitted(query, key, method=method, center=center)
    centred = method == "spectral" if center is None else center
    query = query.reshape(4, LENGTH, HEADS, -1, HEAD_DIM).astype("float64").mean(axis=(0, 1, 3))
    key = key.astype("float64").mean(axis=(0, 1))
    for name, mean in (("query_shift", query), ("key_shift", key)):
        np.testing.assert_allclose(fit.weights[name], HAT * mean * centred, atol=1e-6)


def test_centring_makes_up_for_keys_that_lie_far_away():
    query, key = data(scale=0.3)
    features = FeatureOptions(num_features=2048)
    for x in (key, 12.0 + key):
        options = {"method": "identity", "proposal": "spectral", "center": True}
        assert output_error(query, x, fitted(query, x, features=features, **options)) < 0.15


@pytest.mark.parametrize("method", ["identity", "scale", "whitening", "spectral"])
def test_a_smaller_rank_keeps_the_directions_of_largest_variance(method):
    query, key = data(groups=2)
    fit = fitted(query, key, features=FeatureOptions(num_features=FEATURES, rank=3), method=method)
    assert_fit(fit)
    assert fit.weights["geometry"].shape == (HEADS, 3, HEAD_DIM)
    if method == "scale":  # two directions are large, see `anisotropic`
        for head in range(HEADS):
            rows = [
                HAT * x[:, :, head * g : (head + 1) * g].reshape(-1, HEAD_DIM).astype("float64")
                for x, g in ((query, 2), (key, 1))
            ]
            _, vectors = np.linalg.eigh(sum(np.cov(x.T, bias=True) for x in rows))
            kept = fit.weights["geometry"][head] @ vectors[:, -3:]
            alpha = np.abs(kept[0, 0])
            assert alpha > 0.1  # or nothing would be kept of them
            np.testing.assert_allclose(np.abs(kept), alpha * np.eye(3), atol=1e-6)


@places
def test_geometries_of_their_own_start_as_one(place):
    features = FeatureOptions(num_features=FEATURES, tie_geometry=False)
    fit = fitted(*data(), place, features=features)
    assert_fit(fit)
    np.testing.assert_array_equal(fit.weights["query_geometry"], fit.weights["geometry"])


def test_the_variance_optimal_proposal_of_whitened_data_is_that_of_the_theorem():
    options = {"method": "whitening", "proposal": "variance_optimal", "center": True}
    fit = fitted(*data(), **options)  # whitened, the variances are h^(-1/2)
    expected = np.sqrt((1 + 2 * HAT**2) / (1 - 2 * HAT**2))
    np.testing.assert_allclose(fit.weights["proposal"], expected, rtol=1e-6)


@places
def test_where_the_variance_optimal_proposal_does_not_exist_it_is_refused(place):
    with pytest.raises(ValueError, match=r"below 1/2.*largest eigenvalue [0-9.]+"):
        fitted(*data(scale=3), place, method="identity", proposal="variance_optimal")
