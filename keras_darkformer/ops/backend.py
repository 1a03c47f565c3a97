"""The one place where the backends differ."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops, tree


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, inputs: Any, length: int
) -> tuple[Any, Any]:
    """Runs `carry, output = step(carry, input)` over the first axis of `inputs`.

    JAX compiles one step and loops over it: unrolled, its compile time grows
    with the length. The others run a Python loop: TensorFlow's `ops.scan` has
    no gradient under `jit_compile`, and torch's indexes its inputs step by
    step, which makes the backward pass quadratic (`unstack` does not).

    Args:
        step: function of `(carry, input)` to `(carry, output)`.
        carry: nested structure of tensors.
        inputs: nested structure of tensors with a first axis of `length`.
        length: int, known before the run.

    Returns:
        The last carry, and the outputs stacked along a new first axis.
    """
    if length > 1 and keras.config.backend() == "jax":
        return ops.scan(step, carry, inputs)
    leaves = [ops.unstack(leaf, length, axis=0) for leaf in tree.flatten(inputs)]
    outputs = []
    for block in zip(*leaves, strict=True):
        carry, output = step(carry, tree.pack_sequence_as(inputs, list(block)))
        outputs.append(output)
    return carry, ops.stack(outputs, axis=0)
