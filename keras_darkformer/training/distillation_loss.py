"""The loss of distillation: how far a model's predictions are from its teacher's."""

from typing import Any

import keras
from keras import ops

from keras_darkformer.checks import optional_integer
from keras_darkformer.types import Config, Tensor


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DistillationLoss(keras.distillation.DistillationLoss):
    """KL divergence from a teacher's next-token probabilities to a model's, in nats per token.

    `distil` trains on it. It also works with `keras.distillation.Distiller`, to learn labels or
    features at the same time.

    With `top_k`, the teacher's likeliest tokens are compared one by one, and all other tokens count
    as one.

    Args:
        top_k: int. Number of likeliest tokens; `None` for the whole vocabulary.

    Raises:
        ValueError: if `top_k` is not a positive integer.

    Example:

        loss = DistillationLoss(top_k=64)
        keras.distillation.Distiller(teacher, student, [loss], student_loss_weight=0.5)

    References:
        - [Distilling the Knowledge in a Neural Network](https://arxiv.org/abs/1503.02531)
    """

    def __init__(self, top_k: int | None = None) -> None:
        self.top_k = optional_integer("top_k", top_k)

    def targets(self, logits: Tensor) -> dict[str, Tensor]:
        """The part of a teacher's logits `(..., vocabulary)` that a student learns from.

        Returns:
            `log_probs`, float32, `(..., k)`; and with `top_k` the tokens they belong to,
            `token_ids`, int32, of the same shape.
        """
        log_probs = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
        if self.top_k is None:
            return {"log_probs": log_probs}
        log_probs, ids = ops.top_k(log_probs, min(self.top_k, logits.shape[-1]))
        return {"token_ids": ops.cast(ids, "int32"), "log_probs": log_probs}

    def divergence(self, targets: dict[str, Tensor], logits: Tensor) -> Tensor:
        """The divergence at every position, `(...)`, from targets to logits `(..., vocabulary)`."""
        theirs = targets["log_probs"]
        ours = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
        if "token_ids" not in targets:
            return ops.sum(ops.exp(theirs) * (theirs - ours), axis=-1)
        ours = ops.take_along_axis(ours, targets["token_ids"], axis=-1)
        near = ops.sum(ops.exp(theirs) * (theirs - ours), axis=-1)
        rest, our_rest = (
            ops.maximum(1.0 - ops.sum(ops.exp(x), axis=-1), 1e-6) for x in (theirs, ours)
        )
        return near + rest * (ops.log(rest) - ops.log(our_rest))

    def compute_loss(self, teacher_outputs: Tensor, student_outputs: Tensor, **kwargs: Any) -> Any:
        """The mean divergence over all positions, from logits `(..., vocabulary)`."""
        targets = self.targets(ops.stop_gradient(teacher_outputs))
        return ops.mean(self.divergence(targets, student_outputs))

    def get_config(self) -> Config:
        """All constructor arguments."""
        return {"top_k": self.top_k}

    @classmethod
    def from_config(cls, config: Config) -> "DistillationLoss":
        """The loss with these arguments."""
        return cls(**config)
