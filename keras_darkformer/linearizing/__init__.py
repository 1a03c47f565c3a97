"""From a stock model to a dark one that keeps its abilities, in one call."""

from keras_darkformer.linearizing.report import LinearizationReport
from keras_darkformer.linearizing.run import Linearized, linearize

__all__ = ["LinearizationReport", "Linearized", "linearize"]
