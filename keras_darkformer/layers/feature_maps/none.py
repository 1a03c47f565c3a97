"""No features: attention to an exact memory alone."""

import keras
from keras import ops

from keras_darkformer.fitting import CalibrationOptions
from keras_darkformer.layers.feature_maps.base import FeatureMap
from keras_darkformer.ops.scores import exact_logits
from keras_darkformer.ops.state import LOG_ZERO
from keras_darkformer.options import FeatureOptions
from keras_darkformer.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_darkformer")
class NoFeatureMap(FeatureMap):
    """No features: a query sees the sinks, the window and the kept keys, and nothing else.

    It has no weights and nothing to fit. The bytes of the features can go into a larger memory
    instead. With sinks and a window, this is StreamingLLM's attention, a baseline for features.

    Args:
        num_heads: int. Heads k of keys and values.
        head_dim: int. Size h of a head.
        num_query_heads: int; `None` for `num_heads`.
        **kwargs: the options of `FeatureOptions`, of which only `sliding_window`, `num_sinks` and
            `cache_size` have an effect, and those of `keras.layers.Layer`.

    Raises:
        TypeError: if an argument is unknown.
        ValueError: if a size is not a positive integer, or there is neither a window nor sinks.

    Example:

    >>> feature_map = keras_darkformer.layers.NoFeatureMap(2, 8, sliding_window=16, num_sinks=4)
    >>> q, k, v = (np.random.normal(size=(1, 100, 2, 8)) for _ in range(3))
    >>> feature_map.attend(q, k, v, causal=True).shape
    (1, 100, 2, 8)

    References:
        - [StreamingLLM](https://arxiv.org/abs/2309.17453)
    """

    kind = "none"

    @classmethod
    def check(cls, options: FeatureOptions, head_dim: int) -> None:
        """Raises a ValueError for another kind of map, or without an exact memory."""
        super().check(options, head_dim)
        if not options.memory:
            raise ValueError(
                '`feature_map="none"` needs a `sliding_window` or `num_sinks`: without features '
                "they are all that queries see. Received: neither of them"
            )

    @property
    def num_features(self) -> int:
        """0: there are no features."""
        return 0

    def build(self, input_shape: Shape | None = None) -> None:
        """Marks the map as built; there are no weights."""
        self.built = True

    def fold(self, *, factored: bool = False) -> None:
        """`None`, which stands for no features in `ops`."""
        return

    def call(self, inputs: Tensor, keys: bool = False) -> Tensor:
        """Raises a ValueError: there are no features to return."""
        raise ValueError(f"`{self.name}` has no features to return; `attend` needs none.")

    def compute_output_spec(self, inputs: Tensor, keys: bool = False) -> Tensor:
        """Raises the same error as `call`."""
        return self.call(inputs, keys)

    def check_calibration(self, options: CalibrationOptions) -> None:
        """Raises a ValueError: there is nothing to fit."""
        raise ValueError(f"`{self.name}` has no features: there is nothing to calibrate.")

    def redraw(self, seed: int | None = None) -> None:
        """Does nothing: there is nothing to draw."""

    def log_scores(self, query: Tensor, key: Tensor, exact: Tensor = None) -> Tensor:
        """Logarithms of the weights `attend` gives keys: softmax's own in the memory."""
        logits = exact_logits(query, key)
        return logits if exact is None else ops.where(exact, logits, LOG_ZERO)
