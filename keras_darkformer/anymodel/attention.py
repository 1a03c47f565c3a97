"""Keras' own attention layers, with the dark kernel in place of softmax."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

from keras_darkformer.layers.core import FeatureAttention, build_at, drop_tokens, without_masked
from keras_darkformer.layers.heads import Heads
from keras_darkformer.layers.masks import merge_masks, with_head_axis
from keras_darkformer.layers.stock import (
    STOCK_CLASSES,
    head_sizes,
    know_subclass,
    refusal_of_axes,
    window_of,
)
from keras_darkformer.options import AttentionOptions
from keras_darkformer.surgery.become import dark_subclass, give
from keras_darkformer.surgery.dark_layer import DarkLayer, dark_layer_cls
from keras_darkformer.surgery.mark import mark_weights
from keras_darkformer.types import Layer, Tensor


class DarkKerasAttention(FeatureAttention, DarkLayer):
    """Mixin that makes a `MultiHeadAttention` or `GroupQueryAttention` dark.

    An instance is a stock layer that has become dark. It keeps its projections, variable paths and
    call, and has one new sublayer, `feature_map`. In exact mode it computes the stock attention
    with the learned kernel.
    """

    @property
    def is_rotary(self) -> bool:
        """False: Keras' attention layers know no positions."""
        return False

    def get_attention(self) -> "DarkKerasAttention":
        """This layer."""
        return self

    def dense_layers(self) -> tuple[Layer, Layer, Layer]:
        """The projections to queries, keys and values."""
        return self._query_dense, self._key_dense, self._value_dense

    def darken(self, options: AttentionOptions) -> None:
        """Adds the feature map, which is trainable even if the layer is frozen."""
        if (reason := refusal_of_axes(self)) is not None:
            raise ValueError(f"Attention layer {self.path!r} can't be converted. {reason}")
        num_query_heads, num_heads, head_dim = head_sizes(self)
        feature_map = self.make_feature_map(num_heads, head_dim, num_query_heads, options)
        give(self, options=options, feature_map=feature_map)
        build_at(feature_map, f"{self.path}/feature_map")
        # This layer handles masks, so its parts need not warn that they don't.
        for dense in (*self.dense_layers(), *self._gates()):
            give(dense, supports_masking=True)
        mark_weights(self._key_dense)

    def _gates(self) -> list[Layer]:
        """The projection to a gate, where there is one."""
        return [self._gate_dense] if hasattr(self, "_gate_dense") else []

    def _compute_attention(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._compute_attention(self.feature_map.exact_query(query), *args, **kwargs)

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
    ) -> Tensor:
        """The stock layer's call.

        Args:
            query: `(b, t, d)`.
            value: `(b, s, d')`.
            key: `(b, s, d'')`; `None` to use `value`.
            query_mask, value_mask, key_mask: bool, `(b, t)`, `(b, s)` and `(b, s)`. In linear mode
                masked queries give the output of attending to nothing.
            attention_mask: bool. In linear mode a causal or padding mask; in exact mode as for the
                stock layer.
            return_attention_scores: bool. Exact mode only.
            training: bool. Turns dropout on; linear mode drops whole tokens.
            use_causal_mask: bool. Query t attends to keys up to t.

        Raises:
            ValueError: for what linear attention can't express. The message gives the layer's path.
        """
        if not self.is_linear and self.observer is None:
            return super().call(
                query,
                value,
                key=key,
                query_mask=query_mask,
                value_mask=value_mask,
                key_mask=key_mask,
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
                training=training,
                use_causal_mask=use_causal_mask,
            )
        with named(self):
            causal, padding, pairs = self.read_masks(
                attention_mask,
                use_causal_mask,
                return_attention_scores,
                (query.shape[1], value.shape[1]),
            )
        key_mask = merge_masks(merge_masks(value_mask, key_mask), padding)
        heads = self._project(query, value, key, key_mask, pairs, causal, training)
        output, _ = self.attend(heads, training=training)
        output = without_masked(output, query_mask)
        for gate in self._gates():
            output = output * gate(query)
        return self._output_dense(output)

    def _project(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor,
        key_mask: Tensor,
        pairs: Tensor,
        causal: bool,
        training: bool | None,
    ) -> Heads:
        """The heads of inputs `(b, t, d)`, with masks that have been read."""
        heads = Heads(
            self._query_dense(query),
            self._key_dense(value if key is None else key),
            drop_tokens(self._dropout_layer, self._value_dense(value), training),
            causal=causal,
            key_mask=key_mask,
            attention_mask=with_head_axis(pairs),
        )
        return heads if self.observer is None else self._within_window(heads)

    def _within_window(self, heads: Heads) -> Heads:
        """Limits heads to what the stock layer lets a query see, for observers that compare."""
        if (window := window_of(self)) is None:
            return heads
        places = [ops.arange(ops.shape(x)[1], dtype="int32") for x in (heads.query, heads.key)]
        near = (ops.abs(places[0][:, None] - places[1][None, :]) < window)[None, None]
        if heads.attention_mask is not None:
            near = ops.logical_and(near, heads.attention_mask)
        return dataclasses.replace(heads, attention_mask=near)

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
    ) -> Tensor:
        """Shapes and dtypes of the outputs of `call`; refuses what `call` would refuse."""
        with named(self):
            self.read_masks(attention_mask, use_causal_mask, return_attention_scores)
        return super().compute_output_spec(
            query, value, key=key, return_attention_scores=return_attention_scores
        )


@contextlib.contextmanager
def named(layer: Layer) -> Iterator[None]:
    """Has errors name the layer they come from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Attention layer {layer.path!r}: {error}") from error


def dark_attention_cls(stock_cls: type) -> Any:
    """The dark class of one of Keras' attention classes."""
    return dark_layer_cls(DarkKerasAttention, stock_cls)


_MAKERS: dict[type, Callable[[type], Any]] = dict.fromkeys(STOCK_CLASSES, dark_attention_cls)


def know_attention(stock_cls: type, make: Callable[[type], Any]) -> None:
    """Makes layers of a subclass of Keras' attention classes become dark in their own way.

    Args:
        stock_cls: the subclass.
        make: function that gives its dark class, a subclass of `DarkKerasAttention`.
    """
    know_subclass(stock_cls)
    _MAKERS[stock_cls] = make
    _register(stock_cls)


def take_over(layer: Layer, stock_cls: type, options: AttentionOptions) -> None:
    """Makes an attention layer dark, in place.

    Args:
        layer: of that class, or of a subclass that differs only in how it is constructed. The layer
            loses that subclass, so a saved model does not need the user's class for it.
        stock_cls: the class that `layers.stock.stock_class` gives for it.
        options: of the attention.
    """
    dark_subclass(_MAKERS[stock_cls], stock_cls).take_over(layer, options)


def _register(stock_cls: type) -> None:
    """Registers the dark layers, so that Keras finds them when it loads a model."""
    keras.saving.register_keras_serializable("keras_darkformer", f"Dark{stock_cls.__name__}")(
        dark_subclass(_MAKERS[stock_cls], stock_cls)
    )


for _stock_cls in STOCK_CLASSES:
    _register(_stock_cls)
