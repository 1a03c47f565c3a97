"""The learned part of DARKFormer: a geometry and the projection drawn for it."""

import math
import random
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_darkformer.ops import (
    dark_attention,
    dark_attention_state,
    dark_features,
    draw_projection,
    initial_state,
)
from keras_darkformer.ops.checks import one_of, positive_integer
from keras_darkformer.ops.projections import PROJECTIONS


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkFeatureMap(keras.layers.Layer):
    """Positive random features whose covariance is learned.

    Owns, per head, a geometry M and a projection W, and with them the feature
    map of the dark kernel `exp(q^' Sigma k^)`, `Sigma = M'M`:

        phi_j(x) = m^(-1/2) exp(w_j . M x^ - |M x^|^2 / 2),    x^ = h^(-1/4) x

    Rows of W are drawn from `N(0, I)`; seen from x, the directions `M'w` are
    drawn from `N(0, Sigma)`, where the data has its weight once M is trained.

    | `train_geometry` | `train_projection` | this is |
    | --- | --- | --- |
    | true | false | DARKFormer |
    | false | false | Performer (with `geometry_scale=1.0`) |
    | false | true | the learned-feature kernel |

    Geometry and projection are float32 under every dtype policy.

    Args:
        num_heads: int. Heads k of keys and values, each with its own map.
        head_dim: int. Size h of a head.
        num_features: int. Features m per head.
        rank: int. Rows r of the geometry; `None` for `head_dim`.
        projection: `"orthogonal"` or `"gaussian"`; see `ops.draw_projection`.
        train_geometry: bool. Whether the geometry is trainable.
        train_projection: bool. Whether the projection is trainable.
        geometry_scale: float. The geometry starts at this times the identity.
            Below 1 it trades a flatter kernel for less noise.
        seed: int. Seed of the projection; `None` for a random one, which
            `keras.utils.set_random_seed` makes repeatable.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        inputs: queries or keys of shape `(b, s, num_heads, head_dim)`.

    Returns:
        Their features, float32, of shape `(b, s, num_heads, num_features)`.

    Raises:
        ValueError: if a size is not a positive integer, `projection` unknown
            or `geometry_scale` not positive.

    Example:

    >>> feature_map = keras_darkformer.DarkFeatureMap(2, 8, 64, seed=0)
    >>> q, k, v = (np.random.normal(size=(1, 100, 2, 8)) for _ in range(3))
    >>> feature_map.attend(q, k, v, causal=True).shape
    (1, 100, 2, 8)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
        - [Rethinking Attention with Performers](https://arxiv.org/abs/2009.14794)
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_features: int,
        *,
        rank: int | None = None,
        projection: str = "orthogonal",
        train_geometry: bool = True,
        train_projection: bool = False,
        geometry_scale: float = 1.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < geometry_scale < math.inf:
            raise ValueError(
                f"`geometry_scale` must be positive and finite. Received: {geometry_scale!r}"
            )
        self.num_heads = positive_integer("num_heads", num_heads)
        self.head_dim = positive_integer("head_dim", head_dim)
        self.num_features = positive_integer("num_features", num_features)
        self.rank = self.head_dim if rank is None else positive_integer("rank", rank)
        self.projection_kind = one_of("projection", projection, PROJECTIONS)
        self.train_geometry = train_geometry
        self.train_projection = train_projection
        self.geometry_scale = geometry_scale
        self.seed = random.randrange(2**31) if seed is None else seed

    def build(self, input_shape: Any = None) -> None:
        """Creates geometry and projection; their shapes do not depend on the input's."""
        identity = self.geometry_scale * np.eye(self.rank, self.head_dim)
        self.geometry = self._add_float32_weight(
            "geometry", np.stack([identity] * self.num_heads), self.train_geometry
        )
        self.projection = self._add_float32_weight(
            "projection", self._draw(self.seed), self.train_projection
        )
        self.built = True

    def _add_float32_weight(self, name: str, value: np.ndarray, trainable: bool) -> Any:
        # Logits are differences of large numbers: no policy may round these.
        return self.add_weight(
            name=name,
            shape=value.shape,
            dtype="float32",
            autocast=False,
            trainable=trainable,
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(value, dtype=dtype),
        )

    def _draw(self, seed: int | None) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.stack(
            [
                draw_projection(self.num_features, self.rank, kind=self.projection_kind, seed=rng)
                for _ in range(self.num_heads)
            ]
        )

    def redraw(self, seed: int | None = None) -> None:
        """Replaces the projection by a new draw; the kernel estimated stays the same.

        Args:
            seed: int, or `None` for a random draw.

        Raises:
            ValueError: if the projection is trained, since that would be lost.
        """
        if self.train_projection:
            raise ValueError(
                f"`{self.name}` has `train_projection=True`: `redraw` would throw away "
                "what the projection has learned."
            )
        self._ensure_built()
        self.projection.assign(self._draw(random.randrange(2**31) if seed is None else seed))

    def covariance(self) -> Any:
        """The covariance `Sigma = M'M` of the features' directions, `(num_heads, h, h)`."""
        self._ensure_built()
        return ops.einsum("krh,krj->khj", self.geometry, self.geometry)

    def attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        causal: bool = False,
        key_mask: Any = None,
        initial_state: Any = None,
        return_state: bool = False,
        chunk_size: int | None = None,
        remat: bool | None = None,
    ) -> Any:
        """`ops.dark_attention` with this map's geometry and projection.

        Args:
            query: `(b, t, n, h)`, n a multiple of `num_heads`.
            key: `(b, s, num_heads, h)`.
            value: `(b, s, num_heads, v)`.
            causal: bool.
            key_mask: `(b, s)`, true = attend, or `None`.
            initial_state: state of the keys before, or `None`.
            return_state: bool.
            chunk_size: int or `None`.
            remat: bool or `None`.

        Returns:
            The output `(b, t, n, v)`, with `return_state` also the state.
        """
        self._ensure_built()
        return dark_attention(
            query,
            key,
            value,
            self.geometry,
            self.projection,
            causal=causal,
            key_mask=key_mask,
            initial_state=initial_state,
            return_state=return_state,
            chunk_size=chunk_size,
            remat=remat,
        )

    def accumulate(
        self, key: Any, value: Any, *, key_mask: Any = None, initial_state: Any = None
    ) -> Any:
        """The state after these keys: `ops.dark_attention_state` with what this map owns."""
        self._ensure_built()
        return dark_attention_state(
            key,
            value,
            self.geometry,
            self.projection,
            key_mask=key_mask,
            initial_state=initial_state,
        )

    def get_initial_state(self, batch_size: Any, value_dim: int | None = None) -> Any:
        """The state before the first token, for values of `value_dim` (`None`: `head_dim`)."""
        value_dim = self.head_dim if value_dim is None else value_dim
        return initial_state(batch_size, self.num_heads, self.num_features, value_dim)

    def call(self, inputs: Any) -> Any:
        """The features of `inputs`; see the class."""
        return dark_features(inputs, self.geometry, self.projection)

    def _ensure_built(self) -> None:
        if not self.built:
            self.build()

    def compute_output_shape(self, input_shape: Any) -> Any:
        """`(b, s, num_heads, head_dim) -> (b, s, num_heads, num_features)`."""
        return (*input_shape[:-1], self.num_features)

    def compute_output_spec(self, inputs: Any) -> Any:
        """Features are float32 under every policy."""
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype="float32")

    def get_config(self) -> dict[str, Any]:
        """All constructor arguments; the seed also where it was drawn."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "num_features": self.num_features,
            "rank": self.rank,
            "projection": self.projection_kind,
            "train_geometry": self.train_geometry,
            "train_projection": self.train_projection,
            "geometry_scale": self.geometry_scale,
            "seed": self.seed,
        }
