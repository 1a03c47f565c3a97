"""Fits exponential feature maps to a sample of a layer."""

from keras_darkformer.fitting.clusters import clusters
from keras_darkformer.fitting.descent import examples, refine_exponential
from keras_darkformer.fitting.fit import Fit
from keras_darkformer.fitting.held_out import held_out_error, sequence_folds
from keras_darkformer.fitting.options import CalibrationOptions
from keras_darkformer.fitting.projections import Projections
from keras_darkformer.fitting.sequences import HeadSample
from keras_darkformer.fitting.statistics import LayerStatistics
from keras_darkformer.options import FeatureOptions

TAUS = (0.15, 0.3)  # sharpness of clusters; held-out error decides between them


def fit_exponential(
    statistics: LayerStatistics, features: FeatureOptions, calibration: CalibrationOptions
) -> Fit:
    """Fits every head of an exponential feature map to a sample, which `statistics` must have."""
    heads = []
    for head in range(statistics.num_heads):
        sample = statistics.of_head(head).sample
        assert sample is not None
        heads.append(fit_exponential_head(sample, features, calibration))
    return Fit.of_heads("exponential", heads, ("query_kernel", "key_kernel", "key_bias"))


def fit_exponential_head(
    sample: HeadSample, features: FeatureOptions, calibration: CalibrationOptions
) -> Projections:
    """Clusters with the better sharpness, refined by descent if `calibration` says so."""

    def fitted(part: HeadSample, tau: float) -> Projections:
        return clusters(part, features.num_features, tau, seed=calibration.seed)

    def error(tau: float) -> float:
        folds = sequence_folds(*sample.query.shape[:2])
        return held_out_error(lambda part: fitted(part, tau), sample, folds)

    found = fitted(sample, min(TAUS, key=error) if sample.is_square else TAUS[0])
    if calibration.refine:
        found = refine_exponential(found, examples(sample, seed=calibration.seed))
    return found
