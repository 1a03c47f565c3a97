"""Clusters, descent and held-out errors: what they compute, and that they help."""

import numpy as np
import pytest

from keras_darkformer.fitting import descent
from keras_darkformer.fitting.clusters import clusters, kmeans
from keras_darkformer.fitting.descent import (
    batches,
    best_draw,
    cross_entropy,
    examples,
    refine_dark,
    refine_exponential,
)
from keras_darkformer.fitting.held_out import (
    held_out_error,
    output_errors,
    position_folds,
    sequence_folds,
)
from keras_darkformer.fitting.projections import DarkParameters, Projections, fold_dark
from keras_darkformer.fitting.sequences import (
    HeadSample,
    exact_weights,
    feature_weights,
    sequences,
    softmax,
)
from keras_darkformer.ops.projections import draw_projection

from .data import anisotropic

QUERY, KEY = anisotropic(scale=0.7)
GROUPED = np.concatenate([QUERY, -0.5 * QUERY], axis=2)
KEY = KEY[:, :, 0]
PLAIN, CAUSAL = HeadSample(QUERY, KEY), HeadSample(QUERY, KEY, causal=True)
MASK = np.arange(32) < np.array([[32], [20], [7], [32]])
SETTINGS = pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"query_mask": MASK, "key_mask": MASK, "causal": True}],
    ids=["plain", "causal", "masked"],
)


def some_dark(seed=0, m=16, dim=8):
    rng = np.random.default_rng(seed)
    return DarkParameters(
        geometry=0.4 * np.eye(dim) + 0.05 * rng.standard_normal((dim, dim)),
        projection=draw_projection(m, dim, seed=rng).astype("float64"),
        log_weight=0.1 * rng.standard_normal(m),
        query_shift=0.2 * rng.standard_normal(dim),
        key_shift=0.2 * rng.standard_normal(dim),
        proposal=np.ones(dim),
    )


def divergence(projections, sample):
    """Mean KL from the exact maps to those of the features."""
    total = []
    for part in sequences(sample):
        exact = exact_weights(part)
        found = feature_weights(projections, part)
        log_ratio = np.log(np.maximum(exact, 1e-300) / np.maximum(found, 1e-300))
        total.append(np.sum(exact * log_ratio, axis=1))
    return np.concatenate(total).mean()


def entropy(sample):
    """Mean entropy of the exact maps."""
    exact = [exact_weights(part) for part in sequences(sample)]
    rows = [np.sum(x * np.log(np.maximum(x, 1e-300)), axis=1) for x in exact]
    return -np.concatenate(rows).mean()


# What a head is taken apart into.


def test_samples_hold_what_counts_and_see_what_is_visible():
    parts = sequences(HeadSample(GROUPED, KEY, MASK, MASK, causal=True))
    assert [part.query.shape for part in parts] == [(64, 8), (40, 8), (14, 8), (64, 8)]
    for row, part in enumerate(parts):
        tokens = MASK[row].sum()
        np.testing.assert_array_equal(part.key, KEY[row, :tokens])
        np.testing.assert_array_equal(part.query, GROUPED[row, :tokens].reshape(-1, 8))
        expected = np.repeat(np.tri(tokens, dtype=bool), 2, axis=0)
        np.testing.assert_array_equal(part.visible, expected)
    assert all(part.visible.all() for part in sequences(HeadSample(GROUPED, KEY, MASK, MASK)))


def test_samples_keep_as_many_queries_as_they_may_by_seed():
    first, again, other = (
        sequences(HeadSample(GROUPED, KEY, causal=True), max_queries=20, seed=seed)
        for seed in (1, 1, 2)
    )
    assert [len(part.query) for part in first] == [5] * 4
    for x, y, z in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(x.query, y.query)
        assert (x.query != z.query).any()
        assert x.visible.shape == (5, 32)


def test_samples_without_a_pair_are_refused():
    nothing = np.zeros((4, 32), bool)
    early, late = np.arange(32) < np.full((4, 1), 5), np.arange(32) >= np.full((4, 1), 9)
    for options in (
        {"query_mask": nothing},
        {"key_mask": nothing},
        {"query_mask": early, "key_mask": late, "causal": True},
    ):
        with pytest.raises(ValueError, match="No `query` is left that sees a `key`"):
            sequences(HeadSample(QUERY, KEY, **options))


