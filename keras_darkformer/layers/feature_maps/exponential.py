"""Exponential features without a geometry, fitted or learned rather than drawn."""

import keras
from keras import ops

from keras_darkformer.layers.feature_maps.base import FeatureMap
from keras_darkformer.layers.feature_maps.dark import draw_by_head
from keras_darkformer.ops.features import FoldedFeatures, fold_exponential
from keras_darkformer.options import FeatureOptions
from keras_darkformer.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_darkformer")
class ExponentialFeatureMap(FeatureMap):
    """Exponential features with free weights, one matrix for queries and one for keys.

        phi_q[j](q) = exp(q . A_q[:, j])
        phi_k[j](k) = exp(k . A_k[:, j] + a_j)

    Calibration with `method="clusters"` fits them to a k-means of the queries. They start as random
    features without the norm; with `projection="antithetic"`, these are Hedgehog's,
    `A_q = A_k = [W', -W']`.

    They give the kernel only up to a factor of the query, which cancels in attention. They
    therefore can't share a normaliser with the exact kernel, and `sliding_window` and `num_sinks`
    are refused.

    Args:
        num_heads: int. Heads k of keys and values, each with its own map.
        head_dim: int. Size h of a head.
        num_query_heads: int; `None` for `num_heads`.
        **kwargs: the options of `FeatureOptions` (`rank`, `tie_geometry` and `rope_geometry` have
            no effect here), and those of `keras.layers.Layer`.

    Call arguments:
        inputs: queries or keys of shape `(b, s, num_heads, head_dim)`.
        keys: bool. Whether the inputs are keys.

    Returns:
        The features, float32, of shape `(b, s, num_heads, num_features)`.

    Raises:
        TypeError: if an argument is unknown.
        ValueError: if a size is not a positive integer, or for a sliding window or sinks.

    Example:

    >>> feature_map = keras_darkformer.layers.ExponentialFeatureMap(2, 8, num_features=32, seed=0)
    >>> q, k, v = (np.random.normal(size=(1, 100, 2, 8)) for _ in range(3))
    >>> feature_map.calibrate(q, k, method="clusters")
    >>> feature_map.attend(q, k, v, causal=True).shape
    (1, 100, 2, 8)

    References:
        - [The Hedgehog & the Porcupine](https://arxiv.org/abs/2402.04347)
    """

    kind = "exponential"

    @classmethod
    def check(cls, options: FeatureOptions, head_dim: int) -> None:
        """Raises a ValueError for another kind of map, or an exact memory."""
        super().check(options, head_dim)
        if options.memory:
            raise ValueError(
                'Features of `feature_map="exponential"` know the kernel up to a factor of the '
                "query only, so they can't share a normaliser with the exact kernel of a "
                f"`sliding_window` or of `num_sinks`. Received: {options.memory}"
            )

    def build(self, input_shape: Shape | None = None) -> None:
        """Creates the weights; their shapes do not depend on the input's."""
        options = self.options
        drawn = draw_by_head(options, self.num_heads, self.head_dim, options.seed)
        kernel = drawn.swapaxes(1, 2) * (options.geometry_scale * self.head_dim**-0.25)
        self.add_weights(
            options.train_geometry or options.train_projection,
            query_kernel=kernel,
            key_kernel=kernel,
            key_bias=kernel[:, 0] * 0.0,
        )
        self.built = True

    def fold(self, *, factored: bool = False) -> FoldedFeatures:
        """The map in the form that `ops` takes."""
        self.ensure_built()
        return fold_exponential(self.query_kernel, self.key_kernel, self.key_bias)

    def call(self, inputs: Tensor, keys: bool = False) -> Tensor:
        """The features of `inputs`; see the class."""
        kernel = self.key_kernel if keys else self.query_kernel
        logits = ops.einsum("bskh,khm->bskm", ops.cast(inputs, "float32"), kernel)
        return ops.exp(logits + self.key_bias if keys else logits)
