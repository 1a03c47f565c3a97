"""Fits features to queries and keys: NumPy arrays in, weights out, in float64, head by head;
descents go over their sample in float32.

It knows no layer and no tensor. `LayerStatistics` collects what a layer sees, `fit_features` turns
it into a `Fit`, and a `HeadFitter` says where the geometry sits relative to the rotary rotation.
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
