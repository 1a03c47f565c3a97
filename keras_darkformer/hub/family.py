"""What conversion needs to know about a KerasHub family, and the dark classes it makes."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from keras_darkformer.hub.dark_layer import DarkBlock
from keras_darkformer.hub.private import part
from keras_darkformer.options import AttentionOptions
from keras_darkformer.surgery.become import dark_subclass
from keras_darkformer.surgery.dark_layer import dark_layer_cls
from keras_darkformer.types import Layer, Model, Tensor


def _token_embedding(backbone: Model, token_ids: Tensor, start_index: Tensor) -> Tensor:
    return backbone.token_embedding(token_ids)


def _rotate(attention: Layer, x: Tensor, start_index: Tensor) -> Tensor:
    return getattr(attention, attention.family.rotary)(x, start_index=start_index)


def _head_sizes(attention: Layer) -> tuple[int, int, int]:
    num_query_heads, head_dim = part(attention, "query_dense").partial_output_shape[-2:]
    return num_query_heads, part(attention, "key_dense").partial_output_shape[-2], head_dim


def _nothing(x: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """How the models of one KerasHub family are built.

    Each entry gives `Dark{name}Backbone` and one dark class per task.

    Attributes:
        name: the family's name, as in its class names.
        backbone: the stock backbone class.
        block: the stock block class.
        attention: the stock class of the blocks' attention layers.
        dark_attention: the subclass of `hub.attention.DarkHubAttention` that takes the blocks'
            calls.
        tasks: stock task classes, by the part of their name that follows the family's.
        causal: whether attention is causal.
        slot: the block's attribute that holds the attention layer.
        rotary: the attention layer's attribute that holds the rotary embedding, or `None`.
        rotates_all: whether the rotary embedding of every layer is called with the queries and keys
            it rotates; if not, a geometry can't sit before the rotation.
        rotate: `rotate(attention, x, start_index)` rotates queries or keys `(b, t, n, h)` by their
            positions.
        head_sizes: function that gives query heads, key/value heads and head size of a built stock
            attention layer.
        norms: the attention layer's attributes that normalize queries and keys, or `None`.
        window: function that gives the sliding window of an attention layer, or `None`.
        padding_argument: the block's call argument for the padding mask.
        cache_argument: the block's call argument for the cache; with `_update_index` appended, the
            one for the position.
        mask_method: the block's method that makes a mask of token pairs, or `None` if the block
            passes the padding mask on as it is.
        mask_axis: where the padding mask that replaces it needs an axis of size 1, or `None`.
        embed: `embed(backbone, token_ids, start_index)` gives the input of the first block.
        output_norm: the backbone's attribute that normalizes the output of the last block.
        paired_cache: whether an exact layer's cache is a pair of keys and values `(b, s, k, h)`, or
            one tensor `(b, 2, s, k, h)`.
        kernel_heads_axis: the heads' axis in the key projection's kernel.
        refuse: function that says why a backbone can't be converted, or gives `None` if it can.
        refuse_export: function that says why KerasHub's export of a backbone would be wrong, or
            gives `None`.
    """

    name: str
    backbone: type
    block: type
    attention: type
    dark_attention: type
    slot: str
    rotary: str | None
    padding_argument: str
    cache_argument: str
    mask_method: str | None
    tasks: Mapping[str, type]
    causal: bool = True
    rotates_all: bool = True
    rotate: Callable[[Layer, Tensor, Tensor], Tensor] = _rotate
    head_sizes: Callable[[Layer], tuple[int, int, int]] = _head_sizes
    norms: tuple[str, str] | None = None
    window: Callable[[Layer], int | None] = _nothing
    mask_axis: int | None = None
    embed: Callable[[Model, Tensor, Tensor], Tensor] = _token_embedding
    output_norm: str = "layer_norm"
    paired_cache: bool = False
    kernel_heads_axis: int = 1
    refuse: Callable[[Model], str | None] = _nothing
    refuse_export: Callable[[Model], str | None] = _nothing

    def attention_of(self, block: Layer) -> Layer:
        """A block's attention layer."""
        return getattr(block, self.slot)

    def attention_layers(self, backbone: Any) -> list[Layer]:
        """The attention layers of a backbone's blocks."""
        return [self.attention_of(block) for block in backbone.transformer_layers]

    def names(self, backbone: Any) -> list[str]:
        """The layers' names in a report: those of the blocks."""
        return [block.name for block in backbone.transformer_layers]

    def soft_cap(self, backbone: Any, index: int) -> float | None:
        """The soft cap of a layer's attention logits, or `None`."""
        return getattr(backbone.transformer_layers[index], "logit_soft_cap", None)

    def drops_weights(self, backbone: Any, index: int) -> bool:
        """Whether the stock layer drops single attention weights in training."""
        block = backbone.transformer_layers[index]
        return bool(self.attention_of(block).drops == "weights" and block.dropout)

    def darken(self, backbone: Any, options: Mapping[int, AttentionOptions]) -> None:
        """Makes blocks of a backbone dark; the keys of `options` are their indices."""
        for index, of_layer in options.items():
            block = backbone.transformer_layers[index]
            dark_subclass(self.dark_block_cls, type(block)).take_over(block, of_layer)

    def register_layers(self) -> None:
        """Registers the dark layers, so that Keras finds them when it loads a model."""
        makers = {"Block": self.dark_block_cls, "Attention": self.dark_attention_cls}
        stock = {"Block": self.block, "Attention": self.attention}
        for role, make in makers.items():
            register = keras.saving.register_keras_serializable(
                "keras_darkformer", f"Dark{self.name}{role}"
            )
            register(dark_subclass(make, stock[role]))

    def dark_attention_cls(self, stock_cls: type) -> Any:
        """The dark class of an attention layer."""
        return dark_layer_cls(self.dark_attention, stock_cls, family=self)

    def dark_block_cls(self, stock_cls: type) -> Any:
        """The dark class of a block, which passes the padding mask to attention as it is.

        The stock block first makes a mask `(b, t, t)` from it.
        """
        if self.mask_method is None:
            return dark_layer_cls(DarkBlock, stock_cls, family=self)
        stock = getattr(stock_cls, self.mask_method)
        place = list(inspect.signature(stock).parameters).index(self.padding_argument) - 1

        def compute_mask(block: Layer, *args: Any, **kwargs: Any) -> Tensor:
            if not block.get_attention().is_linear:
                return stock(block, *args, **kwargs)
            named = self.padding_argument in kwargs
            mask = kwargs[self.padding_argument] if named else args[place]
            if mask is None or self.mask_axis is None:
                return mask
            return ops.expand_dims(mask, axis=self.mask_axis)

        attributes: dict[str, Any] = {"family": self, self.mask_method: compute_mask}
        return dark_layer_cls(DarkBlock, stock_cls, **attributes)

    def dark_rotary_cls(self, stock_cls: Any) -> type:
        """The dark class of a rotary embedding, which in exact mode applies a geometry before it.

        In linear mode the attention layer applies the geometry.
        """

        def call(rotary: Layer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return stock_cls.call(rotary, rotary.in_exact_mode(x), *args, **kwargs)

        return type(stock_cls.__name__, (stock_cls,), {"call": call})


class PairwiseRotary(Family):
    """A family whose rotary embedding rotates queries and keys in one call, and returns both."""

    def dark_rotary_cls(self, stock_cls: Any) -> type:
        """The embedding's dark class: in exact mode it applies the geometry to rotated queries."""

        def call(rotary: Layer, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            query, key = stock_cls.call(rotary, query, key, *args, **kwargs)
            return rotary.in_exact_mode(query), key

        return type(stock_cls.__name__, (stock_cls,), {"call": call})
