"""KerasHub's models of images and sounds, whose attention layers are Keras' own or cached ones."""

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
    """What conversion has to know of a KerasHub backbone that nothing but the attention differs in.

    Its attention layers become dark as those of any Keras model do, and what makes them is saved as
    what makes a user's own. Beside that it is a family like others, see `hub.family.Family`: from
    each entry come the dark backbone and one class for each task.

    Attributes:
        name: as in the names of the tasks' classes.
        backbone: the stock backbone.
        holders: `holders(backbone)`, the layers in which all attention is to become dark; what is
            elsewhere is left.
        tasks: stock task classes, by what follows the name in theirs.
        causal: whether tokens attend only to those before them.
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
        """What a report calls the layers: their paths, as their names are all the same."""
        return [layer.path for layer in self.attention_layers(backbone)]

    def soft_cap(self, backbone: Any, index: int) -> None:
        """None of them has one."""

    def drops_weights(self, backbone: Any, index: int) -> bool:
        """Whether the stock layer drops single attention weights in training."""
        layer: Any = self.attention_layers(backbone)[index]
        return bool(layer.dropout)

    def darken(self, backbone: Any, options: Mapping[int, AttentionOptions]) -> None:
        """Has attention layers of a backbone become dark, by their indices."""
        layers = self.attention_layers(backbone)
        for index, of_layer in options.items():
            take_over(layers[index], stock_class(layers[index]), of_layer)
        for holder in self.holders(backbone):
            hold_all(holder)
