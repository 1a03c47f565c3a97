"""Logits of a model, computed a few positions at a time.

The logits of a whole batch are by far the largest tensors of a step: 8 x 256 tokens with a
vocabulary of 256,000 take 2.1 GB, and a loss makes several such tensors. Whatever is independent at
each position can be computed in slices.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_darkformer.ops.backend import scan
from keras_darkformer.types import Model, Tensor

# Tokens whose logits are computed at a time. A product with the whole vocabulary reads all of its
# weights, which does not pay for fewer tokens; more tokens take more memory.
TOKENS = 128
TYPICAL_ROWS = 8  # while the number of rows is unknown


class Parts:
    """A model that predicts tokens, split into its last layer and all that comes before.

    If the last layer is not known to work on each position independently, the first part is the
    whole model.

    Attributes:
        hidden: function from the model's inputs and `training` to the inputs of the last layer,
            `(b, t, d)`.
        logits: function from these, at all or some positions, to logits.
    """

    def __init__(self, model: Model) -> None:
        self.hidden: Callable[..., Tensor] = model
        self.logits: Callable[[Tensor], Tensor] = lambda hidden: hidden
        history = getattr(getattr(model, "output", None), "_keras_history", None)
        if history is None:  # not functional, or with several outputs
            return
        last = history.operation
        arguments = last._inbound_nodes[history.node_index].arguments
        # An embedding in reverse, from hidden states to logits.
        if not isinstance(last, keras.layers.Dense | keras.layers.Embedding):
            return
        (x,) = arguments.keras_tensors
        if len(x.shape) != 3:
            return
        hidden = keras.Model(model.input, x)
        if type(model).call is not type(hidden).call:
            return
        self.hidden = hidden
        self.logits = lambda hidden: last(hidden, **arguments.kwargs)


def over_positions(function: Callable[..., Any], *arguments: Any, remat: bool = False) -> Any:
    """`function(*arguments)`, computed over slices of the second axis.

    Args:
        function: function from nested structures of tensors `(b, t, ...)` to another such
            structure. It must work on each position independently.
        arguments: its arguments.
        remat: whether the backward pass computes each slice again, so that the function's
            intermediate results exist for one slice at a time.
    """
    rows, length = keras.tree.flatten(arguments)[0].shape[:2]
    positions = max(1, TOKENS // (rows or TYPICAL_ROWS))
    if length is None or length <= positions:
        return function(*arguments)
    count = -(-length // positions)

    def cut(x: Tensor) -> Tensor:
        behind = [(0, 0)] * (len(x.shape) - 2)
        x = ops.pad(x, [(0, 0), (0, count * positions - length), *behind])
        return ops.reshape(x, (-1, count, positions, *x.shape[2:]))

    def join(x: Tensor) -> Tensor:
        return ops.reshape(x, (-1, count * positions, *x.shape[3:]))[:, :length]

    _, results = scan(
        lambda carry, slices, constants: (carry, function(*slices)),
        (),
        keras.tree.map_structure(cut, arguments),
        (),
        remat=remat,
    )
    return keras.tree.map_structure(join, results)
