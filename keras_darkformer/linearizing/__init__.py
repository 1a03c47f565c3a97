"""The way from a stock model to a dark one that has kept what it could do, in one call."""

from keras_darkformer.linearizing.run import Linearized, linearize
from keras_darkformer.linearizing.report import LinearizationReport

__all__ = ["LinearizationReport", "Linearized", "linearize"]
