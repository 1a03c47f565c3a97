"""Geometries that sit before the rotary rotation.

The features then see vectors that are rotated after the geometry. A rotation mixes the two members
of a plane, so each plane has only one variance, and the proposal one scale per plane. The members
of plane p are the unrotated coordinates p and p + h / 2.
"""

import numpy as np

from keras_darkformer.fitting.dark import HeadFitter, draw
from keras_darkformer.fitting.options import CalibrationOptions
from keras_darkformer.fitting.projections import DarkParameters
from keras_darkformer.fitting.spectral import geometry_of, proposal_scale, spectrum
from keras_darkformer.fitting.statistics import HeadStatistics
from keras_darkformer.options import FeatureOptions


class BeforeRotation(HeadFitter):
    """A geometry of any shape for queries and keys that are rotated after it.

    It is fitted to the moments before the rotation. There are no shifts, because means before the
    rotation are not means after it.
    """

    needs_unrotated = True

    def fit_head(
        self, seen: HeadStatistics, features: FeatureOptions, calibration: CalibrationOptions
    ) -> DarkParameters:
        """See the base class."""
        assert seen.unrotated is not None
        query_mean, key_mean, covariance = seen.unrotated
        geometry = geometry_of(calibration.method, covariance, features.num_features)
        if calibration.method == "spectral":
            # Symmetric: without damping it is the identity, which commutes with rotations.
            geometry = spectrum(covariance)[1] @ geometry
        # Second moments, as planes that rotate slowly keep their means.
        second = covariance + np.outer(query_mean, query_mean) + np.outer(key_mean, key_mean)
        variances = _mean_of_members(np.diag(geometry @ second @ geometry.T))
        scale = _of_members(proposal_scale(calibration.drawn_from, variances))[seen.layout]
        rng = np.random.default_rng([calibration.seed, seen.head])
        zero = np.zeros_like(query_mean)
        return draw(geometry, scale, (zero, zero), features, rng)


def _mean_of_members(values: np.ndarray) -> np.ndarray:
    """The mean over the members of each plane, `(h,)` to `(h / 2,)`."""
    return values.reshape(2, -1).mean(axis=0)


def _of_members(planes: np.ndarray) -> np.ndarray:
    """`(h / 2,)` to `(h,)`: both members of a plane get its value."""
    return np.concatenate([planes, planes])