def test_weights_of_features_are_those_of_their_definition():
    dark = some_dark()
    folded = fold_dark(dark)
    part = sequences(CAUSAL)[0]
    x, y = (8**-0.25 * z for z in (part.query, part.key))
    mx = (x - dark.query_shift) @ dark.geometry.T
    my = (y - dark.key_shift) @ dark.geometry.T
    log_key = my @ dark.projection.T - 0.5 * np.sum(my**2, axis=1)[:, None]
    log_key += (y @ dark.query_shift)[:, None] + 2 * dark.log_weight
    weights = np.exp(mx @ dark.projection.T) @ np.exp(log_key).T * part.visible
    weights /= weights.sum(axis=1, keepdims=True)
    found = feature_weights(folded, part)
    np.testing.assert_allclose(found, weights, atol=1e-12)
    logits = part.query @ part.key.T / 8**0.5
    np.testing.assert_allclose(exact_weights(part), softmax(logits, part.visible))


# Gradients, by central differences.


def assert_gradient(function, x, gradient, step=1e-6):
    rng = np.random.default_rng(4)
    for _ in range(4):
        direction = rng.standard_normal(x.shape)
        difference = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
        np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=1e-5, atol=1e-7)


@pytest.fixture
def exact(monkeypatch):
    """Has descents compute in float64 altogether."""
    monkeypatch.setattr(descent, "DTYPE", "float64")


@pytest.fixture
def grasped(monkeypatch):
    """What a descent is given, which goes nowhere."""
    found = {}

    def grasp(log_features, seen, start, rates, steps):
        found["gradient"], found["start"] = descent._gradient(log_features, seen), start
        found["loss"], found["slopes"] = found["gradient"](start)
        return start

    monkeypatch.setattr(descent, "_adam", grasp)
    return found


def some_maps(rng, length=10):
    """Log-features and exact weights, where queries see some keys of those before them."""
    log_query, log_key = rng.standard_normal((length, 4)), rng.standard_normal((length, 4)) - 3
    seen = np.tri(length) * (rng.random((length, length)) < 0.6) + np.eye(length) > 0
    return log_query, log_key, softmax(rng.standard_normal((length, length)), seen), seen


@pytest.mark.parametrize("kind", ["causal", "plain", "some"])
def test_the_gradient_of_the_cross_entropy_is_that_of_its_value(kind, rng):
    log_query, log_key, target, visible = some_maps(rng)
    if kind != "some":
        visible = np.tri(10, dtype=bool) if kind == "causal" else np.ones((10, 10), bool)
        target = softmax(rng.standard_normal((10, 10)), visible)
    value, by_query, by_key = cross_entropy(log_query, log_key, target, visible)
    weights = softmax(np.log(np.exp(log_query) @ np.exp(log_key).T), visible)
    np.testing.assert_allclose(value, -np.sum(target[visible] * np.log(weights[visible])))
    assert_gradient(lambda x: cross_entropy(x, log_key, target, visible)[0], log_query, by_query)
    assert_gradient(lambda x: cross_entropy(log_query, x, target, visible)[0], log_key, by_key)


@pytest.mark.parametrize("block", [1, 7, 40])
def test_how_many_queries_are_met_at_a_time_changes_nothing(block, rng, monkeypatch):
    maps = some_maps(rng, length=40)
    monkeypatch.setattr(descent, "BLOCK", 1000)
    expected = cross_entropy(*maps)
    monkeypatch.setattr(descent, "BLOCK", block)
    for found, whole in zip(cross_entropy(*maps), expected, strict=True):
        np.testing.assert_allclose(found, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["geometry", "log_weight"])
@pytest.mark.parametrize("causal", [True, False])
def test_descent_follows_the_gradient_of_the_divergence(name, causal, exact, grasped):
    dark = some_dark(dim=8)._replace(geometry=some_dark().geometry[:5])
    dark = dark._replace(projection=dark.projection[:, :5])
    sample = HeadSample(GROUPED, KEY, MASK, MASK, causal)
    refine_dark(dark, examples(sample))

    def value(x):
        return divergence(fold_dark(dark._replace(**{name: x})), sample)

    np.testing.assert_allclose(grasped["loss"], value(getattr(dark, name)) + entropy(sample))
    assert_gradient(value, getattr(dark, name), grasped["slopes"][name])


def test_descent_of_clusters_follows_the_gradient_of_the_divergence(exact, grasped):
    sample = HeadSample(GROUPED, KEY, causal=True)
    fitted = clusters(sample, 6)
    same = refine_exponential(fitted, examples(sample))
    np.testing.assert_allclose(grasped["loss"], divergence(fitted, sample) + entropy(sample))
    for before, after in zip(fitted[:3], same[:3], strict=True):
        np.testing.assert_allclose(after, before, atol=1e-12)
    start = grasped["start"]
    for name, slope in grasped["slopes"].items():

        def value(x, name=name):
            return grasped["gradient"](start | {name: x})[0]

        assert_gradient(value, start[name], slope)


