"""A transformer block around `DarkAttention`."""

from typing import Any

import keras
from keras import ops

from keras_darkformer.checks import positive_integer
from keras_darkformer.layers.dark_attention import DarkAttention
from keras_darkformer.layers.feature_maps.weights import CheckedWeights
from keras_darkformer.options import AttentionOptions, shows_options
from keras_darkformer.types import Config, Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkTransformerBlock(CheckedWeights, keras.layers.Layer):
    """Transformer decoder or encoder block with attention linear in the length.

    The arguments follow `keras_hub.layers.TransformerDecoder` and `TransformerEncoder`. By default
    the block computes:

        x = x + attention(norm(x))
        x = x + dense(activation(dense(norm(x))))

    Args:
        intermediate_dim: int. Width of the feedforward network.
        num_heads: int. Query heads.
        dropout: float. Dropout rate of both branches, and of whole tokens in attention.
        activation: string or callable. Activation of the feedforward network.
        layer_norm_epsilon: float. Epsilon of the layer normalizations.
        kernel_initializer: string or `keras.initializers` initializer.
        bias_initializer: string or `keras.initializers` initializer.
        normalize_first: bool. Whether to normalize each branch's input (pre-norm) or its sum with
            the residual (post-norm).
        num_key_value_heads: int, a divisor of `num_heads`; `None` for the same number.
        head_dim: int; `None` for the input's width divided by `num_heads`.
        causal: bool. True for a decoder, false for an encoder.
        rope_max_wavelength: float or `None`, as for `DarkAttention`.
        **kwargs: the options of `AttentionOptions`: `num_features`, `attention_mode`,
            `sliding_window`, `seed` and others; and those of `keras.layers.Layer`.

    Call arguments:
        inputs: float tensor of shape `(b, t, d)`.
        padding_mask: bool, `(b, t)`, true = a real token. Without it, the mask Keras carries with
            `inputs` is used.
        attention_mask: bool, as for `DarkAttention`.
        initial_state: state returned by an earlier call.
        return_state: bool. Also return the state after these tokens.
        training: bool. Turns dropout on.

    Returns:
        The output, of the shape of `inputs` and the layer's compute dtype. With `return_state`,
        `(output, state)`, with the state described at `DarkAttention`.

    Raises:
        TypeError: if an argument is unknown.
        ValueError: if `head_dim` is not given and the input's width is not a multiple of
            `num_heads`, and in the cases described at `DarkAttention`.

    Example:

    >>> tokens = keras.Input((None,), dtype="int32")
    >>> x = keras.layers.Embedding(256, 64)(tokens)
    >>> for seed in range(2):
    ...     x = keras_darkformer.DarkTransformerBlock(
    ...         256, num_heads=2, num_features=64, rope_max_wavelength=10_000, seed=seed)(x)
    >>> model = keras.Model(tokens, keras.layers.Dense(256)(x))
    >>> model(np.zeros((1, 100), "int32")).shape
    (1, 100, 256)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
    """

    @shows_options(AttentionOptions)
    def __init__(
        self,
        intermediate_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        activation: Any = "relu",
        layer_norm_epsilon: float = 1e-5,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        normalize_first: bool = True,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        rope_max_wavelength: float | None = None,
        **kwargs: Any,
    ) -> None:
        options, kwargs = AttentionOptions.take(type(self), kwargs)
        # As in `DarkAttention`: a state must arrive in float32.
        super().__init__(autocast=False, **kwargs)
        self.supports_masking = True
        self.intermediate_dim = positive_integer("intermediate_dim", intermediate_dim)
        self.num_heads = positive_integer("num_heads", num_heads)
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.causal = causal
        self.dropout = dropout
        self.activation = keras.activations.get(activation)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.normalize_first = normalize_first
        self.rope_max_wavelength = rope_max_wavelength
        self.options = options

    def build(self, input_shape: Shape) -> None:
        """Creates attention, feedforward network and norms for the input's width."""
        hidden_dim = input_shape[-1]
        head_dim = self.head_dim
        if head_dim is None:
            if hidden_dim % self.num_heads:
                raise ValueError(
                    "Without `head_dim`, the input's width must be a multiple of `num_heads`. "
                    f"Received: input shape {tuple(input_shape)}, num_heads={self.num_heads}"
                )
            head_dim = hidden_dim // self.num_heads
        self.attention = DarkAttention(
            head_dim,
            self.num_heads,
            self.num_key_value_heads,
            dropout=self.dropout,
            rope_max_wavelength=self.rope_max_wavelength,
            kernel_initializer=self.kernel_initializer,
            bias_initializer=self.bias_initializer,
            dtype=self.dtype_policy,
            name="attention",
            **self.options.get_config(),
        )
        self.attention.build(input_shape, input_shape)
        self.attention_norm = self._norm("attention_norm")
        self.attention_norm.build(input_shape)
        self.feedforward_norm = self._norm("feedforward_norm")
        self.feedforward_norm.build(input_shape)
        self.feedforward_intermediate = self._dense(
            self.intermediate_dim, "feedforward_intermediate", self.activation
        )
        self.feedforward_intermediate.build(input_shape)
        self.feedforward_output = self._dense(hidden_dim, "feedforward_output")
        self.feedforward_output.build((*input_shape[:-1], self.intermediate_dim))
        self.branch_dropout = keras.layers.Dropout(
            self.dropout,
            seed=self.options.seed,
            dtype=self.dtype_policy,
            name="branch_dropout",
        )
        self.built = True

    def _norm(self, name: str) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype_policy, name=name
        )

    def _dense(self, units: int, name: str, activation: Any = None) -> keras.layers.Layer:
        kernel_initializer, bias_initializer = (
            initializer.__class__.from_config(initializer.get_config())
            for initializer in (self.kernel_initializer, self.bias_initializer)
        )
        return keras.layers.Dense(
            units,
            activation=activation,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            dtype=self.dtype_policy,
            name=name,
        )

    def call(
        self,
        inputs: Tensor,
        padding_mask: Tensor = None,
        attention_mask: Tensor = None,
        initial_state: Tensor = None,
        return_state: bool = False,
        training: bool | None = None,
        mask: Tensor = None,
    ) -> Tensor:
        """See the class."""
        if padding_mask is None:
            # If there are other tensors, Keras does not pass on the inputs' mask.
            padding_mask = mask if mask is not None else getattr(inputs, "_keras_mask", None)
        x, state = ops.cast(inputs, self.compute_dtype), None

        residual = x
        if self.normalize_first:
            x = self.attention_norm(x)
        x = self.attention(
            x,
            x,
            value_mask=padding_mask,
            attention_mask=attention_mask,
            use_causal_mask=self.causal,
            initial_state=initial_state,
            return_state=return_state,
            training=training,
        )
        if return_state:
            x, state = x
        x = residual + self.branch_dropout(x, training=training)
        if not self.normalize_first:
            x = self.attention_norm(x)

        residual = x
        if self.normalize_first:
            x = self.feedforward_norm(x)
        x = self.feedforward_output(self.feedforward_intermediate(x))
        x = residual + self.branch_dropout(x, training=training)
        if not self.normalize_first:
            x = self.feedforward_norm(x)
        return (x, state) if return_state else x

    def get_initial_state(self, batch_size: Tensor) -> Tensor:
        """The state before the first token; see `DarkAttention.get_initial_state`."""
        if not self.built:
            raise ValueError(
                f"`{self.name}` has no state yet: call it on an input or build it first."
            )
        return self.attention.get_initial_state(batch_size)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The shape of the input."""
        return tuple(input_shape)

    def compute_output_spec(
        self,
        inputs: Tensor,
        padding_mask: Tensor = None,
        attention_mask: Tensor = None,
        initial_state: Tensor = None,
        return_state: bool = False,
        training: bool | None = None,
        mask: Tensor = None,
    ) -> Tensor:
        """Shapes and dtypes of what `call` returns."""
        if not self.built:
            self.build(inputs.shape)
        spec = self.attention.compute_output_spec(
            inputs,
            inputs,
            attention_mask=attention_mask,
            use_causal_mask=self.causal,
            initial_state=initial_state,
            return_state=return_state,
        )
        if return_state:
            return spec
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self) -> Config:
        """All constructor arguments."""
        # Calibration may have put another kind of feature map into the layer.
        options = self.attention.options if self.built else self.options
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "dropout": self.dropout,
            "activation": keras.activations.serialize(self.activation),
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "normalize_first": self.normalize_first,
            "rope_max_wavelength": self.rope_max_wavelength,
            **options.get_config(),
        }
