"""Which method is taken, and which is refused."""

import numpy as np
import pytest

from keras_darkformer.fitting import (
    METHODS,
    CalibrationOptions,
    LayerStatistics,
    check_calibration,
    fit_features,
    needs_sample,
)
from keras_darkformer.fitting.held_out import output_errors
from keras_darkformer.fitting.sequences import (
    HeadSample,
)
from keras_darkformer.options import FeatureOptions

from .fits import (
    FEATURES,
    FITTERS,
    HEAD_DIM,
    HEADS,
    assert_fit,
    assert_same,
    data,
    fitted,
    folded_head,
    output_error,
)


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


def test_auto_does_not_fall_for_features_that_remember_positions():
    rng = np.random.default_rng(2)
    same_in_every_sequence = rng.standard_normal((2, 1, 40, HEADS, HEAD_DIM))
    noise = 0.05 * rng.standard_normal((2, 6, 40, HEADS, HEAD_DIM))
    query, key = same_in_every_sequence + noise
    how = {"causal": True}
    clusters, spectral = (fitted(query, key, method=x, how=how) for x in ("clusters", "spectral"))
    seen = [output_error(query, key, fit, causal=True) for fit in (clusters, spectral)]
    assert seen[0] < seen[1]
    assert fitted(query, key, method="auto", how=how).kind == "dark"


def test_auto_has_no_clusters_beside_a_window():
    options = {"method": "auto", "how": {"causal": True}}
    query, key = np.random.default_rng(2).standard_normal((2, 6, 40, HEADS, HEAD_DIM)) / 2
    assert fitted(query, key, **options).kind == "exponential"
    windowed = FeatureOptions(num_features=FEATURES, sliding_window=4)
    assert fitted(query, key, features=windowed, **options).kind == "dark"


def test_auto_is_spectral_where_the_sample_is_not_what_features_see():
    place = "before"
    assert_same(fitted(*data(), place, method="auto"), fitted(*data(), place), rtol=0)
    seen = LayerStatistics(
        HEADS, HEAD_DIM, needs_sample=True, needs_unrotated=True, max_tokens=100, seed=0
    )
    seen.update(*data(), causal=True)  # there is a sample all the same
    seen.update_unrotated(*data())
    calibration, features = CalibrationOptions(method="auto"), FeatureOptions(num_features=FEATURES)
    expected = fit_features(seen, features, calibration.of_method("spectral"), FITTERS[place])
    assert_same(fit_features(seen, features, calibration, FITTERS[place]), expected, rtol=0)


def test_auto_is_spectral_where_queries_and_keys_are_of_other_tokens():
    query, key = data()[0][:, :7], data()[1]
    assert_same(fitted(query, key, method="auto"), fitted(query, key), rtol=0)
    assert_fit(fitted(query, key, method="clusters"))


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
    calibration = CalibrationOptions(method="clusters")
    message = r"does not go with a `sliding_window`.*\"spectral\""
    with pytest.raises(ValueError, match=message):
        check_calibration(calibration, windowed)
    with pytest.raises(ValueError, match=message):
        fitted(*data(), features=windowed, method="clusters")
    check_calibration(calibration, FeatureOptions(num_features=FEATURES))


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
