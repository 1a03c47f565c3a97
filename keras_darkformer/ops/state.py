"""What attention carries from one piece of a sequence to the next.

States are named tuples of tensors, batch first, whose size does not depend on the length. They are
float32, except for the keys and values of an exact memory, which keep the inputs' dtype.
`StateShapes` defines their shapes.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
from keras import ops

from keras_darkformer.memory import NO_MEMORY, Memory
from keras_darkformer.ops.backend import largest
from keras_darkformer.ops.checks import shapes_differ
from keras_darkformer.types import Shape, Tensor

# Stands for log(0). Finite, so that differences of two of them are zero instead of NaN; far below
# any log-feature that can matter.
LOG_ZERO = -1e30
# The attention that a place without a token has received.
NOTHING = -1.0


class State(NamedTuple):
    """Sums of features over the keys seen.

    Attributes:
        kv_state: `(b, k, m, v)`, features times values, scaled by `exp(-log_scale)`.
        key_state: `(b, k, m)`, features, scaled in the same way.
        log_scale: `(b, k)`, the running maximum of the log-features.
    """

    kv_state: Tensor
    key_state: Tensor
    log_scale: Tensor


class Tokens(NamedTuple):
    """Keys and values that are kept as they are, for each head by itself.

    Attributes:
        key: `(b, k, x, h)`.
        value: `(b, k, x, v)`.
        received: float32, `(b, k, x)`, the attention that a key has received so far, see
            `exact_memory`; -1 where there is no token or it is masked.
    """

    key: Tensor
    value: Tensor
    received: Tensor

    @property
    def is_real(self) -> Tensor:
        """Where there is a token, bool `(b, k, x)`."""
        return self.received > NOTHING


class MemoryState(NamedTuple):
    """The state with an exact memory. Missing parts are empty tuples.

    Attributes:
        sums: `State` of the keys that have left the memory; empty without features.
        sinks: `Tokens`, the first `num_sinks`.
        recent: `Tokens`, the last `sliding_window`.
        kept: `Tokens`, `cache_size` of those between, oldest first.
    """

    sums: State | tuple[()]
    sinks: Tokens | tuple[()]
    recent: Tokens | tuple[()]
    kept: Tokens | tuple[()]


class PositionedState(NamedTuple):
    """The state of a layer that counts positions for rotary embeddings.

    Attributes:
        attention: `State` or `MemoryState`.
        position: float32, `(b,)`, the number of tokens seen.
    """

    attention: "AttentionState"
    position: Tensor


AttentionState: TypeAlias = State | MemoryState | PositionedState


class StateShapes(NamedTuple):
    """The shapes of a state, and all that follows from them.

    Attributes:
        num_heads: k, the number of heads of keys and values.
        num_features: m; 0 for an exact memory alone.
        value_dim: v.
        head_dim: h; only an exact memory asks for it.
        memory: `Memory`.
        positioned: whether positions are counted.
        dtype: of the keys and values in an exact memory.
    """

    num_heads: int
    num_features: int
    value_dim: int
    head_dim: int | None = None
    memory: Memory = NO_MEMORY
    positioned: bool = False
    dtype: str = "float32"

    def leaves(self) -> list[Shape]:
        """The shapes of all leaves without the batch, in the order of `keras.tree`."""
        k, m, v, h = self[:4]
        shapes: list[Shape] = [(k, m, v), (k, m), (k,)] if m else []
        for size in self._sizes:
            shapes += [(k, size, h), (k, size, v), (k, size)] if size else []
        return [*shapes, ()] if self.positioned else shapes

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.memory.num_sinks, self.memory.window, self.memory.cache_size

    @property
    def _sums(self) -> int:
        """The number of leaves of the sums."""
        return 3 if self.num_features else 0

    def dtypes(self) -> list[str]:
        """The dtypes of all leaves."""
        tokens = sum(size > 0 for size in self._sizes)
        stored = [self.dtype, self.dtype, "float32"] * tokens
        return ["float32"] * self._sums + stored + ["float32"] * self.positioned

    def nbytes(self) -> int:
        """Bytes of the state of one sequence."""
        return sum(map(nbytes, self.leaves(), self.dtypes()))

    def pack(self, leaves: Sequence[Any]) -> Any:
        """The state with these leaves."""
        rest = iter(leaves)
        state: Any = State(*(next(rest) for _ in range(3))) if self.num_features else ()
        if self.memory:
            parts = [Tokens(*(next(rest) for _ in range(3))) if x else () for x in self._sizes]
            state = MemoryState(state, *parts)
        return PositionedState(state, next(rest)) if self.positioned else state

    def zeros(self, batch_size: Tensor) -> Any:
        """The state before the first token."""
        leaves = [
            ops.zeros((batch_size, *shape), dtype=dtype)
            for shape, dtype in zip(self.leaves(), self.dtypes(), strict=True)
        ]
        if self.num_features:
            leaves[2] = leaves[2] + LOG_ZERO
        for index in range(self._sums + 2, len(leaves) - self.positioned, 3):
            leaves[index] = leaves[index] + NOTHING
        return self.pack(leaves)

    def spec(self, batch_size: int | None) -> Any:
        """The state as `keras.KerasTensor`s."""
        return self.pack(
            [
                keras.KerasTensor((batch_size, *shape), dtype=dtype)
                for shape, dtype in zip(self.leaves(), self.dtypes(), strict=True)
            ]
        )

    def stored(self, state: Any) -> Any:
        """A state in float32 as it is kept: keys and values in their dtype."""
        if self.dtype == "float32" or not self.memory:
            return state
        leaves = zip(_leaves(state), self.dtypes(), strict=True)
        return self.pack([ops.cast(leaf, dtype) for leaf, dtype in leaves])

    def check(self, state: Any, batch_size: int | None) -> Any:
        """Checks a state's shapes; returns it in float32 with its named tuples restored.

        Saving and loading turn named tuples into plain sequences.

        Raises:
            ValueError: if the shapes differ.
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
    """Like `tree.flatten`, which on torch takes a tenth of a step of generation."""
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
    head_dim: int | None = None,
    sliding_window: int | None = None,
    num_sinks: int = 0,
    cache_size: int = 0,
    dtype: str = "float32",
) -> State | MemoryState:
    """The state of `dark_attention` before the first token.

    Args:
        batch_size: int, or scalar int tensor.
        num_key_value_heads: int, k.
        num_features: int, m; 0 for an exact memory alone.
        value_dim: int, v.
        head_dim: int, h; needed with an exact memory.
        sliding_window, num_sinks, cache_size: as for `dark_attention`.
        dtype: dtype of the keys and values to come, in which an exact memory keeps them.

    Returns:
        A `State` of float32 tensors. `kv_state`, of shape `(b, k, m, v)`, is the sum of features
        times values over the tokens seen; `key_state`, of shape `(b, k, m)`, is the sum of
        features. Both are scaled by `exp(-log_scale)`, where `log_scale`, of shape `(b, k)`, is the
        running maximum of the log-features. With an exact memory, a `MemoryState`. Its `sums` are
        such a `State` of the keys that have left the memory, or `()` without features. `sinks`,
        `recent` and `kept` are `Tokens`, x of each kind: keys `(b, k, x, h)`, values `(b, k, x, v)`
        and the attention they have received, `(b, k, x)`, which is -1 where there is no token.

    Raises:
        ValueError: if there is a memory but no `head_dim`, neither a memory nor features, a cache
            without a window, or a memory size that is out of range.
    """
    memory = Memory(sliding_window, num_sinks, cache_size)
    memory.check()
    if not memory and not num_features:
        raise ValueError(
            "`num_features` may be 0 beside a `sliding_window` or `num_sinks` only. "
            "Received: num_features=0, neither of them"
        )
    if memory and head_dim is None:
        raise ValueError("An exact memory needs a `head_dim`: the state holds keys.")
    sizes = num_key_value_heads, num_features, value_dim, head_dim
    return StateShapes(*sizes, memory, dtype=dtype).zeros(batch_size)


def add_states(states: State, log_weight: Tensor) -> State:
    """The sum of states times `exp(log_weight)`.

    They are added at the largest of their scales, so every factor is at most 1, however far apart
    the norms of their keys are.

    Args:
        states: `State` whose leaves are stacked along a new first axis, D.
        log_weight: `(D,)`.
    """
    # Scales are constants for the gradient, as everywhere.
    logits = ops.stop_gradient(states.log_scale) + log_weight[:, None, None]
    log_scale = ops.maximum(largest(logits, 0), LOG_ZERO)
    weights = ops.exp(logits - log_scale)
    return State(
        ops.einsum("dbk,dbkmv->bkmv", weights, states.kv_state),
        ops.einsum("dbk,dbkm->bkm", weights, states.key_state),
        log_scale,
    )


def nbytes(shape: Shape, dtype: Any) -> int:
    """Bytes of a tensor of this shape and dtype."""
    bits = re.sub(r"\D", "", keras.backend.standardize_dtype(dtype)) or 8  # "bool" names none
    return math.prod(shape) * int(bits) // 8
