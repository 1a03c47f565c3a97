"""Grouped-query attention in linear time."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_darkformer.checks import one_of, positive_integer
from keras_darkformer.layers.dark_feature_map import DarkFeatureMap
from keras_darkformer.layers.masks import merge_masks, split_attention_mask
from keras_darkformer.layers.observation import Observation, Observer
from keras_darkformer.ops import (
    exact_dark_attention,
    exact_dark_attention_scores,
    rotary_embedding,
)

ATTENTION_MODES = ("linear", "exact")


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkAttention(keras.layers.Layer):
    """Grouped-query attention with the dark kernel, linear in the length.

    Takes the place of `keras.layers.GroupQueryAttention`: the same call and
    masks and, but for `sliding_window`, `flash_attention` and `use_gate`, the
    same arguments, with `exp(q . k / sqrt(h))` replaced by the learned kernel
    `exp(q^' Sigma k^)` and that by random features (see `DarkFeatureMap`):

        query = x W_q,  key = x W_k,  value = x W_v
        output = (phi(query) . sum phi(key) value' / phi(query) . sum phi(key)) W_o

    Args:
        head_dim: int. Size of a head.
        num_query_heads: int. Heads of the queries.
        num_key_value_heads: int. Heads of keys and values, a divisor of
            `num_query_heads`; `None` for as many.
        num_features: int. Random features per key/value head. More cost more
            and estimate the kernel better.
        attention_mode: `"linear"`, or `"exact"` for the learned kernel itself,
            quadratic in the length, to compare with.
        dropout: float. Drops whole tokens from the values, the same ones for
            every query: the part of attention dropout that linear attention
            can express. Both modes do this.
        use_bias: bool. Whether the projections have biases.
        chunk_size: int or `None`. Tokens handled at once in causal linear
            attention; `None` picks by shape. It does not change the result.
        remat: bool or `None`. Whether training computes each block of the
            sequence anew in the backward pass instead of keeping its features;
            `None` where that is faster. See `ops.dark_attention`.
        rope_max_wavelength: float or `None`. Rotates queries and keys by their
            positions (RoPE) with this wavelength, 10_000 in most models.
            Masked tokens have no position of their own: padding moves nothing.
        seed: int or `None`. Seeds the projection and the dropout.
        sliding_window: int or `None`. Each query meets its last
            `sliding_window` keys with softmax's kernel, and features only
            stand for those further back. Linear mode, causal calls only.
        window_only: bool. With a sliding window: leaves the features out, to
            measure the window alone.
        rank, projection, train_geometry, train_projection, geometry_scale,
            tie_geometry, rope_geometry: as for `DarkFeatureMap`.
        feature_form: the `form` of the feature map: what calibration left.
        kernel_initializer, bias_initializer, kernel_regularizer,
            bias_regularizer, activity_regularizer, kernel_constraint,
            bias_constraint: of the four projections, as in
            `keras.layers.GroupQueryAttention`.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        query: `(b, t, d)`.
        value: `(b, s, d')`.
        key: `(b, s, d'')`; `None` for `value`.
        query_mask, value_mask, key_mask: bool, of shapes `(b, t)`, `(b, s)`
            and `(b, s)`; Keras fills them in from the inputs' masks. Masked
            queries give the output of attending to nothing.
        attention_mask: bool. In linear mode only what is causal or padding
            (see Raises); in exact mode anything that broadcasts to
            `(b, t, s)` or `(b, n, t, s)`.
        return_attention_scores: bool. Exact mode only.
        training: bool. Turns dropout on.
        use_causal_mask: bool. Query t attends to keys up to t.
        initial_state: state returned by an earlier call. Linear mode only.
        return_state: bool. Also return the state after these keys, to go on
            from. Linear mode only.

    Returns:
        The output, of shape `(b, t, d)`; with `return_attention_scores`
        `(output, scores)`, scores `(b, n, t, s)`; with `return_state`
        `(output, state)`: a tuple of float32 tensors of constant shape, batch
        first.

    Raises:
        ValueError: for an `attention_mask` that linear attention can't
            express, for scores asked of linear mode or a state of exact mode,
            for a sliding window without a causal mask, and for sizes that do
            not fit.

    Example:

    >>> layer = keras_darkformer.DarkAttention(head_dim=16, num_query_heads=4, num_features=64)
    >>> x = np.random.normal(size=(2, 100, 32)).astype("float32")
    >>> layer(x, x, use_causal_mask=True).shape
    (2, 100, 32)

    Token by token, in constant memory:

    >>> state = layer.get_initial_state(batch_size=2)
    >>> for t in range(3):
    ...     token = x[:, t : t + 1]
    ...     output, state = layer(
    ...         token, token, use_causal_mask=True, initial_state=state, return_state=True)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
        - [GQA](https://arxiv.org/abs/2305.13245)
    """

    def __init__(
        self,
        head_dim: int,
        num_query_heads: int,
        num_key_value_heads: int | None = None,
        num_features: int = 256,
        *,
        attention_mode: str = "linear",
        dropout: float = 0.0,
        use_bias: bool = True,
        chunk_size: int | None = None,
        remat: bool | None = None,
        rope_max_wavelength: float | None = None,
        seed: int | None = None,
        rank: int | None = None,
        projection: str = "orthogonal",
        train_geometry: bool = True,
        train_projection: bool = False,
        geometry_scale: float = 1.0,
        tie_geometry: bool = True,
        rope_geometry: str = "after",
        feature_form: str = "random",
        sliding_window: int | None = None,
        window_only: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        # Without autocast, or a state would arrive in half precision. The
        # projections cast what they are given.
        super().__init__(autocast=False, **kwargs)
        if num_key_value_heads is None:
            num_key_value_heads = num_query_heads
        head_dim = positive_integer("head_dim", head_dim)
        num_query_heads = positive_integer("num_query_heads", num_query_heads)
        num_key_value_heads = positive_integer("num_key_value_heads", num_key_value_heads)
        if num_query_heads % num_key_value_heads:
            raise ValueError(
                "`num_query_heads` must be a multiple of `num_key_value_heads`. Received: "
                f"num_query_heads={num_query_heads}, num_key_value_heads={num_key_value_heads}"
            )
        if rope_max_wavelength is not None and head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even with `rope_max_wavelength`. Received: {head_dim}"
            )
        self.supports_masking = True
        self.head_dim = head_dim
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.attention_mode = one_of("attention_mode", attention_mode, ATTENTION_MODES)
        self.dropout = dropout
        self.use_bias = use_bias
        self.chunk_size = None if chunk_size is None else positive_integer("chunk_size", chunk_size)
        self.remat = remat
        self.rope_max_wavelength = rope_max_wavelength
        self.seed = seed
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        # Under Keras' own name it would apply to this layer's output and state.
        self.projection_regularizer = keras.regularizers.get(activity_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.feature_map = DarkFeatureMap(
            num_key_value_heads,
            head_dim,
            num_features,
            rank=rank,
            projection=projection,
            train_geometry=train_geometry,
            train_projection=train_projection,
            geometry_scale=geometry_scale,
            tie_geometry=tie_geometry,
            rope_geometry=rope_geometry,
            form=feature_form,
            sliding_window=sliding_window,
            window_only=window_only,
            num_query_heads=num_query_heads,
            seed=seed,
            dtype=self.dtype_policy,
            name="feature_map",
        )
        # Set by those who calibrate or judge the layer, see `observed`.
        self.observer: Observer | None = None
        self.position_offset: Any = None

    @property
    def num_features(self) -> int:
        """Random features per key/value head."""
        return self.feature_map.num_features

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.rope_max_wavelength is not None

    def dense_layers(self) -> tuple[Any, Any, Any]:
        """The projections to queries, keys and values."""
        return self.query_dense, self.key_dense, self.value_dense

    def build(self, query_shape: Any, value_shape: Any, key_shape: Any = None) -> None:
        """Creates the four projections and the feature map."""
        key_shape = value_shape if key_shape is None else key_shape
        heads, kv_heads, head_dim = self.num_query_heads, self.num_key_value_heads, self.head_dim
        self.query_dense = self._dense("btd,dnh->btnh", (None, heads, head_dim), "nh", "query")
        self.query_dense.build(query_shape)
        self.key_dense = self._dense("bsd,dkh->bskh", (None, kv_heads, head_dim), "kh", "key")
        self.key_dense.build(key_shape)
        self.value_dense = self._dense("bsd,dkh->bskh", (None, kv_heads, head_dim), "kh", "value")
        self.value_dense.build(value_shape)
        self.output_dense = self._dense(
            "btnh,nhd->btd", (None, query_shape[-1]), "d", "attention_output"
        )
        self.output_dense.build((None, None, heads, head_dim))
        self.token_dropout = keras.layers.Dropout(
            self.dropout, seed=self.seed, dtype=self.dtype_policy, name="token_dropout"
        )
        self.feature_map.build()
        self.built = True

    def _dense(
        self, equation: str, output_shape: tuple[int | None, ...], bias_axes: str, name: str
    ) -> keras.layers.EinsumDense:
        def clone(initializer: Any) -> Any:
            # A seeded initializer used twice would give the same values twice.
            return initializer.__class__.from_config(initializer.get_config())

        dense = keras.layers.EinsumDense(
            equation,
            output_shape=output_shape,
            bias_axes=bias_axes if self.use_bias else None,
            kernel_initializer=clone(self.kernel_initializer),
            bias_initializer=clone(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            activity_regularizer=self.projection_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            name=name,
        )
        # This layer sees to masks; its parts need not warn that they don't.
        dense.supports_masking = True
        return dense

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        initial_state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """See the class."""
        self._check_mode(return_attention_scores, initial_state, return_state)
        self._check_attention_mask(attention_mask, query, value)
        key_mask = merge_masks(value_mask, key_mask)
        if self.attention_mode == "linear" and attention_mask is not None:
            causal, padding = split_attention_mask(attention_mask)
            use_causal_mask = use_causal_mask or causal
            key_mask = merge_masks(key_mask, padding)
        self._check_causal(use_causal_mask)
        is_self_attention = use_causal_mask or query is value
        key = value if key is None else key

        query, key = self.query_dense(query), self.key_dense(key)
        value = drop_tokens(self.token_dropout, self.value_dense(value), training)
        start = None
        if self.rope_max_wavelength is not None and initial_state is not None:
            *initial_state, start = initial_state
        rotate_key = self._rotation(key, key_mask, start)
        rotate_query = rotate_key if is_self_attention else self._rotation(query, query_mask, start)
        masks = {
            "causal": use_causal_mask,
            "key_mask": key_mask,
            "attention_mask": _with_head_axis(attention_mask),
        }
        if self.observer is not None:
            observation = Observation(query, key, value, rotate_query, rotate_key, **masks)
            output = self.observer(self, observation)
            return self.output_dense(output)

        query = rotate_query(self.feature_map.before_rotation(query))
        key = rotate_key(self.feature_map.before_rotation(key))
        if self.attention_mode == "exact":
            query = self.feature_map.exact_query(query)
            output = exact_dark_attention(query, key, value, **masks)
        else:
            output = self.feature_map.attend(
                query,
                key,
                value,
                causal=use_causal_mask,
                key_mask=key_mask,
                initial_state=initial_state,
                return_state=return_state,
                chunk_size=self.chunk_size,
                remat=self.remat,
            )
            if return_state:
                output, state = output
        if query_mask is not None:
            output = ops.where(ops.cast(query_mask, "bool")[:, :, None, None], output, 0.0)
        output = self.output_dense(output)

        if return_attention_scores:
            scores = exact_dark_attention_scores(query, key, **masks)
            return output, ops.cast(scores, self.compute_dtype)
        if return_state:
            return output, self._with_position(state, start, key, key_mask)
        return output

    def _check_mode(
        self, return_attention_scores: bool, initial_state: Any, return_state: bool
    ) -> None:
        if self.attention_mode == "linear" and return_attention_scores:
            raise ValueError(
                '`return_attention_scores=True` needs `attention_mode="exact"`: linear '
                "attention never forms the scores."
            )
        if self.attention_mode == "exact" and (return_state or initial_state is not None):
            raise ValueError(
                '`initial_state` and `return_state` need `attention_mode="linear"`: exact '
                "attention has no state of constant size."
            )

    def _check_causal(self, causal: bool) -> None:
        if self.feature_map.sliding_window is None or self.attention_mode == "exact":
            return
        if not causal:
            raise ValueError(
                "`sliding_window` needs `use_causal_mask=True`: it holds the last tokens before a "
                "query."
            )

    def _check_attention_mask(self, attention_mask: Any, query: Any, value: Any) -> None:
        if attention_mask is None or len(attention_mask.shape) < 2:
            return
        sizes = (query.shape[1], value.shape[1])
        if any(
            None not in (size, expected) and size not in (1, expected)
            for size, expected in zip(attention_mask.shape[-2:], sizes, strict=True)
        ):
            raise ValueError(
                "`attention_mask` must end in (query_length, key_length) = "
                f"{sizes}. Received: shape {tuple(attention_mask.shape)}"
            )

    def _rotation(self, x: Any, mask: Any, start: Any) -> Callable[[Any], Any]:
        """A function that rotates `(b, t, ...)` by positions; padding has none, from `start` on."""
        wavelength = self.rope_max_wavelength
        if wavelength is None:
            return lambda inputs: inputs
        if mask is None:
            positions = ops.arange(ops.shape(x)[1], dtype="float32")
        else:
            positions = ops.cumsum(ops.cast(mask, "float32"), axis=-1) - 1.0
        if start is not None:
            positions = start[:, None] + positions
        if self.position_offset is not None:
            positions = positions + ops.cast(self.position_offset, "float32")
        return lambda inputs: rotary_embedding(inputs, positions, wavelength)

    def _with_position(self, state: Any, start: Any, key: Any, key_mask: Any) -> Any:
        """With RoPE, the number of real tokens seen travels with the state."""
        if self.rope_max_wavelength is None:
            return state
        batch_size, length = ops.shape(key)[:2]
        if start is None:
            start = ops.zeros((batch_size,), dtype="float32")
        if key_mask is not None:
            length = ops.sum(ops.cast(key_mask, "float32"), axis=-1)
        return (*state, start + ops.cast(length, "float32"))

    def get_initial_state(self, batch_size: Any) -> Any:
        """The state before the first token.

        Args:
            batch_size: int, or scalar int tensor.

        Returns:
            A tuple of float32 tensors, batch first: `(b, k, m, h)`,
            `(b, k, m)`, `(b, k)`, with a sliding window its keys and values
            `(b, W, k, h)` and which there are `(b, W)`, and with RoPE the
            tokens seen, `(b,)`.
        """
        state = self.feature_map.get_initial_state(batch_size)
        if self.rope_max_wavelength is None:
            return state
        return (*state, ops.zeros((batch_size,), dtype="float32"))

    def compute_output_shape(
        self, query_shape: Any, value_shape: Any, key_shape: Any = None
    ) -> Any:
        """The shape of `query`."""
        return tuple(query_shape)

    def compute_output_spec(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        initial_state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """Shapes and dtypes of what `call` returns; refuses what it would refuse."""
        self._check_mode(return_attention_scores, initial_state, return_state)
        if self.attention_mode == "linear" and attention_mask is not None:
            use_causal_mask = split_attention_mask(attention_mask)[0] or use_causal_mask
        self._check_causal(use_causal_mask)
        batch_size, length = query.shape[:2]
        output = keras.KerasTensor(query.shape, dtype=self.compute_dtype)
        if return_attention_scores:
            shape = (batch_size, self.num_query_heads, length, value.shape[1])
            return output, keras.KerasTensor(shape, dtype=self.compute_dtype)
        if return_state:
            return output, self._state_spec(batch_size)
        return output

    def _state_spec(self, batch_size: Any) -> Any:
        heads, head_dim = self.num_key_value_heads, self.head_dim
        features = self.feature_map.num_features
        shapes: list[tuple[Any, ...]] = [(heads, features, head_dim), (heads, features), (heads,)]
        window = self.feature_map.sliding_window
        if window is not None:
            kept = [(window, heads, head_dim), (window, heads, head_dim), (window,)]
            shapes = kept if self.feature_map.window_only else shapes + kept
        if self.rope_max_wavelength is not None:
            shapes.append(())
        return tuple(keras.KerasTensor((batch_size, *shape), dtype="float32") for shape in shapes)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        """The query's mask goes on with the output; the state has none."""
        return previous_mask

    def get_config(self) -> dict[str, Any]:
        """All constructor arguments."""
        return {
            **super().get_config(),
            "head_dim": self.head_dim,
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "num_features": self.feature_map.num_features,
            "attention_mode": self.attention_mode,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "chunk_size": self.chunk_size,
            "remat": self.remat,
            "rope_max_wavelength": self.rope_max_wavelength,
            "seed": self.seed,
            "rank": self.feature_map.rank,
            "projection": self.feature_map.projection_kind,
            "train_geometry": self.feature_map.train_geometry,
            "train_projection": self.feature_map.train_projection,
            "geometry_scale": self.feature_map.geometry_scale,
            "tie_geometry": self.feature_map.tie_geometry,
            "rope_geometry": self.feature_map.rope_geometry,
            "feature_form": self.feature_map.form,
            "sliding_window": self.feature_map.sliding_window,
            "window_only": self.feature_map.window_only,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": keras.regularizers.serialize(self.projection_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }


def drop_tokens(dropout: keras.layers.Dropout, value: Any, training: bool | None) -> Any:
    """Drops whole tokens from `value` (b, s, k, v), per head, the same for every query."""
    if not dropout.rate:
        return value
    return value * dropout(ops.ones_like(value[..., :1]), training=training)


def _with_head_axis(mask: Any) -> Any:
    """An attention mask of rank 2, 3 or 4 as one of rank 4."""
    if mask is None or len(mask.shape) == 4:
        return mask
    return mask[:, None] if len(mask.shape) == 3 else mask[None, None]
