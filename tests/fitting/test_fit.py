"""`fit_features`: every method at every place of the geometry, on data good and bad."""

import functools
import warnings

import numpy as np
import pytest

from keras_darkformer.fitting import (
    METHODS,
    AfterRotation,
    BeforeRotation,
    CalibrationOptions,
    LayerStatistics,
    RotaryPlanes,
    check_calibration,
    fit_features,
    needs_sample,
)
from keras_darkformer.fitting.held_out import output_errors
from keras_darkformer.fitting.projections import DarkParameters, Projections, fold_dark
from keras_darkformer.fitting.sequences import (
    HeadSample,
    exact_weights,
    feature_weights,
    sequences,
)
from keras_darkformer.fitting.spectral import proposal_variance
from keras_darkformer.ops.projections import draw_projection
from keras_darkformer.options import FeatureOptions

from .data import anisotropic, rotated

HEADS, HEAD_DIM, FEATURES, LENGTH = 2, 8, 16, 24
HAT = HEAD_DIM**-0.25
DARK = {"geometry", "projection", "proposal", "log_weight", "query_shift", "key_shift"}
FITTERS = {"after": AfterRotation(), "before": BeforeRotation(), "planes": RotaryPlanes()}
PAIRS = [(p, m) for p, f in FITTERS.items() for m in METHODS if m not in f.refuses]
MASK = np.arange(LENGTH) < np.array([[24], [10], [17], [24]])
SHUFFLED = np.arange(HEAD_DIM).reshape(2, -1).T.reshape(-1)  # members of a plane side by side
places = pytest.mark.parametrize("place", FITTERS)
methods = pytest.mark.parametrize(("place", "method"), PAIRS)


@functools.lru_cache
def data(length=LENGTH, groups=1, seed=0, scale=0.7):
    heads = (groups * HEADS, HEADS)
    return anisotropic(length=length, heads=heads, head_dim=HEAD_DIM, seed=seed, scale=scale)


def collected(query, key, place, calibration, start=0, layout=None, max_tokens=10_000, **how):
    """What a layer with rotary positions sees; after the rotation it may as well have none."""
    fitter = FITTERS[place]
    seen = LayerStatistics(
        key.shape[2],
        key.shape[3],
        needs_sample=needs_sample(calibration, fitter),
        needs_unrotated=fitter.needs_unrotated,
        needs_layout=fitter.needs_layout,
        max_tokens=max_tokens,
        seed=calibration.seed,
    )
    if place == "after":
        seen.update(query, key, **how)
        return seen
    masks = {name: value for name, value in how.items() if name != "causal"}
    seen.probe_layout(lambda vector: rotated(vector[None, None, None], 0, layout)[0, 0, 0])
    seen.update(*(rotated(x, start, layout) for x in (query, key)), **how)
    seen.update_unrotated(query, key, **masks)
    return seen


def fitted(query, key, place="after", features=None, how=None, **options):
    calibration = CalibrationOptions(**options)
    seen = collected(query, key, place, calibration, **how or {})
    features = FeatureOptions(num_features=FEATURES) if features is None else features
    return fit_features(seen, features, calibration, FITTERS[place])


def moved(x, fit, place):
    """What the features of a fit see of keys `(b, s, k, h)`, or of queries of as many heads."""
    if fit.kind == "exponential" or place == "after":
        return x if place == "after" else rotated(x)
    geometry = fit.weights["geometry"]
    if place == "before":
        return rotated(np.einsum("krh,bskh->bskr", geometry, x))
    return rotated(x * np.concatenate([geometry, geometry], axis=-1))


def folded_head(fit, head, place="after"):
    """The features of what a head sees: around a rotation the geometry has been applied."""
    if fit.kind == "exponential":
        names = ("query_kernel", "key_kernel", "key_bias")
        return Projections(*(fit.weights[name][head] for name in names))
    dark = DarkParameters(*(fit.weights[name][head] for name in DarkParameters._fields))
    return fold_dark(dark if place == "after" else dark._replace(geometry=np.eye(HEAD_DIM)))


