"""Fits features to queries and keys, head by head: NumPy arrays in, weights out.

Fits are in float64; descents go over their sample in float32. This part knows no layers and no
tensors. `LayerStatistics` collects what a layer sees, and `fit_features` turns it into a `Fit`. A
`HeadFitter` determines where the geometry sits relative to the rotary rotation.
"""

from keras_darkformer.fitting.choose import check_calibration, fit_features, needs_sample
from keras_darkformer.fitting.dark import AfterRotation, HeadFitter
from keras_darkformer.fitting.far_offset import FarOffset
from keras_darkformer.fitting.fit import Fit
from keras_darkformer.fitting.moments import Moments
from keras_darkformer.fitting.options import METHODS, PROPOSALS, CalibrationOptions
from keras_darkformer.fitting.rotary import BeforeRotation
from keras_darkformer.fitting.statistics import LayerStatistics

__all__ = [
    "METHODS",
    "PROPOSALS",
    "AfterRotation",
    "BeforeRotation",
    "CalibrationOptions",
    "FarOffset",
    "Fit",
    "HeadFitter",
    "LayerStatistics",
    "Moments",
    "check_calibration",
    "fit_features",
    "needs_sample",
]
