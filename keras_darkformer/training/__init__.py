"""From a freshly converted model to one that has kept what it knew."""

from keras_darkformer.training.calibrate import calibrate
from keras_darkformer.training.callbacks import (
    ApproximationLogger,
    LossSpikeCounter,
    RedrawProjections,
)
from keras_darkformer.training.distil import distil, teacher_targets
from keras_darkformer.training.distillation_loss import DistillationLoss
from keras_darkformer.training.report import ApproximationReport, approximation_report
from keras_darkformer.training.transfer import transfer_attention

__all__ = [
    "ApproximationLogger",
    "ApproximationReport",
    "DistillationLoss",
    "LossSpikeCounter",
    "RedrawProjections",
    "approximation_report",
    "calibrate",
    "distil",
    "teacher_targets",
    "transfer_attention",
]