def weights_of(query, key, fit, place="after", causal=False):
    """Attention of a fit and of softmax, head by head and sequence by sequence."""
    query = query.reshape(*query.shape[:2], HEADS, -1, HEAD_DIM)
    rows = []
    for head in range(HEADS):
        folded = folded_head(fit, head, place)
        ours, exact = [], []
        for group in range(query.shape[3]):
            x = query[:, :, :, group]
            given = (moved(x, fit, place), moved(key, fit, place))
            plain = (x, key) if place == "after" else (rotated(x), rotated(key))
            for pair, into in ((given, ours), (plain, exact)):
                sample = HeadSample(pair[0][:, :, head, None], pair[1][:, :, head], causal=causal)
                into.extend(sequences(sample))
        rows += [
            (feature_weights(folded, one), exact_weights(two), two.key)
            for one, two in zip(ours, exact, strict=True)
        ]
    return rows


def output_error(*arguments, **options):
    """Median relative error of the output against softmax's, for centred keys as values."""
    errors = []
    for ours, exact, key in weights_of(*arguments, **options):
        value = key - key.mean(axis=0)
        size = np.linalg.norm(exact @ value, axis=-1)
        errors.append(np.linalg.norm((ours - exact) @ value, axis=-1) / np.maximum(size, 1e-9))
    return np.median(np.concatenate(errors))


def divergence(*arguments):
    """Mean KL from softmax's attention maps to those of a fit."""
    total = []
    for ours, exact, _ in weights_of(*arguments):
        ours, exact = np.maximum(ours, 1e-300), np.maximum(exact, 1e-300)
        total.append(np.sum(exact * np.log(exact / ours), axis=1))
    return np.mean(np.concatenate(total))


def assert_fit(fit, place, tied=True):
    assert {x.dtype for x in fit.weights.values()} == {np.dtype("float64")}
    assert all(np.isfinite(x).all() for x in fit.weights.values())
    if fit.kind == "exponential":
        shapes = dict.fromkeys(("query_kernel", "key_kernel"), (HEADS, HEAD_DIM, FEATURES))
        shapes["key_bias"] = (HEADS, FEATURES)
        assert {name: x.shape for name, x in fit.weights.items()} == shapes
        return
    assert fit.kind == "dark"
    assert set(fit.weights) == DARK | {"query_geometry"}
    rank = fit.weights["proposal"].shape[1]
    geometry = (HEADS, HEAD_DIM // 2) if place == "planes" else (HEADS, rank, HEAD_DIM)
    assert fit.weights["geometry"].shape == geometry
    assert fit.weights["projection"].shape == (HEADS, FEATURES, rank)
    assert fit.weights["log_weight"].shape == (HEADS, FEATURES)
    for name in ("query_shift", "key_shift"):
        assert fit.weights[name].shape == (HEADS, HEAD_DIM)


def assert_same(one, other, **tolerance):
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        np.testing.assert_allclose(value, other.weights[name], err_msg=name, **tolerance)


# What it makes of good data.


@methods
@pytest.mark.parametrize("refine", [True, False], ids=["refined", "closed-form"])
def test_every_method_fits_grouped_causal_and_masked_data(place, method, refine):
    query, key = data(groups=2)
    for how in ({"causal": True}, {"query_mask": MASK, "key_mask": MASK}):
        fit = fitted(query, key, place, how=how, method=method, refine=refine)
        assert_fit(fit, place)
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
    assert_fit(fit, place)
    expected = np.ones(HEAD_DIM // 2) if place == "planes" else np.eye(HEAD_DIM)
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
    assert_fit(fit, "after")
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
    assert_fit(fit, place, tied=False)
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


# Around a rotation.


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
            assert_fit(fit, place)


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


def test_only_so_many_tokens_are_refined_on():
    few, all_ = (fitted(*data(), how={"max_tokens": n}) for n in (24, 10**6))
    assert (few.weights["geometry"] != all_.weights["geometry"]).any()
    assert_fit(fitted(*data(), how={"max_tokens": 1}), "after")


# Methods.


def test_auto_takes_the_method_of_least_error_where_it_was_not_fitted():
    fold = np.arange(40) // 10 % 2 == 0
    here, there = np.zeros((2, 2, 6, 40), bool)
    here[0, ::2], there[0, 1::2] = fold, ~fold
    here[1, 1::2], there[1, ::2] = fold, ~fold

    def held_out(query, key, method):
        """Over other sequences and other positions than the fit has seen."""
        fits = [
            fitted(query, key, method=method, how={"query_mask": x, "key_mask": x, "causal": True})
            for x in here
        ]
        total = 0.0
        for head in range(HEADS):
            arrays = query[:, :, head, None], key[:, :, head]
            errors = [
                output_errors(folded_head(fit, head), HeadSample(*arrays, x, x, causal=True))
                for fit, x in zip(fits, there, strict=True)
            ]
            total += np.median(np.concatenate(errors))
        return total

    kinds = set()
    for scale in (0.5, 3.0):
        query, key = scale * np.random.default_rng(2).standard_normal((2, 6, 40, HEADS, HEAD_DIM))
        errors = {method: held_out(query, key, method) for method in METHODS[:-1]}
        best = min(errors, key=errors.get)
        how = {"causal": True}
        auto = fitted(query, key, method="auto", how=how)
        assert_same(auto, fitted(query, key, method=best, how=how), rtol=0)
        kinds.add(auto.kind)
    assert len(kinds) == 2


def test_auto_has_no_clusters_beside_a_window():
    options = {"method": "auto", "how": {"causal": True}}
    query, key = np.random.default_rng(2).standard_normal((2, 6, 40, HEADS, HEAD_DIM)) / 2
    assert fitted(query, key, **options).kind == "exponential"
    windowed = FeatureOptions(num_features=FEATURES, sliding_window=4)
    assert fitted(query, key, features=windowed, **options).kind == "dark"


@pytest.mark.parametrize("place", ["before", "planes"])
def test_auto_is_spectral_where_the_sample_is_not_what_features_see(place):
    assert_same(fitted(*data(), place, method="auto"), fitted(*data(), place), rtol=0)


def test_auto_is_spectral_where_queries_and_keys_are_of_other_tokens():
    query, key = data()[0][:, :7], data()[1]
    assert_same(fitted(query, key, method="auto"), fitted(query, key), rtol=0)
    assert_fit(fitted(query, key, method="clusters"), "after")


def test_a_sample_is_asked_for_where_it_is_used():
    def needed(place, **options):
        return needs_sample(CalibrationOptions(**options), FITTERS[place])

    for place in FITTERS:
        assert needed(place, method="clusters")
        assert not needed(place, method="scale")
        assert not needed(place, refine=False)
        for method in ("auto", "spectral"):
            assert needed(place, method=method) == (place == "after")
    assert needed("after", method="auto", refine=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "`method` must be one of"),
        ({"proposal": "magic"}, "`proposal` must be one of"),
        ({"method": "clusters", "proposal": "none"}, "`proposal` is for features that are drawn"),
        ({"method": "auto", "proposal": "spectral"}, "`proposal` is for features that are drawn"),
    ],
    ids=str,
)
def test_options_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CalibrationOptions(**options)