@SETTINGS
def test_descent_in_half_the_digits_has_the_gradient(options, grasped, monkeypatch):
    sample, found = HeadSample(GROUPED, KEY, **options), {}
    for dtype in ("float32", "float64"):
        monkeypatch.setattr(descent, "DTYPE", dtype)
        seen = examples(sample)
        assert {x.dtype for x in (seen[0].query, seen[0].key, seen[0].target)} == {np.dtype(dtype)}
        refine_dark(some_dark(), seen)
        dark = grasped["loss"], grasped["slopes"]
        refine_exponential(clusters(sample, 8), seen)
        found[dtype] = [dark, (grasped["loss"], grasped["slopes"])]
    for (loss, slopes), (exact, by_name) in zip(found["float32"], found["float64"], strict=True):
        np.testing.assert_allclose(loss, exact, rtol=1e-6)
        for name, slope in slopes.items():
            assert slope.dtype == np.dtype("float64")
            expected = by_name[name]
            np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Descent.


@SETTINGS
@pytest.mark.parametrize("steps", [1, 10])
def test_refining_never_raises_the_divergence_and_takes_it_down(options, steps):
    sample = HeadSample(GROUPED, KEY, **options)
    dark, fitted = some_dark(), clusters(sample, 8)
    for before, after in (
        (fold_dark(dark), fold_dark(refine_dark(dark, examples(sample), steps=steps))),
        (fitted, refine_exponential(fitted, examples(sample), steps=steps)),
    ):
        assert divergence(after, sample) < divergence(before, sample)


@pytest.mark.parametrize("rate", [1e3, 1e30, np.inf])
def test_a_descent_that_goes_astray_gives_back_where_it_began_or_better(rate):
    dark, fitted = some_dark(), clusters(PLAIN, 8)
    with np.errstate(all="ignore"):
        refined = fold_dark(refine_dark(dark, examples(PLAIN), steps=5, learning_rate=rate))
        moved = refine_exponential(fitted, examples(PLAIN), steps=5, learning_rate=rate)
    assert divergence(refined, PLAIN) <= divergence(fold_dark(dark), PLAIN) + 1e-9
    assert divergence(moved, PLAIN) <= divergence(fitted, PLAIN) + 1e-9


def test_the_best_draw_is_the_best_of_them():
    drawn = []

    def draw():
        drawn.append(some_dark(seed=len(drawn)))
        return drawn[-1]

    best = best_draw(draw, examples(CAUSAL), draws=6)
    found = [divergence(fold_dark(dark), CAUSAL) for dark in drawn]
    assert len(drawn) == 6
    assert best is drawn[int(np.argmin(found))]


