"""The outputs of an attention layer's projections."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from keras import ops

from keras_darkformer.ops import exact_dark_attention
from keras_darkformer.ops.scores import visible_pairs
from keras_darkformer.types import Config, Tensor

if TYPE_CHECKING:
    from keras_darkformer.layers.feature_maps import FeatureMap


def as_it_is(x: Tensor) -> Tensor:
    """The rotation of layers without rotary positions."""
    return x


@dataclasses.dataclass(frozen=True)
class Heads:
    """The inputs of one call of an attention layer, projected to heads.

    Code that calibrates or evaluates a layer is given this, too.

    Attributes:
        unrotated_query: `(b, t, n, h)`.
        unrotated_key: `(b, s, k, h)`.
        value: `(b, s, k, v)`.
        rotate_query, rotate_key: functions that rotate such tensors by their positions; identities
            where there is no rotary embedding.
        causal: whether query t attends to keys up to t.
        key_mask: `(b, s)`, true = attend, or `None`.
        attention_mask: `(b or 1, n or 1, t, s)`, true = attend, or `None`.
    """

    unrotated_query: Tensor
    unrotated_key: Tensor
    value: Tensor
    rotate_query: Callable[[Tensor], Tensor] = as_it_is
    rotate_key: Callable[[Tensor], Tensor] = as_it_is
    causal: bool = False
    key_mask: Tensor = None
    attention_mask: Tensor = None

    def __post_init__(self) -> None:
        """Casts masks to bool."""
        for name in ("key_mask", "attention_mask"):
            if (mask := getattr(self, name)) is not None:
                object.__setattr__(self, name, ops.cast(mask, "bool"))

    @property
    def query(self) -> Tensor:
        """The rotated queries."""
        return self.rotate_query(self.unrotated_query)

    @property
    def key(self) -> Tensor:
        """The rotated keys."""
        return self.rotate_key(self.unrotated_key)

    @property
    def masks(self) -> Config:
        """The masks, as `ops.exact_dark_attention` takes them."""
        names = ("causal", "key_mask", "attention_mask")
        return {name: getattr(self, name) for name in names}

    @property
    def visible(self) -> Tensor:
        """Which keys each query may attend to, bool, broadcasting to `(b, n, t, s)`."""
        return visible_pairs(
            self.unrotated_query,
            self.unrotated_key,
            **self.masks,
        )

    def for_features(self, feature_map: "FeatureMap") -> tuple[Tensor, Tensor]:
        """Queries and keys as `feature_map.attend` takes them."""
        query = feature_map.before_rotation(self.unrotated_query)
        key = feature_map.before_rotation(self.unrotated_key)
        return self.rotate_query(query), self.rotate_key(key)

    def exact_output(self) -> Tensor:
        """Softmax attention: what the layer's features stand for."""
        return exact_dark_attention(self.query, self.key, self.value, **self.masks)
