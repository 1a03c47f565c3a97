"""The feature map of the paper: a learned geometry and the projection drawn for it."""

import random

import keras
import numpy as np
from keras import ops

from keras_darkformer.layers.feature_maps.base import FeatureMap
from keras_darkformer.layers.feature_maps.placement import placement_of
from keras_darkformer.ops import (
    apply_geometry,
    dark_features,
    draw_projection,
    proposal_log_weight,
)
from keras_darkformer.ops.features import DarkParameters, FoldedFeatures, fold, fold_query_scale
from keras_darkformer.options import FeatureOptions
from keras_darkformer.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkFeatureMap(FeatureMap):
    """Positive random features whose covariance is learned.

    For each head, the layer owns a geometry M and a projection W. They define the feature map of
    the dark kernel `exp(q^' Sigma k^)`, with `Sigma = M'M`:

        phi_j(x) = m^(-1/2) exp(w_j . M x^ - |M x^|^2 / 2),    x^ = h^(-1/4) x

    The rows of W are drawn from `N(0, I)`. Seen from x, the directions `M'w` are then drawn from
    `N(0, Sigma)`, which follows the data once M is trained.

    | `train_geometry` | `train_projection` | this is |
    | --- | --- | --- |
    | true | false | DARKFormer |
    | false | false | Performer (with `geometry_scale=1.0`) |
    | false | true | the learned-feature kernel |

    `calibrate` fits a map to queries and keys. It may centre them with the shifts `query_shift` and
    `key_shift`. It may also draw W from another distribution with standard deviations `proposal`,
    and `log_weight` is then half the logarithm of the density ratio. Both leave the kernel as it
    is. Without calibration, `proposal` is ones and the others are zeros.

    All weights are float32 under every dtype policy.

    Args:
        num_heads: int. Heads k of keys and values, each with its own map.
        head_dim: int. Size h of a head.
        num_query_heads: int, a multiple of `num_heads`; `None` for the same number. Only a sliding
            window or sinks need it: they add a weight, `far_offset`, of one number per query head.
        **kwargs: the options of `FeatureOptions`, and those of `keras.layers.Layer`.

    Call arguments:
        inputs: queries or keys of shape `(b, s, num_heads, head_dim)`.
        keys: bool. Whether the inputs are keys. With tied geometry and without calibration, queries
            and keys have the same features.

    Returns:
        The features, float32, of shape `(b, s, num_heads, num_features)`.

    Raises:
        TypeError: if an argument is unknown.
        ValueError: if a size is not a positive integer, an option is out of range, or options
            exclude each other.

    Example:

    >>> feature_map = keras_darkformer.DarkFeatureMap(2, 8, num_features=64, seed=0)
    >>> q, k, v = (np.random.normal(size=(1, 100, 2, 8)) for _ in range(3))
    >>> feature_map.calibrate(q, k, method="spectral")
    >>> feature_map.attend(q, k, v, causal=True).shape
    (1, 100, 2, 8)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
        - [Rethinking Attention with Performers](https://arxiv.org/abs/2009.14794)
    """

    kind = "dark"
    query_geometry: Tensor = None  # if queries share the keys' geometry

    @classmethod
    def check(cls, options: FeatureOptions, head_dim: int) -> None:
        """Raises a ValueError for another kind of map, or options that exclude each other."""
        super().check(options, head_dim)
        placement_of(options).check(options, head_dim)

    @property
    def rank(self) -> int:
        """Rows r of the geometry."""
        return self.head_dim if self.options.rank is None else self.options.rank

    def build(self, input_shape: Shape | None = None) -> None:
        """Creates the weights; their shapes do not depend on the input's."""
        options, heads, rank = self.options, self.num_heads, self.rank
        geometry = np.stack([options.geometry_scale * np.eye(rank, self.head_dim)] * heads)
        self.add_weights(options.train_geometry, geometry=geometry)
        if not options.tie_geometry:
            self.add_weights(options.train_geometry, query_geometry=geometry)
        drawn = draw_by_head(options, heads, rank, options.seed)
        self.add_weights(options.train_projection, projection=drawn)
        self.add_weights(
            False,
            proposal=np.ones((heads, rank)),
            log_weight=np.zeros((heads, options.num_features)),
            query_shift=np.zeros((heads, self.head_dim)),
            key_shift=np.zeros((heads, self.head_dim)),
        )
        if options.memory:
            self.add_weights(options.train_geometry, far_offset=np.zeros(self.num_query_heads))
        self.built = True

    @property
    def dark_parameters(self) -> DarkParameters:
        """The parameters that `ops.dark_attention` takes; `parameters` is torch's name."""
        self.ensure_built()
        return DarkParameters(
            geometry=self.placement.of_features(self.geometry),
            projection=self.projection,
            query_geometry=self.query_geometry,
            log_weight=self.log_weight,
            query_shift=self.query_shift,
            key_shift=self.key_shift,
        )

    def fold(self, *, factored: bool = False) -> FoldedFeatures:
        """The map in the form that `ops` takes; see `FeatureMap`."""
        parameters, sizes = self.dark_parameters, (self.num_heads, self.head_dim)
        features = fold(parameters, *sizes, factored=factored)
        if not self.memory:
            return features
        scale = fold_query_scale(parameters, *sizes, self.num_query_heads, self.far_offset)
        return features._replace(query_scale=scale)

    def call(self, inputs: Tensor, keys: bool = False) -> Tensor:
        """The features of `inputs`; see the class."""
        geometry, projection, query_geometry, log_weight, query_shift, key_shift = (
            self.dark_parameters
        )
        if query_geometry is not None and not keys:
            geometry = query_geometry
        if geometry is None:  # applied by `before_rotation`
            geometry = np.stack([np.eye(self.head_dim)] * self.num_heads)
        return dark_features(
            inputs,
            geometry,
            projection,
            log_weight=log_weight,
            shift=key_shift if keys else query_shift,
            tilt=query_shift if keys else None,
        )

    def covariance(self) -> Tensor:
        """The covariance `Sigma = M'M` of the features' directions, `(num_heads, h, h)`.

        If queries and keys have separate geometries, it is `M_q'M_k`.
        """
        self.ensure_built()
        query_geometry = self.geometry if self.query_geometry is None else self.query_geometry
        return ops.einsum("krh,krj->khj", query_geometry, self.geometry)

    def before_rotation(self, inputs: Tensor) -> Tensor:
        """What is rotated by positions, for queries or keys x: `M x`, or x if M comes after.

        Args:
            inputs: `(b, t, n, h)`, n a multiple of `num_heads`.
        """
        self.ensure_built()
        return self.placement.before_rotation(inputs, self.geometry)

    @property
    def estimates_kernel(self) -> bool:
        """True unless the projection is learned: drawn features have the kernel as their mean."""
        return not self.options.train_projection

    def exact_query(self, query: Tensor) -> Tensor:
        """The query whose softmax attention to the raw keys is the dark kernel itself.

        It is `Sigma'(q^ - b) + b`, times `h^(1/4)`. The features estimate attention with it.

        Args:
            query: `(b, t, n, h)`, rotated where there is a rotation.
        """
        self.ensure_built()
        if self.placement.of_features(self.geometry) is None:
            return query
        groups = query.shape[2] // self.num_heads
        shift = self.query_shift * self.head_dim**0.25
        kernel = ops.swapaxes(self.covariance(), 1, 2)
        back = ops.repeat(shift - ops.einsum("khj,kj->kh", kernel, shift), groups, axis=0)
        return ops.cast(apply_geometry(ops.cast(query, "float32"), kernel) + back, query.dtype)

    def redraw(self, seed: int | None = None) -> None:
        """Replaces the projection by a new draw; the estimated kernel stays the same.

        Args:
            seed: int, or `None` for a random draw.

        Raises:
            ValueError: if the projection is learned, since what it has learned would be lost.
        """
        if self.options.train_projection:
            raise ValueError(
                f"`{self.name}` has `train_projection=True`: `redraw` would throw away what the "
                "projection has learned."
            )
        self.ensure_built()
        seed = random.randrange(2**31) if seed is None else seed
        scale = ops.convert_to_numpy(self.proposal)
        drawn = draw_by_head(self.options, self.num_heads, self.rank, seed) * scale[:, None, :]
        self.projection.assign(drawn)
        self.log_weight.assign(proposal_log_weight(drawn, scale))


def draw_by_head(options: FeatureOptions, num_heads: int, dim: int, seed: int | None) -> np.ndarray:
    """A projection for every head, `(num_heads, m, dim)`."""
    rng = np.random.default_rng(seed)
    kind, m = options.projection, options.num_features
    return np.stack([draw_projection(m, dim, kind=kind, seed=rng) for _ in range(num_heads)])
