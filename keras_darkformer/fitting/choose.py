"""Fits whole feature maps: checks what a fit needs, chooses its method, and runs it."""

from keras_darkformer.fitting.dark import HeadFitter, fit_dark
from keras_darkformer.fitting.exponential import fit_exponential, fit_exponential_head
from keras_darkformer.fitting.fit import Fit
from keras_darkformer.fitting.held_out import held_out_error, position_folds
from keras_darkformer.fitting.options import METHODS, CalibrationOptions
from keras_darkformer.fitting.projections import Projections, fold_dark
from keras_darkformer.fitting.sequences import HeadSample
from keras_darkformer.fitting.statistics import HeadStatistics, LayerStatistics
from keras_darkformer.options import FeatureOptions


def check_calibration(calibration: CalibrationOptions, features: FeatureOptions) -> None:
    """Raises a ValueError if features with these options can't be calibrated this way."""
    if calibration.method == "clusters" and features.memory:
        raise ValueError(
            '`method="clusters"` does not go with a `sliding_window` or `num_sinks`: its features '
            "know the kernel only up to a factor of the query, so they can't share a normaliser "
            'with the exact kernel. Use "spectral".'
        )


def needs_sample(calibration: CalibrationOptions, head_fitter: HeadFitter) -> bool:
    """Whether a fit needs a sample besides moments."""
    method = calibration.method
    can_refine = method == "auto" or (method == "spectral" and calibration.refine)
    return method == "clusters" or (can_refine and head_fitter.uses_sample)


def fit_features(
    statistics: LayerStatistics,
    features: FeatureOptions,
    calibration: CalibrationOptions,
    head_fitter: HeadFitter,
) -> Fit:
    """Fits a feature map to what was seen of a layer.

    Args:
        statistics: statistics of the layer, with a sample if `needs_sample` says so.
        features: options of the map.
        calibration: how to fit it.
        head_fitter: the fitter for where the geometry sits relative to the rotation.

    Returns:
        A `Fit`.

    Raises:
        ValueError: if the map can't be calibrated this way, nothing was seen, or the proposal does
            not exist.
    """
    check_calibration(calibration, features)
    if not statistics.moments.count.all():
        raise ValueError(
            "Every query or every key was masked: there is nothing to fit. (Or the model holds "
            "this layer and does not call it.)"
        )
    if calibration.method == "auto":
        method = _best_method(statistics, features, calibration, head_fitter)
        calibration = calibration.of_method(method)
    if calibration.method == "clusters":
        return fit_exponential(statistics, features, calibration)
    return fit_dark(statistics, features, calibration, head_fitter)


def _best_method(
    statistics: LayerStatistics,
    features: FeatureOptions,
    calibration: CalibrationOptions,
    head_fitter: HeadFitter,
) -> str:
    """The method with the lowest error at positions and in sequences it was not fitted to.

    `"spectral"` if the sample can't decide: features are not functions of what it holds, or queries
    and keys are of different tokens.
    """
    excluded = ["auto"]
    if features.memory:
        excluded.append("clusters")
    errors = {method: 0.0 for method in METHODS if method not in excluded}
    for head in range(statistics.num_heads):
        seen = statistics.of_head(head)
        if not head_fitter.uses_sample or seen.sample is None or not seen.sample.is_square:
            return "spectral"
        folds = position_folds(*seen.sample.query.shape[:2])
        for method in errors:
            by_method = calibration.of_method(method)

            def fit_part(
                part: HeadSample,
                seen: HeadStatistics = seen,
                by_method: CalibrationOptions = by_method,
            ) -> Projections:
                if by_method.method == "clusters":
                    return fit_exponential_head(part, features, by_method)
                found = head_fitter.fit_head(seen.of_part(part), features, by_method)
                return fold_dark(found)

            errors[method] += held_out_error(fit_part, seen.sample, folds)
    return min(errors, key=errors.__getitem__)