def test_what_a_map_can_not_be_fitted_with_is_refused_before_and_by_the_fit():
    windowed = FeatureOptions(num_features=FEATURES, sliding_window=4)
    plain = FeatureOptions(num_features=FEATURES)
    cases = (
        ("clusters", windowed, "after", r"does not go with a `sliding_window`.*\"spectral\""),
        ("whitening", plain, "planes", "needs a geometry of any shape, not one scalar per rotary"),
    )
    for method, features, place, message in cases:
        calibration = CalibrationOptions(method=method)
        with pytest.raises(ValueError, match=message):
            check_calibration(calibration, features, FITTERS[place])
        with pytest.raises(ValueError, match=message):
            fitted(*data(), place, features=features, method=method)
        for possible in {"after", "before", "planes"} - {place}:
            check_calibration(calibration, plain, FITTERS[possible])


def test_options_of_a_layer_and_of_a_method_keep_the_rest():
    options = CalibrationOptions(method="auto", center=True, refine=False, seed=5)
    first, second = options.of_layer(0), options.of_layer(1)
    assert len({options.seed, first.seed, second.seed}) == 3
    assert first == CalibrationOptions(method="auto", center=True, refine=False, seed=first.seed)
    assert options.of_layer(1) == second
    for method, proposal, center in (
        ("identity", "none", False),
        ("whitening", "none", False),
        ("scale", "spectral", True),
        ("spectral", "spectral", True),
    ):
        found = CalibrationOptions(method="auto").of_method(method)
        assert (found.method, found.drawn_from, found.centers) == (method, proposal, center)
        given = CalibrationOptions(method=method, proposal="variance_optimal", center=not center)
        assert (given.drawn_from, given.centers) == ("variance_optimal", not center)
