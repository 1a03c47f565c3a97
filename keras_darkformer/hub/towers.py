"""KerasHub's models of images and sounds, with Keras' own attention layers or cached ones."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from keras_darkformer.anymodel.attention import take_over
from keras_darkformer.anymodel.finding import attention_layers
from keras_darkformer.anymodel.holder import hold_all
from keras_darkformer.layers.stock import head_sizes, stock_class, window_of
from keras_darkformer.options import AttentionOptions
from keras_darkformer.types import Layer, Model


def _nothing(x: Any) -> None:
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Tower:
    """What conversion needs to know about a KerasHub backbone where only attention changes.

    Its attention layers become dark as those of any Keras model do, and the classes that create
    them are saved in the same way. Otherwise it is a family like others, see `hub.family.Family`:
    each entry gives the dark backbone and one class per task.

    Attributes:
        name: the family's name, as in its task class names.
        backbone: the stock backbone class.
        holders: `holders(backbone)` gives the layers in which all attention becomes dark; attention
            elsewhere is left.
        tasks: stock task classes, by the part of their name that follows the family's.
        causal: whether attention is causal.
    """

    name: str
    backbone: type
    holders: Callable[[Any], list[Layer]]
    tasks: Mapping[str, type] = dataclasses.field(default_factory=dict)
    causal: bool = False
    rotary: str | None = None
    rotates_all: bool = False
    head_sizes: Callable[[Layer], tuple[int, int, int]] = head_sizes
    window: Callable[[Layer], int | None] = window_of
    refuse: Callable[[Model], str | None] = _nothing
    refuse_export: Callable[[Model], str | None] = _nothing

    def attention_layers(self, backbone: Any) -> list[Layer]:
        """The attention layers in the holders."""
        return [x for holder in self.holders(backbone) for x in attention_layers(holder)]

    def names(self, backbone: Any) -> list[str]:
        """The layers' names in a report: their paths, as they all have the same name."""
        return [layer.path for layer in self.attention_layers(backbone)]

    def soft_cap(self, backbone: Any, index: int) -> None:
        """`None`: these models have no soft cap."""

    def drops_weights(self, backbone: Any, index: int) -> bool:
        """Whether the stock layer drops single attention weights in training."""
        layer: Any = self.attention_layers(backbone)[index]
        return bool(layer.dropout)

    def darken(self, backbone: Any, options: Mapping[int, AttentionOptions]) -> None:
        """Makes attention layers of a backbone dark; the keys of `options` are their indices."""
        layers = self.attention_layers(backbone)
        for index, of_layer in options.items():
            take_over(layers[index], stock_class(layers[index]), of_layer)
        for holder in self.holders(backbone):
            hold_all(holder)
