"""The logits of a model a few positions at a time.

The logits of a whole batch are by far the largest tensors of a step: 8 x 256 tokens of a vocabulary
of 256,000 take 2.1 GB, and a loss makes several such tensors. What is computed at each position
alone can be computed in slices.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_darkformer.ops.backend import scan
from keras_darkformer.types import Model, Tensor

# Tokens whose logits are there at a time. A product with the whole vocabulary reads all of its
# weights: it is not worth that for fewer, and memory grows with more.
TOKENS = 128
TYPICAL_ROWS = 8  # where their number is not known yet


class Parts:
    """A model that predicts tokens, as all but its last layer, and that layer.

    Where the last layer of a model is not known to work at each position alone, the first part is
    the whole model.

    Attributes:
        hidden: function of the model's inputs, and of `training`, to what the last layer gets,
            `(b, t, d)`.
        logits: function of that, of some of the positions, to their logits.
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
        function: function that works at each position alone, of nested structures of tensors
            `(b, t, ...)` to one such.
        arguments: its arguments.
        remat: whether the backward pass computes each slice anew. Then no more than one slice of
            what the function makes on its way is there at a time.
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
