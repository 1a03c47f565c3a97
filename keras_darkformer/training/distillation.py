"""Teacher and student as Keras models, so that a step of both stays on the device."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_darkformer.training.distillation_loss import DistillationLoss
from keras_darkformer.training.positions import Parts, over_positions
from keras_darkformer.types import Model, Tensor


class Teacher(keras.Model):
    """A model that outputs another model's predictions, as `DistillationLoss.targets` gives them.

    Args:
        model: a model that gives logits of tokens, `(b, t, vocabulary)`.
        loss: a `DistillationLoss`.
    """

    def __init__(self, model: Model, loss: DistillationLoss) -> None:
        super().__init__(name="teacher")
        self.model = model
        self.parts = Parts(model)
        self.distillation_loss = loss
        self.built = True  # the model has its variables

    def hidden(self, inputs: Any) -> Tensor:
        """The hidden states that targets are made from, `(b, t, d)`."""
        hidden = self.parts.hidden(inputs, training=False)
        if len(hidden.shape) != 3:
            raise ValueError(
                "`teacher` must give logits of tokens, of shape `(b, t, vocabulary)`. Received: an "
                f"output of shape {tuple(hidden.shape)}. Finetune a classifier with `fit`."
            )
        return ops.stop_gradient(hidden)

    def targets(self, hidden: Tensor) -> dict[str, Tensor]:
        """The targets at some positions."""
        return self.distillation_loss.targets(ops.stop_gradient(self.parts.logits(hidden)))

    def call(self, inputs: Any) -> dict[str, Tensor]:
        """The targets at all positions."""
        return over_positions(self.targets, self.hidden(inputs))


class Distillation(keras.Model):
    """A model that outputs how far its student is from its teacher.

    `fit` trains whatever is trainable in both: freeze the teacher first.

    `keras.distillation.Distiller` does not fit here. It freezes the teacher for good, needs labels,
    ignores padding, takes no precomputed targets, and holds the logits of both models for all
    positions at once.

    Args:
        student: a model that gives logits of tokens.
        teacher: another such model, or `None` if the targets come with the inputs.
        loss: a `DistillationLoss`.

    Call arguments:
        inputs: a dict of `"inputs"`, for both models; `"weights"`, float32 `(b, t)`, one per
            prediction; and without a teacher `"targets"`, as `DistillationLoss.targets` gives them.
    """

    def __init__(self, student: Model, teacher: Model | None, loss: DistillationLoss) -> None:
        # With a mixed precision policy Keras scales the loss; targets stay float32.
        super().__init__(name="distil", dtype=student.dtype_policy, autocast=False)
        self.student = student
        self.parts = Parts(student)
        self.teacher = None if teacher is None else Teacher(teacher, loss)
        self.mean = _Mean(dtype="float32")
        self.distillation_loss = loss
        self.built = True  # both models have their variables

    def call(self, inputs: dict[str, Any], training: bool = False) -> Tensor:
        """The mean divergence, a scalar."""
        teacher, loss = self.teacher, self.distillation_loss
        hidden = self.parts.hidden(inputs["inputs"], training=training)
        targets: Callable[[Any], dict[str, Tensor]] = _same
        if teacher is None:
            known = inputs["targets"]
        elif loss.top_k is None:
            # Targets for the whole vocabulary are computed slice by slice.
            known, targets = teacher.hidden(inputs["inputs"]), teacher.targets
        else:
            known = teacher(inputs["inputs"])

        def divergence(hidden: Tensor, known: Any) -> Tensor:
            return loss.divergence(targets(known), self.parts.logits(hidden))

        terms = over_positions(divergence, hidden, known, remat=True)
        return self.mean(hidden, terms, inputs["weights"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the last step; called on PyTorch.

        Keras registers variables with PyTorch by their paths, which teacher and student share.
        PyTorch would reset only one of two variables with the same path, and the gradients of the
        other would add up from step to step.
        """
        for variable in self.trainable_variables:
            variable.value.grad = None

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """The divergence, plus the losses that layers of the student add."""
        return y_pred + sum(ops.sum(loss) for loss in self.losses)

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the student, which is what `keras.callbacks.ModelCheckpoint` should write."""
        return self.student.save(*args, **kwargs)

    def save_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the student's weights."""
        return self.student.save_weights(*args, **kwargs)


class _Mean(keras.layers.Layer):
    """A weighted mean without the positions that Keras masks: Keras passes masks to layers."""

    def call(self, hidden: Tensor, terms: Tensor, weights: Tensor, hidden_mask: Any = None) -> Any:
        if hidden_mask is not None:
            weights = weights * ops.cast(hidden_mask, weights.dtype)
        return ops.sum(terms * weights) / ops.maximum(ops.sum(weights), 1.0)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """None: the mean has no positions."""


def _same(x: Any) -> Any:
    return x
