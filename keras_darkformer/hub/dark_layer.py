"""Blocks and attention layers of KerasHub that are dark."""

from typing import Any

from keras_darkformer.hub.private import layer_config
from keras_darkformer.layers.feature_maps.weights import CheckedWeights
from keras_darkformer.options import AttentionOptions
from keras_darkformer.surgery.become import dark_subclass
from keras_darkformer.surgery.dark_layer import DarkLayer
from keras_darkformer.types import Config


class DarkHubLayer(DarkLayer):
    """Turns a KerasHub block or attention layer, its base class in Python, dark.

    Attributes:
        family: the `Family` this layer is of.
    """

    family: Any

    def stock_config(self) -> Config:
        """The config of the stock layer, with what KerasHub's own leaves out."""
        return layer_config(self, self.stock_cls)


class DarkBlock(CheckedWeights, DarkHubLayer):
    """Turns a KerasHub block dark: its attention, and the mask that it makes for it."""

    def get_attention(self) -> Any:
        """The block's attention layer."""
        return self.family.attention_of(self)

    def darken(self, options: AttentionOptions) -> None:
        """Has the block's attention layer become dark."""
        attention = self.get_attention()
        dark_subclass(self.family.dark_attention_cls, type(attention)).take_over(attention, options)
