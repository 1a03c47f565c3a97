"""What conversion has to know of a KerasHub family, and what it makes of the parts."""

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
    """How the models of one KerasHub family are put together.

    From each entry come `Dark{name}Backbone` and one class for each task.

    Attributes:
        name: as in the names of the family's classes.
        backbone: the stock backbone.
        block: the stock block, and
        attention: the stock attention layer of its blocks, by which saved ones are found.
        dark_attention: a subclass of `hub.attention.DarkHubAttention`, which is called as the
            blocks do.
        tasks: stock task classes, by what follows the name in theirs.
        causal: whether tokens attend only to those before them.
        slot: a block's attribute that holds the attention layer.
        rotary: the attention layer's attribute that holds the rotary embedding, or `None` without
            one.
        rotates_all: whether the rotary embedding of every layer is called with the queries and keys
            it rotates; if not, a geometry can't sit before the rotation.
        rotate: `rotate(attention, x, start_index)`, queries or keys `(b, t, n, h)` rotated by their
            positions.
        head_sizes: query heads, key/value heads and head size of a built stock attention layer.
        norms: its attributes that norm queries and keys.
        window: the sliding window of an attention layer, or `None`.
        padding_argument: a block's call argument for the padding mask.
        cache_argument: a block's call argument for the cache; with `_update_index` behind, the one
            for the position.
        mask_method: a block's method that makes a mask of all pairs of tokens, or `None` if it
            hands on the padding mask as it is.
        mask_axis: where the block wants an axis of size 1 in a padding mask handed on instead, or
            `None`.
        embed: `embed(backbone, token_ids, start_index)`, what enters the first block.
        output_norm: the backbone's attribute that norms what leaves the last block.
        paired_cache: whether an exact layer's cache is a pair of keys and values `(b, s, k, h)`, or
            one tensor `(b, 2, s, k, h)`.
        kernel_heads_axis: the axis of the key projection's kernel that heads are along.
        refuse: says why a backbone can't be converted, or `None` if it can.
        refuse_export: says why KerasHub's export of a backbone would be wrong, or `None`.
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
        """What a report calls the layers: the names of the blocks."""
        return [block.name for block in backbone.transformer_layers]

    def soft_cap(self, backbone: Any, index: int) -> float | None:
        """The bound of a layer's logits, or `None`."""
        return getattr(backbone.transformer_layers[index], "logit_soft_cap", None)

    def drops_weights(self, backbone: Any, index: int) -> bool:
        """Whether the stock layer drops single attention weights in training."""
        block = backbone.transformer_layers[index]
        return bool(self.attention_of(block).drops == "weights" and block.dropout)

    def darken(self, backbone: Any, options: Mapping[int, AttentionOptions]) -> None:
        """Has blocks of a backbone become dark, by their indices."""
        for index, of_layer in options.items():
            block = backbone.transformer_layers[index]
            dark_subclass(self.dark_block_cls, type(block)).take_over(block, of_layer)

    def register_layers(self) -> None:
        """Has Keras find the dark layers when it loads a model that holds them."""
        makers = {"Block": self.dark_block_cls, "Attention": self.dark_attention_cls}
        stock = {"Block": self.block, "Attention": self.attention}
        for role, make in makers.items():
            register = keras.saving.register_keras_serializable(
                "keras_darkformer", f"Dark{self.name}{role}"
            )
            register(dark_subclass(make, stock[role]))

    def dark_attention_cls(self, stock_cls: type) -> Any:
        """What an attention layer becomes."""
        return dark_layer_cls(self.dark_attention, stock_cls, family=self)

    def dark_block_cls(self, stock_cls: type) -> Any:
        """What a block becomes: one that hands the padding mask to attention as it is.

        The stock block first makes a (b, t, t) mask of it.
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
        """What a rotary embedding becomes: in exact mode it applies a geometry that sits before.

        In linear mode the attention layer sees to that.
        """

        def call(rotary: Layer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return stock_cls.call(rotary, rotary.in_exact_mode(x), *args, **kwargs)

        return type(stock_cls.__name__, (stock_cls,), {"call": call})


class PairwiseRotary(Family):
    """A family whose rotary embedding rotates queries and keys in one call, and returns both."""

    def dark_rotary_cls(self, stock_cls: Any) -> type:
        """What it becomes: in exact mode it applies the geometry to the rotated queries."""

        def call(rotary: Layer, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            query, key = stock_cls.call(rotary, query, key, *args, **kwargs)
            return rotary.in_exact_mode(query), key

        return type(stock_cls.__name__, (stock_cls,), {"call": call})
