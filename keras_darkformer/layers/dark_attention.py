"""Grouped-query attention in linear time."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_darkformer.checks import positive_integer
from keras_darkformer.layers.core import FeatureAttention, drop_tokens, without_masked
from keras_darkformer.layers.dense import DenseOptions
from keras_darkformer.layers.heads import Heads, as_it_is
from keras_darkformer.layers.masks import merge_masks, with_head_axis
from keras_darkformer.layers.stock import equivalent
from keras_darkformer.ops import PositionedState, exact_dark_attention_scores, rotary_embedding
from keras_darkformer.ops.backend import numbers
from keras_darkformer.ops.state import AttentionState, StateShapes
from keras_darkformer.options import AttentionOptions, shows_options
from keras_darkformer.types import Config, Layer, Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkAttention(FeatureAttention, keras.layers.Layer):
    """Grouped-query attention with the dark kernel, linear in the length.

    It takes the place of `keras.layers.GroupQueryAttention`, with the same call, the same masks
    and, except for `sliding_window`, `flash_attention` and `use_gate`, the same arguments. The
    learned kernel `exp(q^' Sigma k^)` replaces softmax's and is estimated by random features (see
    `DarkFeatureMap`):

        query = x W_q,  key = x W_k,  value = x W_v
        output = (phi(query) . sum phi(key) value' / phi(query) . sum phi(key)) W_o

    Args:
        head_dim: int. Size of a head.
        num_query_heads: int. Heads of the queries.
        num_key_value_heads: int. Heads of keys and values, a divisor of `num_query_heads`; `None`
            for the same number.
        dropout: float. Rate at which whole tokens are dropped from the values, the same ones for
            every query. This is the part of attention dropout that linear attention can express;
            every mode does it.
        rope_max_wavelength: float or `None`. Queries and keys are rotated by their positions (RoPE)
            with this wavelength, 10_000 in most models; `None` for no rotation. Masked tokens take
            up no position, so padding shifts nothing.
        **kwargs: the options of `AttentionOptions`: `num_features`, `attention_mode`,
            `sliding_window`, `seed` (of the random projection and of dropout) and others; the
            arguments of `keras.layers.GroupQueryAttention` for its four dense layers: `use_bias`,
            `kernel_initializer` and others; and those of `keras.layers.Layer`.

    Call arguments:
        query: float tensor of shape `(b, t, d)`.
        value: float tensor of shape `(b, s, d')`.
        key: float tensor of shape `(b, s, d'')`; `None` for `value`.
        query_mask, value_mask, key_mask: bool, of shapes `(b, t)`, `(b, s)` and `(b, s)`; Keras
            fills them in from the inputs' masks. Masked queries give the output of attending to
            nothing.
        attention_mask: bool. In exact mode, anything that broadcasts to `(b, t, s)` or
            `(b, n, t, s)`; otherwise only masks that are causal, padding, or both.
        return_attention_scores: bool. Exact mode only.
        training: bool. Turns dropout on.
        use_causal_mask: bool. Query t attends to keys up to t.
        initial_state: state returned by an earlier call. Not in exact mode.
        return_state: bool. Also return the state after these keys, to continue from. Not in exact
            mode.

    Returns:
        The output, of shape `(b, t, d)` and the layer's compute dtype. With
        `return_attention_scores`, `(output, scores)`, where the scores have shape `(b, n, t, s)`.
        With `return_state`, `(output, state)`, where the state is a named tuple of tensors of
        constant shape, batch first; see `get_initial_state`.

    Raises:
        TypeError: if an argument is unknown.
        ValueError: for an `attention_mask` that linear attention can't express, for scores outside
            exact mode, for a state in exact mode, for a sliding window or sinks without a causal
            mask, and for sizes that do not fit.

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

    @shows_options(AttentionOptions)
    @shows_options(DenseOptions)
    def __init__(
        self,
        head_dim: int,
        num_query_heads: int,
        num_key_value_heads: int | None = None,
        *,
        dropout: float = 0.0,
        rope_max_wavelength: float | None = None,
        **kwargs: Any,
    ) -> None:
        options, kwargs = AttentionOptions.take(type(self), kwargs)
        # Under Keras' own name the activity regularizer would apply to this layer's output and
        # state, not to the projections.
        dense_options, kwargs = DenseOptions.split(kwargs)
        # Without autocast, since a state would arrive in half precision. The projections cast their
        # inputs themselves.
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
        self.options = options
        self.dropout = dropout
        self.dense_options = dense_options
        self.rope_max_wavelength = rope_max_wavelength
        self.feature_map = self.make_feature_map(
            num_key_value_heads, head_dim, num_query_heads, options
        )

    @classmethod
    def from_attention(cls, layer: Layer, **kwargs: Any) -> "DarkAttention":
        """A layer with the weights of one of Keras' own attention layers.

        It is called like the Keras layer. If that has a sliding window, the new layer computes just
        this window, exactly. To convert a layer inside a model, see
        `keras_darkformer.convert_to_dark`.

        Args:
            layer: a built `keras.layers.MultiHeadAttention` or `GroupQueryAttention`.
            **kwargs: the options of `AttentionOptions`, and `name`.

        Returns:
            A built `DarkAttention`.

        Raises:
            TypeError: if an argument is unknown.
            ValueError: if the layer is not built, has a gate or values or outputs of another size,
                attends along axes other than that of the tokens, or is of a subclass that computes
                something else. The message gives the reason.

        Example:

        >>> layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8)
        >>> layer.build((None, None, 16), (None, None, 16))
        >>> dark = keras_darkformer.DarkAttention.from_attention(layer, num_features=32)
        >>> dark.num_query_heads
        2
        """
        dark = cls(**equivalent(layer) | kwargs)
        stock = [layer._query_dense, layer._key_dense, layer._value_dense, layer._output_dense]
        query, key, value = ((None, None, dense.kernel.shape[0]) for dense in stock[:3])
        dark.build(query, value, key)
        for dense, source in zip((*dark.dense_layers(), dark.output_dense), stock, strict=True):
            dense.set_weights(source.get_weights())
        return dark

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.rope_max_wavelength is not None

    def dense_layers(self) -> tuple[Layer, Layer, Layer]:
        """The projections to queries, keys and values."""
        return self.query_dense, self.key_dense, self.value_dense

    def build(self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None) -> None:
        """Creates the four projections and the feature map."""
        key_shape = value_shape if key_shape is None else key_shape
        of_queries = (None, self.num_query_heads, self.head_dim)
        of_keys = (None, self.num_key_value_heads, self.head_dim)

        def dense(equation: str, output: Shape, bias_axes: str, name: str, inputs: Shape) -> Layer:
            layer = self.dense_options.einsum(
                equation, output, bias_axes, dtype=self.dtype_policy, name=name
            )
            layer.build(inputs)
            return layer

        self.query_dense = dense("btd,dnh->btnh", of_queries, "nh", "query", query_shape)
        self.key_dense = dense("bsd,dkh->bskh", of_keys, "kh", "key", key_shape)
        self.value_dense = dense("bsd,dkh->bskh", of_keys, "kh", "value", value_shape)
        self.output_dense = dense(
            "btnh,nhd->btd",
            (None, query_shape[-1]),
            "d",
            "attention_output",
            (None, *of_queries),
        )
        self.token_dropout = keras.layers.Dropout(
            self.dropout, seed=self.options.seed, dtype=self.dtype_policy, name="token_dropout"
        )
        self.feature_map.build()
        self.built = True

    def call(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor = None,
        query_mask: Tensor = None,
        value_mask: Tensor = None,
        key_mask: Tensor = None,
        attention_mask: Tensor = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        initial_state: Tensor = None,
        return_state: bool = False,
    ) -> Tensor:
        """See the class."""
        self._check_mode(return_state or initial_state is not None)
        use_causal_mask, padding, attention_mask = self.read_masks(
            attention_mask,
            use_causal_mask,
            return_attention_scores,
            (query.shape[1], value.shape[1]),
        )
        key_mask = merge_masks(merge_masks(value_mask, key_mask), padding)
        is_self_attention = use_causal_mask or query is value
        query, key, value = numbers(query, value if key is None else key, value)

        state, start = self._split_state(initial_state, query)
        query, key = self.query_dense(query), self.key_dense(key)
        value = drop_tokens(self.token_dropout, self.value_dense(value), training)
        rotate_key = self._rotation(key, key_mask, start)
        rotate_query = rotate_key if is_self_attention else self._rotation(query, query_mask, start)
        heads = Heads(
            query,
            key,
            value,
            rotate_query,
            rotate_key,
            causal=use_causal_mask,
            key_mask=key_mask,
            attention_mask=with_head_axis(attention_mask),
        )
        output, state = self.attend(
            heads, training=training, initial_state=state, return_state=return_state
        )
        output = self.output_dense(without_masked(output, query_mask))
        if return_attention_scores:
            query, key = heads.for_features(self.feature_map)
            query = self.feature_map.exact_query(query)
            scores = exact_dark_attention_scores(query, key, **heads.masks)
            return output, ops.cast(scores, self.compute_dtype)
        return (output, self._with_position(state, start, heads)) if return_state else output

    def _split_state(self, state: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Splits a state into the part for attention and the position that goes with it."""
        if state is None:
            return None, None
        state = self._state_shapes.check(state, query.shape[0])
        return state if self.is_rotary else (state, None)

    def _check_mode(self, with_state: bool) -> None:
        if not self.is_linear and with_state:
            raise ValueError(
                '`initial_state` and `return_state` need `attention_mode="linear"`: exact '
                "attention has no state of constant size."
            )

    def _rotation(self, x: Tensor, mask: Tensor, start: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that rotates `(b, t, ...)` by positions from `start` on, without padding."""
        wavelength = self.rope_max_wavelength
        if wavelength is None:
            return as_it_is
        if mask is None:
            positions = ops.arange(ops.shape(x)[1], dtype="float32")
        else:
            positions = ops.cumsum(ops.cast(mask, "float32"), axis=-1) - 1.0
        if start is not None:
            positions = start[:, None] + positions
        if self.position_offset is not None:
            positions = positions + ops.cast(self.position_offset, "float32")
        return lambda inputs: rotary_embedding(inputs, positions, wavelength)

    def _with_position(self, state: Tensor, start: Tensor, heads: Heads) -> Tensor:
        """Adds the number of real tokens seen to the state, if there is RoPE."""
        if not self.is_rotary:
            return state
        batch_size, length = ops.shape(heads.value)[:2]
        if start is None:
            start = ops.zeros((batch_size,), dtype="float32")
        if heads.key_mask is not None:
            length = ops.sum(ops.cast(heads.key_mask, "float32"), axis=-1)
        return PositionedState(state, start + ops.cast(length, "float32"))

    @property
    def _state_shapes(self) -> StateShapes:
        return self.feature_map.state_shapes(positioned=self.is_rotary, dtype=self.compute_dtype)

    def get_initial_state(self, batch_size: Tensor) -> AttentionState:
        """The state before the first token.

        Args:
            batch_size: int, or scalar int tensor.

        Returns:
            An `ops.State`, or with an exact memory an `ops.MemoryState`. With RoPE, an
            `ops.PositionedState` of that and the number of tokens seen, `(b,)`. See
            `ops.initial_state` for the shapes.
        """
        return self._state_shapes.zeros(batch_size)

    def compute_output_shape(
        self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None
    ) -> Tensor:
        """The shape of `query`."""
        return tuple(query_shape)

    def compute_output_spec(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor = None,
        query_mask: Tensor = None,
        value_mask: Tensor = None,
        key_mask: Tensor = None,
        attention_mask: Tensor = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        initial_state: Tensor = None,
        return_state: bool = False,
    ) -> Tensor:
        """Shapes and dtypes of what `call` returns; raises the same errors."""
        self._check_mode(return_state or initial_state is not None)
        self.read_masks(attention_mask, use_causal_mask, return_attention_scores)
        batch_size, length = query.shape[:2]
        output = keras.KerasTensor(query.shape, dtype=self.compute_dtype)
        if return_attention_scores:
            shape = (batch_size, self.num_query_heads, length, value.shape[1])
            return output, keras.KerasTensor(shape, dtype=self.compute_dtype)
        if return_state:
            return output, self._state_shapes.spec(batch_size)
        return output

    def compute_mask(self, inputs: Tensor, previous_mask: Any) -> Tensor:
        """The output has the query's mask; the state has none."""
        return previous_mask

    def get_config(self) -> Config:
        """All constructor arguments."""
        return {
            **super().get_config(),
            "head_dim": self.head_dim,
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            **self.options.get_config(),
            "dropout": self.dropout,
            "rope_max_wavelength": self.rope_max_wavelength,
            **self.dense_options.get_config(),
        }
