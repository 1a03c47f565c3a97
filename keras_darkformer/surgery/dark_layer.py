"""Layers that are dark, even when they are made from a config."""

import functools
from typing import Any

from keras_darkformer.options import AttentionOptions
from keras_darkformer.surgery.become import Mixin, after_build, become
from keras_darkformer.types import Config, Layer


class DarkLayer(Mixin):
    """Mixin that makes a stock layer dark.

    A built stock layer becomes dark in place. A layer made from the config of a dark one becomes
    dark when it is built. A user's own model that holds it, even only by its tensors, is therefore
    dark again when it is loaded or cloned.

    Attributes:
        stock_cls: the class of KerasHub or Keras that this one extends.
    """

    stock_cls: Any
    _made_with: AttentionOptions

    def __init__(self, *args: Any, dark: Config, **kwargs: Any) -> None:
        self._made_with = AttentionOptions(**dark)  # first: some stock layers build themselves
        super().__init__(*args, **kwargs)
        self.autocast = False

    @classmethod
    def take_over(cls, stock: Layer, options: AttentionOptions) -> None:
        """Makes a stock layer dark, in place: no weight is copied or moved.

        A layer that is not built yet only changes class now; the rest follows when it is built.
        """
        # With autocast, a recurrent state would arrive in half precision.
        become(stock, cls, autocast=False, _made_with=options)
        if stock.built:
            stock.darken(options)
        else:
            after_build(stock, lambda: stock.darken(options))

    def darken(self, options: AttentionOptions) -> None:
        """Adds what a dark layer has besides, once the stock layer is built."""
        raise NotImplementedError

    def get_attention(self) -> Any:
        """The attention layer: this layer or one in it.

        It is not a property, because Keras would save it under that name.
        """
        raise NotImplementedError

    @property
    def made_with(self) -> AttentionOptions:
        """The current options of the attention, even before the layer is built."""
        return self.get_attention().options if self.built else self._made_with

    def stock_config(self) -> Config:
        """The config of the stock layer."""
        return self.stock_cls.get_config(self)

    def get_config(self) -> Config:
        """The stock layer's config, with the current options of the attention as `dark`."""
        return {**self.stock_config(), "dark": self.made_with.get_config()}


def dark_layer_cls(base: Any, stock_cls: Any, **attributes: Any) -> Any:
    """The dark subclass of a stock class, with the mixin `base`, a `DarkLayer`."""

    @functools.wraps(stock_cls.build)  # Keras reads the names of its arguments
    def build(layer: Layer, *args: Any, **kwargs: Any) -> None:
        stock_cls.build(layer, *args, **kwargs)
        layer.darken(layer._made_with)

    attributes |= {"stock_cls": stock_cls, "build": build}
    return type(stock_cls.__name__, (base, stock_cls), attributes)
