"""Fits dark feature maps to the statistics of a layer."""

from functools import partial

import numpy as np

from keras_darkformer.fitting.descent import batches, best_draw, examples, refine_dark
from keras_darkformer.fitting.fit import Fit
from keras_darkformer.fitting.options import CalibrationOptions
from keras_darkformer.fitting.projections import DarkParameters
from keras_darkformer.fitting.spectral import geometry_of, proposal_scale, spectrum
from keras_darkformer.fitting.statistics import HeadStatistics, LayerStatistics
from keras_darkformer.ops.projections import draw_projection, proposal_log_weight
from keras_darkformer.options import FeatureOptions


class HeadFitter:
    """Fits one head of a dark feature map, for one placement of its geometry.

    Attributes:
        needs_unrotated: whether it needs the moments before the rotation, and where the rotation
            puts coordinates.
        uses_sample: whether features are functions of the queries and keys in the sample, so that
            they can be refined and judged on it.
    """

    needs_unrotated = False
    uses_sample = False

    def fit_head(
        self, seen: HeadStatistics, features: FeatureOptions, calibration: CalibrationOptions
    ) -> DarkParameters:
        """Fits a geometry and a proposal to a head, and draws its features.

        Raises:
            ValueError: if the proposal does not exist for this head.
        """
        raise NotImplementedError


class AfterRotation(HeadFitter):
    """A geometry of any shape for rotated queries and keys, or where nothing is rotated.

    With `refine`, the spectral method keeps the best of several draws, and fits M and a weight per
    feature to the sample by descent on the divergence of attention maps.
    """

    uses_sample = True

    def fit_head(
        self, seen: HeadStatistics, features: FeatureOptions, calibration: CalibrationOptions
    ) -> DarkParameters:
        """See the base class."""
        moments = seen.moments if calibration.centers else seen.moments.uncentred()
        geometry, scale = _geometry(moments.covariance, features, calibration)
        rng = np.random.default_rng([calibration.seed, seen.head])
        shifts = moments.query_mean, moments.key_mean
        draws = partial(draw, geometry, scale, shifts, features, rng)
        if seen.sample is None or not calibration.refine or calibration.method != "spectral":
            return draws()
        known = examples(seen.sample, seed=calibration.seed)
        return refine_dark(best_draw(draws, batches(known)[0]), known)


def fit_dark(
    statistics: LayerStatistics,
    features: FeatureOptions,
    calibration: CalibrationOptions,
    head_fitter: HeadFitter,
) -> Fit:
    """Fits every head of a dark feature map; the method of `calibration` must draw features."""
    heads = [
        head_fitter.fit_head(statistics.of_head(head), features, calibration)
        for head in range(statistics.num_heads)
    ]
    fit = Fit.of_heads("dark", heads, DarkParameters._fields)
    fit.weights["query_geometry"] = fit.weights["geometry"]  # for queries with their own
    return fit


def draw(
    geometry: np.ndarray,
    proposal: np.ndarray,
    shifts: tuple[np.ndarray, np.ndarray],
    features: FeatureOptions,
    rng: np.random.Generator,
) -> DarkParameters:
    """Draws W from the proposal, and gives the features."""
    m, kind = features.num_features, features.projection
    standard = draw_projection(m, len(proposal), kind=kind, seed=rng).astype("float64")
    log_weight = proposal_log_weight(proposal * standard, proposal).astype("float64")
    return DarkParameters(geometry, proposal * standard, log_weight, *shifts, proposal)


def _geometry(
    covariance: np.ndarray, features: FeatureOptions, calibration: CalibrationOptions
) -> tuple[np.ndarray, np.ndarray]:
    """M `(r, h)` and the proposal's standard deviations along its rows."""
    head_dim, proposal = len(covariance), calibration.drawn_from
    rank = features.rank or head_dim
    geometry = geometry_of(calibration.method, covariance, features.num_features)
    if proposal == "none" and rank == head_dim:
        return geometry, np.ones(rank)
    # The proposal is diagonal along the eigenvectors of the data's covariance after M.
    values, rotation = spectrum(geometry @ covariance @ geometry.T)
    # A smaller rank keeps the directions of largest variance, which come last.
    return (rotation.T @ geometry)[-rank:], proposal_scale(proposal, values)[-rank:]