@pytest.mark.parametrize(("size", "count"), [(300, 1), (64, 4), (130, 2), (20, 13)])
def test_batches_hold_every_query_once(size, count, monkeypatch):
    monkeypatch.setattr(descent, "BATCH", size)
    seen = examples(HeadSample(GROUPED, KEY, causal=True))
    found = batches(seen)
    assert len(found) == count
    # Of as many sequences as batches, each is in one of them as a whole.
    assert [len(batch) for batch in found] == [4 // count if count <= 4 else 4] * count
    for name in ("query", "visible", "target"):
        rows, expected = (
            np.concatenate([getattr(example, name) for example in given])
            for given in ([example for batch in found for example in batch], seen)
        )
        assert sorted(map(bytes, rows)) == sorted(map(bytes, expected))
    sizes = [sum(len(example.query) for example in batch) for batch in found]
    assert max(sizes) <= size


# Clusters.


def test_kmeans_finds_two_clusters_that_lie_apart_and_never_gets_worse(rng):
    truth = np.repeat([0, 1], [30, 90])
    points = 20.0 * truth[:, None] + rng.standard_normal((120, 3))
    labels, counts = kmeans(points, 2)
    assert sorted(counts) == [30, 90]
    assert len(set(zip(truth, labels, strict=True))) == 2

    def error(rounds):
        labels, _ = kmeans(points, 8, rounds)
        means = np.stack([points[labels == label].mean(axis=0) for label in labels])
        return np.sum((points - means) ** 2)

    errors = [error(rounds) for rounds in (1, 2, 4, 20)]
    assert (np.diff(errors) <= 1e-9).all()
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize(("points", "num_clusters"), [(3, 8), (50, 8)])
def test_kmeans_counts_every_point_once(points, num_clusters, rng):
    x = rng.standard_normal((points, 4))
    labels, counts = kmeans(x, num_clusters)
    assert counts.sum() == points
    np.testing.assert_array_equal(np.bincount(labels, minlength=num_clusters), counts)


def test_as_many_equal_points_as_clusters_stay_finite():
    for x in clusters(HeadSample(np.ones((2, 4, 1, 8)), np.ones((2, 4, 8))), 8)[:3]:
        assert np.isfinite(x).all()


@SETTINGS
def test_clusters_lie_between_uniform_and_exact_attention(options):
    sample = HeadSample(GROUPED, KEY, **options)
    error = np.median(output_errors(clusters(sample, 32), sample))
    zeros = np.zeros((8, 1))
    uniform = np.median(output_errors(Projections(zeros, zeros, np.zeros(1)), sample))
    assert error < 0.6 * uniform


def test_clusters_do_not_depend_on_where_the_origin_of_the_keys_lies():
    """Softmax does not."""
    far = KEY + 3.0
    moved = HeadSample(QUERY, far)
    before, after = clusters(PLAIN, 8), clusters(moved, 8)
    for here, there in zip(sequences(PLAIN), sequences(moved), strict=True):
        found = feature_weights(after, there)
        np.testing.assert_allclose(found, feature_weights(before, here), atol=1e-4)


def test_everything_random_hangs_on_the_seed():
    for function in (
        lambda seed: clusters(PLAIN, 8, max_queries=60, seed=seed),
        lambda seed: refine_dark(some_dark(), examples(PLAIN, max_queries=40, seed=seed), steps=3),
    ):
        first, again, other = (function(seed) for seed in (1, 1, 2))
        for x, y in zip(first, again, strict=True):
            np.testing.assert_array_equal(x, y)
        assert (first[0] != other[0]).any()


def test_what_is_masked_may_hold_anything():
    query, key = GROUPED.copy(), KEY.copy()
    query[~MASK], key[~MASK] = np.nan, np.nan
    holes, whole = HeadSample(query, key, MASK, MASK), HeadSample(GROUPED, KEY, MASK, MASK)
    for x, y in zip(
        refine_exponential(clusters(holes, 8), examples(holes))[:3],
        refine_exponential(clusters(whole, 8), examples(whole))[:3],
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    for name in ("query", "key"):
        with pytest.raises(ValueError, match=f"`{name}` must be finite"):
            sequences(HeadSample(GROUPED, KEY)._replace(**{name: getattr(holes, name)}))


# Held-out errors.


@pytest.mark.parametrize(("b", "t"), [(1, 2), (1, 32), (2, 5), (5, 33)])
@pytest.mark.parametrize("folds", [sequence_folds, position_folds])
def test_folds_share_nothing(folds, b, t):
    for calibrated, judged in folds(b, t):
        assert calibrated.shape == judged.shape == (b, t)
        assert calibrated.any()
        assert judged.any()
        assert not (calibrated & judged).any()
        if folds is position_folds:
            assert not (calibrated.any(axis=0) & judged.any(axis=0)).any()
        if b > 1:
            assert not (calibrated.any(axis=1) & judged.any(axis=1)).any()


def test_every_position_is_judged_once():
    for folds in (sequence_folds(1, 9), position_folds(1, 9), sequence_folds(3, 9)):
        judged = np.sum([fold[1] for fold in folds], axis=0)
        assert (judged == 1).all()


def test_errors_are_relative_errors_of_outputs_for_centred_keys():
    folded = fold_dark(some_dark())
    sample = HeadSample(GROUPED, KEY, causal=True, key_mask=MASK)
    errors, parts = output_errors(folded, sample), sequences(sample)
    assert errors.shape == (sum(len(part.query) for part in parts),)
    part, value = parts[1], KEY[1, MASK[1]] - KEY[1, MASK[1]].mean(axis=0)
    exact, found = exact_weights(part) @ value, feature_weights(folded, part) @ value
    expected = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    np.testing.assert_allclose(errors[64:128], expected, rtol=1e-5)


def test_held_out_error_judges_what_was_not_calibrated_on():
    seen = []

    def fit_part(part):
        seen.append(part)
        return fold_dark(some_dark())

    folds, sample = sequence_folds(4, 32), HeadSample(QUERY, KEY, MASK, MASK)
    error = held_out_error(fit_part, sample, folds)
    expected = [
        output_errors(fold_dark(some_dark()), HeadSample(QUERY, KEY, j & MASK, j & MASK))
        for _, j in folds
    ]
    assert error == np.median(np.concatenate(expected))
    for (calibrated, _), part in zip(folds, seen, strict=True):
        np.testing.assert_array_equal(part.query_mask, calibrated & MASK)
        np.testing.assert_array_equal(part.key_mask, calibrated & MASK)
    held_out_error(fit_part, PLAIN, folds)
    np.testing.assert_array_equal(seen[-1].key_mask, folds[-1][0])
    nothing = sample._replace(query_mask=np.zeros_like(MASK))
    assert held_out_error(fit_part, nothing, folds) == np.inf
