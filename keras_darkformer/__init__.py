"""Linear-time attention for Keras 3, with random features fitted to the data.

Support for KerasHub models is in `keras_darkformer.hub`. Everything else works without KerasHub, so
`hub` is imported on first use: by `convert_to_dark` for a KerasHub model, or by name. Before you
load a dark KerasHub model, run `import keras_darkformer.hub`, which registers the model's classes
with Keras.
"""

import importlib
from typing import TYPE_CHECKING, Any

from keras_darkformer import layers, ops, training
from keras_darkformer.conversion import conversion_report, convert_to_dark
from keras_darkformer.layers import DarkAttention, DarkFeatureMap, DarkTransformerBlock
from keras_darkformer.options import AttentionOptions, ConversionOptions, FeatureOptions
from keras_darkformer.surgery.report import ConversionReport
from keras_darkformer.training import (
    ApproximationLogger,
    LossSpikeCounter,
    RedrawProjections,
    approximation_report,
    calibrate,
    distil,
    teacher_targets,
    transfer_attention,
)

if TYPE_CHECKING:
    from keras_darkformer import hub
    from keras_darkformer.choosing import LayerChoice, choose_layers
    from keras_darkformer.linearizing import LinearizationReport, Linearized, linearize

__version__ = "0.1.0"

__all__ = [
    "ApproximationLogger",
    "AttentionOptions",
    "ConversionOptions",
    "ConversionReport",
    "DarkAttention",
    "DarkFeatureMap",
    "DarkTransformerBlock",
    "FeatureOptions",
    "LayerChoice",
    "LinearizationReport",
    "Linearized",
    "LossSpikeCounter",
    "RedrawProjections",
    "approximation_report",
    "calibrate",
    "choose_layers",
    "conversion_report",
    "convert_to_dark",
    "distil",
    "hub",
    "layers",
    "linearize",
    "ops",
    "teacher_targets",
    "training",
    "transfer_attention",
]


# Names that need KerasHub, and the modules that define them.
_LATE = {
    "LayerChoice": "keras_darkformer.choosing",
    "choose_layers": "keras_darkformer.choosing",
    "LinearizationReport": "keras_darkformer.linearizing",
    "Linearized": "keras_darkformer.linearizing",
    "linearize": "keras_darkformer.linearizing",
}


def __getattr__(name: str) -> Any:
    if name == "hub":
        return importlib.import_module("keras_darkformer.hub")
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)
