"""What attention carries from one piece of a sequence to the next.

Named tuples of float32 tensors, batch first on every leaf, of a size that does not depend on the
length. Their shapes are written once, in `StateShapes`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
from keras import ops

from keras_darkformer.ops.checks import shapes_differ
from keras_darkformer.types import Shape, Tensor

# Stands for log(0). Finite, so that differences of two of them are zero instead of NaN; far below
# any log-feature that can matter.
LOG_ZERO = -1e30


class State(NamedTuple):
    """Sums of features over the keys seen.

    Attributes:
        kv_state: `(b, k, m, v)`, features times values, scaled by `exp(-log_scale)`.
        key_state: `(b, k, m)`, features, scaled alike.
        log_scale: `(b, k)`, the running maximum of the log-features.
    """

    kv_state: Tensor
    key_state: Tensor
    log_scale: Tensor


class Tokens(NamedTuple):
    """Keys and values kept as they are.

    Attributes:
        key: `(b, x, k, h)`.
        value: `(b, x, k, v)`.
        mask: `(b, x)`, 1 where there is a token, 0 where it is masked or missing.
    """

    key: Tensor
    value: Tensor
    mask: Tensor


class WindowedState(NamedTuple):
    """The state with a sliding window of the exact kernel.

    Attributes:
        sums: `State` of the keys that have left the window.
        recent: `Tokens`, the last `sliding_window` of them.
    """

    sums: State
    recent: Tokens


class PositionedState(NamedTuple):
    """The state of a layer that counts positions for rotary embeddings.

    Attributes:
        attention: `State` or `WindowedState`.
        position: `(b,)`, tokens seen.
    """

    attention: "AttentionState"
    position: Tensor


AttentionState: TypeAlias = State | WindowedState | PositionedState


class StateShapes(NamedTuple):
    """The shapes of a state, and all that follows from them.

    Attributes:
        num_heads: k, heads of keys and values.
        num_features: m.
        value_dim: v.
        head_dim: h; only a window asks for it.
        sliding_window: W, or `None` without a window.
        positioned: whether positions are counted.
    """

    num_heads: int
    num_features: int
    value_dim: int
    head_dim: int | None = None
    sliding_window: int | None = None
    positioned: bool = False

    def leaves(self) -> list[Shape]:
        """The shapes of all leaves, less the batch, in the order of `keras.tree`."""
        k, m, v, h, window, positioned = self
        shapes: list[Shape] = [(k, m, v), (k, m), (k,)]
        if window is not None:
            shapes += [(window, k, h), (window, k, v), (window,)]
        return [*shapes, ()] if positioned else shapes

    def pack(self, leaves: Sequence[Any]) -> Any:
        """The state of these leaves."""
        sums = State(*leaves[:3])
        windowed = self.sliding_window is not None
        state = WindowedState(sums, Tokens(*leaves[3:6])) if windowed else sums
        return PositionedState(state, leaves[-1]) if self.positioned else state

    def zeros(self, batch_size: Tensor) -> Any:
        """The state before the first token."""
        leaves = [ops.zeros((batch_size, *shape), dtype="float32") for shape in self.leaves()]
        leaves[2] = ops.full((batch_size, self.num_heads), LOG_ZERO, dtype="float32")
        return self.pack(leaves)

    def spec(self, batch_size: int | None) -> Any:
        """The state as `keras.KerasTensor`s."""
        return self.pack(
            [keras.KerasTensor((batch_size, *shape), dtype="float32") for shape in self.leaves()]
        )

    def check(self, state: Any, batch_size: int | None) -> Any:
        """A state of these shapes in float32, its named tuples restored.

        Saving and loading turn them into plain sequences.

        Raises:
            ValueError: if the shapes are others.
        """
        found = _leaves(state)
        expected = [(batch_size, *shape) for shape in self.leaves()]
        received = [tuple(leaf.shape) for leaf in found]
        if len(received) != len(expected) or any(map(shapes_differ, received, expected)):
            raise ValueError(
                "`initial_state` must be a state returned for these sizes, with tensors of shapes "
                f"{expected}. Received: shapes {received}"
            )
        return self.pack([_in_float32(leaf) for leaf in found])


def _leaves(state: Any) -> list[Tensor]:
    """As `tree.flatten`, which takes a tenth of a step of generation on torch."""
    if not isinstance(state, tuple | list):
        return [state]
    return [leaf for part in state for leaf in _leaves(part)]


def _in_float32(leaf: Tensor) -> Tensor:
    is_float32 = keras.backend.standardize_dtype(leaf.dtype) == "float32"
    return leaf if is_float32 and ops.is_tensor(leaf) else ops.cast(leaf, "float32")


def initial_state(
    batch_size: Tensor,
    num_key_value_heads: int,
    num_features: int,
    value_dim: int,
    *,
    sliding_window: int | None = None,
    head_dim: int | None = None,
) -> State | WindowedState:
    """The state of `dark_attention` before the first token.

    Args:
        batch_size: int, or scalar int tensor.
        num_key_value_heads: int, k.
        num_features: int, m.
        value_dim: int, v.
        sliding_window: int W, the keys that the exact kernel sees, or `None`.
        head_dim: int, h; needed with a window.

    Returns:
        A `State` of float32 tensors: `kv_state` of shape `(b, k, m, v)` and `key_state`
        `(b, k, m)`, the sums over the tokens seen of features times values and of features, both
        scaled by `exp(-log_scale)`, and `log_scale` `(b, k)`, the running maximum of the
        log-features. With a window a `WindowedState`: such `sums` of the keys older than the last
        W, and the last W themselves as `recent`, keys `(b, W, k, h)`, values `(b, W, k, v)` and a
        mask `(b, W)`, 1 where there is a token and 0 where it is masked or missing.

    Raises:
        ValueError: if there is a window and no `head_dim`.
    """
    if sliding_window is not None and head_dim is None:
        raise ValueError("`sliding_window` needs a `head_dim`: the state holds keys.")
    return StateShapes(
        num_key_value_heads, num_features, value_dim, head_dim, sliding_window
    ).zeros(batch_size)


def add_states(states: State, log_weight: Tensor) -> State:
    """The sum of states times `exp(log_weight)`.

    Added at the largest of their scales, so every factor is at most 1, however far apart the norms
    of their keys are.

    Args:
        states: `State` whose leaves are stacked along a new first axis, D.
        log_weight: `(D,)`.
    """
    # Scales are constants to the gradient, as everywhere.
    logits = ops.stop_gradient(states.log_scale) + log_weight[:, None, None]
    log_scale = ops.maximum(ops.max(logits, axis=0), LOG_ZERO)
    weights = ops.exp(logits - log_scale)
    return State(
        ops.einsum("dbk,dbkmv->bkmv", weights, states.kv_state),
        ops.einsum("dbk,dbkm->bkm", weights, states.key_state),
        log_scale,
    )
