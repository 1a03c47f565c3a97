"""Dark blocks and attention layers of KerasHub."""

from typing import Any

from keras_darkformer.hub.private import layer_config
from keras_darkformer.layers.feature_maps.weights import CheckedWeights
from keras_darkformer.options import AttentionOptions
from keras_darkformer.surgery.become import dark_subclass
from keras_darkformer.surgery.dark_layer import DarkLayer
from keras_darkformer.types import Config


class DarkHubLayer(DarkLayer):
    """Mixin that makes a KerasHub block or attention layer dark.

    Attributes:
        family: the `Family` that this layer belongs to.
    """

    family: Any

    def stock_config(self) -> Config:
        """The stock layer's config, with the arguments that KerasHub's own config leaves out."""
        return layer_config(self, self.stock_cls)


class DarkBlock(CheckedWeights, DarkHubLayer):
    """Mixin that makes a KerasHub block dark: its attention, and the mask it makes for it."""

    def get_attention(self) -> Any:
        """The block's attention layer."""
        return self.family.attention_of(self)

    def darken(self, options: AttentionOptions) -> None:
        """Makes the block's attention layer dark."""
        attention = self.get_attention()
        dark_subclass(self.family.dark_attention_cls, type(attention)).take_over(attention, options)
