"""What all feature maps have in common."""

import dataclasses
import random
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_darkformer.checks import positive_integer
from keras_darkformer.fitting import (
    CalibrationOptions,
    Fit,
    LayerStatistics,
    check_calibration,
    fit_features,
    needs_sample,
)
from keras_darkformer.layers.feature_maps.far_offset import FarMass
from keras_darkformer.layers.feature_maps.placement import AfterRotation, placement_of
from keras_darkformer.layers.feature_maps.weights import CheckedWeights, check_stored
from keras_darkformer.memory import Memory
from keras_darkformer.ops.attention import accumulate, are_few, attend
from keras_darkformer.ops.backend import numbers
from keras_darkformer.ops.features import FoldedFeatures
from keras_darkformer.ops.scores import exact_pairs, log_scores
from keras_darkformer.ops.state import AttentionState, State, StateShapes
from keras_darkformer.options import FeatureOptions, shows_options
from keras_darkformer.types import Config, Shape, Tensor


class FeatureMap(CheckedWeights, keras.layers.Layer):
    """Maps queries and keys to positive features whose products are weights of attention.

    A subclass owns the weights, and its `fold` says how they turn queries and keys into
    log-features. Attention, states, scores and calibration follow from that.

    Args:
        num_heads: int. Heads k of keys and values, each with its own map.
        head_dim: int. Size h of a head.
        num_query_heads: int, a multiple of `num_heads`; `None` for the same number. Only a sliding
            window or sinks need it.
        **kwargs: the options of `FeatureOptions`, and those of `keras.layers.Layer`.

    Raises:
        TypeError: if an argument is unknown.
        ValueError: if a size is not a positive integer, `num_query_heads` is not a multiple of
            `num_heads`, or an option is out of range.
    """

    kind: ClassVar[str]

    @shows_options(FeatureOptions, but=("feature_map",))
    def __init__(
        self, num_heads: int, head_dim: int, *, num_query_heads: int | None = None, **kwargs: Any
    ) -> None:
        kwargs.setdefault("feature_map", self.kind)
        options, kwargs = FeatureOptions.take(type(self), kwargs)
        super().__init__(**kwargs)
        self.num_heads = positive_integer("num_heads", num_heads)
        self.head_dim = positive_integer("head_dim", head_dim)
        if num_query_heads is None:
            num_query_heads = num_heads
        self.num_query_heads = positive_integer("num_query_heads", num_query_heads)
        if self.num_query_heads % self.num_heads:
            raise ValueError(
                f"`num_query_heads` must be a multiple of `num_heads`, {self.num_heads}. "
                f"Received: num_query_heads={self.num_query_heads}"
            )
        self.check(options, self.head_dim)
        if options.seed is None:
            options = dataclasses.replace(options, seed=random.randrange(2**31))
        self.options = options

    @classmethod
    def check(cls, options: FeatureOptions, head_dim: int) -> None:
        """Raises a ValueError if no map of this class can have these options."""
        if options.feature_map != cls.kind:
            raise ValueError(
                f'`{cls.__name__}` is `feature_map="{cls.kind}"`. '
                f"Received: feature_map={options.feature_map!r}"
            )

    @property
    def num_features(self) -> int:
        """Features m per head."""
        return self.options.num_features

    @property
    def memory(self) -> Memory:
        """The sizes of the exact memory."""
        return self.options.memory

    @property
    def placement(self) -> AfterRotation:
        """Where a geometry sits relative to the rotation."""
        return placement_of(self.options)

    def ensure_built(self) -> None:
        """Creates the weights if they do not exist yet; they do not depend on an input."""
        if not self.built:
            self.build()

    def add_weights(self, trainable: bool, **values: np.ndarray) -> None:
        """Creates weights with these names and values, in float32 under every policy."""

        def initializer(value: np.ndarray) -> Any:
            return lambda shape, dtype=None: ops.convert_to_tensor(value, dtype=dtype)

        for name, value in values.items():
            # Logits are differences of large numbers: no policy may round these.
            weight = self.add_weight(
                name=name,
                shape=value.shape,
                dtype="float32",
                autocast=False,
                trainable=trainable,
                initializer=initializer(value),
            )
            setattr(self, name, weight)

    def fold(self, *, factored: bool = False) -> FoldedFeatures | None:
        """The map in the form that `ops` takes; `None` without features.

        Args:
            factored: bool. Whether to leave the factors apart, for so few tokens that folding would
                cost more than everything else.
        """
        raise NotImplementedError

    def before_rotation(self, inputs: Tensor) -> Tensor:
        """What is rotated by positions, for queries or keys `(b, t, n, h)`: these themselves."""
        return inputs

    def exact_query(self, query: Tensor) -> Tensor:
        """The query whose softmax attention to the raw keys is what the features estimate."""
        return query

    @property
    def estimates_kernel(self) -> bool:
        """Whether features estimate the kernel of `exact_query`, and not one that they learned."""
        return False

    def redraw(self, seed: int | None = None) -> None:
        """Raises a ValueError: features that were fitted to data can't be drawn anew."""
        raise ValueError(
            f"The features of `{self.name}` were fitted to data, not drawn: there is nothing to "
            "draw anew. Calibrate it with another method."
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        initial_state: AttentionState | None = None,
        **call: Any,
    ) -> Tensor:
        """Attention with this map's features, as in `ops.dark_attention`.

        Args:
            query: float tensor of shape `(b, t, n, h)`, n a multiple of `num_heads`.
            key: `(b, s, num_heads, h)`.
            value: `(b, s, num_heads, v)`.
            initial_state: state of the keys before, or `None`.
            **call: causal, key_mask, write_mask, return_state, chunk_size and remat, as for
                `ops.dark_attention`.

        Returns:
            The output, of shape `(b, t, n, v)` and the inputs' dtype. With `return_state`,
            `(output, state)`.
        """
        self.ensure_built()
        query, key, value = numbers(query, key, value)
        factored = initial_state is not None and are_few(query, self.num_features)
        features = self.fold(factored=factored)
        call |= {"initial_state": initial_state, "memory": self.memory}
        return attend(query, key, value, features, **call)

    def accumulate(self, key: Tensor, value: Tensor, key_mask: Tensor = None) -> State:
        """The state that `attend` would return after these keys, for a map without exact memory.

        Args:
            key: `(b, s, num_heads, h)`.
            value: `(b, s, num_heads, v)`.
            key_mask: bool, `(b, s)`, true = enters the state, or `None`.
        """
        self.ensure_built()
        features = self.fold()
        assert features is not None
        return accumulate(key, value, features, key_mask=key_mask)

    def log_scores(self, query: Tensor, key: Tensor, exact: Tensor = None) -> Tensor:
        """Logarithms of the weights `attend` gives keys before it normalises and masks them.

        This is quadratic in the length, and serves to train and judge the map.

        Args:
            query: `(b, t, n, h)`, n a multiple of `num_heads`.
            key: `(b, s, num_heads, h)`.
            exact: from `exact_pairs`.

        Returns:
            A float32 tensor of shape `(b, n, t, s)`, known up to a constant per query.
        """
        self.ensure_built()
        features = self.fold()
        assert features is not None
        return log_scores(query, key, features, exact)

    def exact_pairs(self, query: Tensor, key: Tensor, key_mask: Tensor = None) -> Tensor:
        """Which pairs of a causal call are in the exact memory, bool `(b, n, t, s)`, or `None`."""
        return exact_pairs(query, key, self.memory, key_mask) if self.memory else None

    def state_shapes(
        self, value_dim: int | None = None, positioned: bool = False, dtype: str = "float32"
    ) -> StateShapes:
        """Shapes of states, for values of `value_dim` (`None`: `head_dim`) and this dtype."""
        return StateShapes(
            self.num_heads,
            self.num_features,
            self.head_dim if value_dim is None else value_dim,
            self.head_dim,
            self.memory,
            positioned,
            dtype,
        )

    def get_initial_state(
        self, batch_size: Tensor, value_dim: int | None = None, dtype: str = "float32"
    ) -> AttentionState:
        """The state before the first token; arguments as for `state_shapes`."""
        return self.state_shapes(value_dim, dtype=dtype).zeros(batch_size)

    def calibrate(
        self,
        query: Tensor,
        key: Tensor,
        *,
        causal: bool = False,
        query_mask: Tensor = None,
        key_mask: Tensor = None,
        max_tokens: int = 16384,
        **calibration: Any,
    ) -> None:
        """Fits the map to queries and keys.

        Args:
            query: `(b, t, n, h)`, n a multiple of `num_heads`, as for `attend`: rotated if there is
                a rotation.
            key: `(b, s, num_heads, h)`.
            causal: bool. Whether query t attends to keys up to t.
            query_mask, key_mask: bool, `(b, t)` and `(b, s)`, true = counts.
            max_tokens: int. Tokens of the sample that is used for refinement.
            **calibration: method, proposal, center, refine and seed, as for
                `keras_darkformer.calibrate`. A method must make a map of this class: `"clusters"`
                makes an `ExponentialFeatureMap`, the others a `DarkFeatureMap`.

        Raises:
            ValueError: if shapes do not fit, queries or keys are not finite or all masked, the
                method makes another kind of map, or there is no such proposal for them.
        """
        options = CalibrationOptions(**calibration)
        self.check_calibration(options)
        self._check_kind(options.kind or self.kind)
        if self.placement.fitter.needs_unrotated:
            raise ValueError(
                f'A map with `rope_geometry="{self.placement.name}"` is calibrated with its '
                "model, by `keras_darkformer.calibrate`: this needs queries before and after the "
                "rotation."
            )
        if self.memory:
            lengths = query.shape[1], key.shape[1]
            if not causal or lengths[0] != lengths[1] or lengths[1] <= self.memory.size:
                raise ValueError(
                    "A map with an exact memory needs `causal=True`, and queries and keys of one "
                    f"length, longer than its {self.memory.size} tokens. "
                    f"Received: causal={causal}, lengths {lengths[0]} and {lengths[1]}"
                )
            if query.shape[2] != self.num_query_heads:
                raise ValueError(
                    f"`query` must have the {self.num_query_heads} heads of `num_query_heads`. "
                    f"Received: shape {tuple(query.shape)}"
                )
        statistics = self.statistics(options, positive_integer("max_tokens", max_tokens))
        query, key, query_mask, key_mask = (
            None if x is None else ops.convert_to_numpy(x)
            for x in (query, key, query_mask, key_mask)
        )
        statistics.update(query, key, query_mask=query_mask, key_mask=key_mask, causal=causal)
        self.load(self.fit(statistics, options))
        if self.memory:
            mass = FarMass(self)
            mass.add(query, key, query, key, key_mask=key_mask)
            self.far_offset.assign(mass.offset())

    def check_calibration(self, options: CalibrationOptions) -> None:
        """Raises a ValueError if a layer with this map can't be calibrated this way."""
        check_calibration(options, self.options)

    def statistics(self, options: CalibrationOptions, max_tokens: int) -> LayerStatistics:
        """Empty statistics: what a calibration needs to know of a layer's queries and keys."""
        fitter = self.placement.fitter
        return LayerStatistics(
            self.num_heads,
            self.head_dim,
            needs_sample=needs_sample(options, fitter),
            needs_unrotated=fitter.needs_unrotated,
            max_tokens=max_tokens,
            seed=options.seed,
            memory=self.memory,
        )

    def fit(self, statistics: LayerStatistics, options: CalibrationOptions) -> Fit:
        """Weights fitted to a layer's statistics; their `kind` is that of the map they are for."""
        return fit_features(statistics, self.options, options, self.placement.fitter)

    def _check_kind(self, kind: str) -> None:
        if kind != self.kind:
            raise ValueError(
                "The calibration makes weights for a map of another class, "
                f'`feature_map="{kind}"`; `{self.name}` is a {type(self).__name__}. '
                "`keras_darkformer.calibrate` of a model puts the right map into its layers."
            )

    def load(self, fit: Fit) -> None:
        """Takes over fitted weights, and sets `far_offset` to zero.

        Raises:
            ValueError: if the weights are for a map of another kind.
        """
        self._check_kind(fit.kind)
        self.ensure_built()
        for name, value in fit.weights.items():
            if (weight := getattr(self, name)) is not None:
                weight.assign(value.astype("float32"))
        if self.memory:
            self.far_offset.assign(np.zeros(self.num_query_heads, "float32"))

    def save_own_variables(self, store: Any) -> None:
        """Writes the weights into a file by their names."""
        for weight in self.weights:
            store[weight.name] = weight

    def load_own_variables(self, store: Any) -> None:
        """Reads the weights from a file; the error says what differs if they are of another map."""
        stored = {name: store[name] for name in store.keys()}  # noqa: SIM118  no mapping
        check_stored(self, {name: tuple(value.shape) for name, value in stored.items()})
        for weight in self.weights:
            weight.assign(stored[weight.name])

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """`(b, s, num_heads, head_dim) -> (b, s, num_heads, num_features)`."""
        return (*input_shape[:-1], self.num_features)

    def compute_output_spec(self, inputs: Tensor, keys: bool = False) -> Tensor:
        """Features are float32 under every policy."""
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype="float32")

    def get_config(self) -> Config:
        """All constructor arguments, including a seed that was drawn."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "num_query_heads": self.num_query_heads,
            **self.options.get_config(),
        }
