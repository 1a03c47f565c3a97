"""Learning rates: a schedule for short fits, and a second rate for some of the variables."""

from collections.abc import Iterable
from typing import Any

import keras
from keras.optimizers.schedules import CosineDecay

from keras_darkformer.compiling import made_anew
from keras_darkformer.types import Tensor

# Keras ships no type information.
Optimizer = Any


def warm_cosine(learning_rate: float, steps: int) -> CosineDecay:
    """Rises to `learning_rate` over the first tenth of the steps, then falls by a cosine to zero.

    Adam's first steps are as long as its last ones, however small the gradients are. On a
    pretrained model they do more harm than good unless they are kept short.
    """
    warmup = steps // 10
    return CosineDecay(
        learning_rate / (warmup + 1),
        steps - warmup,
        warmup_target=learning_rate if warmup else None,
        warmup_steps=warmup,
    )


def two_rates(optimizer: Optimizer, variables: Iterable[Any], ratio: float) -> Optimizer:
    """Copies an optimizer, with `ratio` times its learning rate for some variables.

    The copy has the same settings, but nothing that the original has accumulated. The original is
    not changed.

    `keras.optimizers.MultiOptimizer` could do this with two optimizers. But it has no learning rate
    that a callback could change, and it clips the gradients of each optimizer by their own norm.

    Args:
        optimizer: a `keras.optimizers.Optimizer`.
        variables: those whose learning rate is multiplied.
        ratio: float.

    Raises:
        ValueError: for a `MultiOptimizer`, whose variables already have different rates, or if the
            optimizer can't be rebuilt from its config.
    """
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError(
            "`optimizer` must have one learning rate. Received: a MultiOptimizer, in which every "
            "optimizer has its own"
        )
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return keras.optimizers.LossScaleOptimizer(
            two_rates(optimizer.inner_optimizer, variables, ratio),
            initial_scale=optimizer.initial_scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
    own_rate = {id(v) for v in variables}
    stock: Any = type(optimizer)

    class TwoRates(stock):
        """The base class, with two learning rates."""

        # Every optimizer of every backend updates its variables by this one method.
        def _backend_update_step(
            self, grads: list[Tensor], trainable_variables: list[Any], learning_rate: Tensor
        ) -> None:
            pairs = list(zip(grads, trainable_variables, strict=True))
            for factor, some in (
                (1.0, [pair for pair in pairs if id(pair[1]) not in own_rate]),
                (ratio, [pair for pair in pairs if id(pair[1]) in own_rate]),
            ):
                if some:
                    gradients, updated = map(list, zip(*some, strict=True))
                    super()._backend_update_step(gradients, updated, factor * learning_rate)

    return made_anew(optimizer, TwoRates)
