"""Linear-time attention for Keras 3 whose random features fit the data.

KerasHub models live in `keras_darkformer.hub`, which is imported on first use
or together with keras_hub: the rest works without KerasHub.
"""

import importlib
from typing import TYPE_CHECKING, Any

from keras_darkformer import layers, ops, training
from keras_darkformer._lazy_hub import register_hub_lazily
from keras_darkformer.layers import DarkAttention, DarkFeatureMap, DarkTransformerBlock
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
    from keras_darkformer.hub import conversion_report, convert_to_dark

__version__ = "0.1.0"

__all__ = [
    "ApproximationLogger",
    "DarkAttention",
    "DarkFeatureMap",
    "DarkTransformerBlock",
    "LossSpikeCounter",
    "RedrawProjections",
    "approximation_report",
    "calibrate",
    "conversion_report",
    "convert_to_dark",
    "distil",
    "hub",
    "layers",
    "ops",
    "teacher_targets",
    "training",
    "transfer_attention",
]


def __getattr__(name: str) -> Any:
    if name not in ("hub", "convert_to_dark", "conversion_report"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    hub = importlib.import_module("keras_darkformer.hub")
    return hub if name == "hub" else getattr(hub, name)


register_hub_lazily()
