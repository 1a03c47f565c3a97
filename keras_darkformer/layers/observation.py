"""What goes into an attention layer, shown to those who calibrate or judge it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from keras import ops

from keras_darkformer.ops import exact_dark_attention
from keras_darkformer.ops.scores import visible_pairs


@dataclasses.dataclass(frozen=True)
class Observation:
    """The inputs of one call of an attention layer, projected to heads.

    Attributes:
        unrotated_query: `(b, t, n, h)`.
        unrotated_key: `(b, s, k, h)`.
        value: `(b, s, k, v)`.
        rotate_query, rotate_key: functions that rotate such tensors by their
            positions; identities where there is no rotary embedding.
        causal: Whether query t attends to keys up to t.
        key_mask: `(b, s)`, true = attend, or `None`.
        attention_mask: `(b or 1, n or 1, t, s)`, true = attend, or `None`.
    """

    unrotated_query: Any
    unrotated_key: Any
    value: Any
    rotate_query: Callable[[Any], Any]
    rotate_key: Callable[[Any], Any]
    causal: bool
    key_mask: Any = None
    attention_mask: Any = None

    def __post_init__(self) -> None:
        """Masks become bool."""
        for name in ("key_mask", "attention_mask"):
            if (mask := getattr(self, name)) is not None:
                object.__setattr__(self, name, ops.cast(mask, "bool"))

    @property
    def query(self) -> Any:
        """The rotated queries."""
        return self.rotate_query(self.unrotated_query)

    @property
    def key(self) -> Any:
        """The rotated keys."""
        return self.rotate_key(self.unrotated_key)

    @property
    def visible(self) -> Any:
        """Which keys each query may attend to, bool, broadcasting to `(b, n, t, s)`."""
        return visible_pairs(
            self.unrotated_query,
            self.unrotated_key,
            causal=self.causal,
            key_mask=self.key_mask,
            attention_mask=self.attention_mask,
        )

    def for_features(self, feature_map: Any) -> tuple[Any, Any]:
        """Queries and keys as `feature_map.attend` takes them."""
        query = feature_map.before_rotation(self.unrotated_query)
        key = feature_map.before_rotation(self.unrotated_key)
        return self.rotate_query(query), self.rotate_key(key)

    def exact_output(self) -> Any:
        """Softmax attention: what the layer's features stand for."""
        return exact_dark_attention(
            self.query,
            self.key,
            self.value,
            causal=self.causal,
            key_mask=self.key_mask,
            attention_mask=self.attention_mask,
        )


Observer = Callable[[Any, Observation], Any]


@contextlib.contextmanager
def observed(layers: Iterable[Any], observer: Observer, position_offset: Any = None) -> Iterator:
    """Has the layers' attention computed by `observer(layer, observation)` in the block.

    Args:
        layers: dark attention layers.
        observer: returns the output of attention, `(b, t, n, v)`.
        position_offset: int or scalar tensor added to all positions.
    """
    layers = list(layers)
    for layer in layers:
        layer.observer, layer.position_offset = observer, position_offset
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = layer.position_offset = None
