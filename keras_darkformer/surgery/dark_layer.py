"""Layers that are dark, also when they are made from a config."""

import functools
from typing import Any

from keras_darkformer.options import AttentionOptions
from keras_darkformer.surgery.become import Mixin, after_build, become
from keras_darkformer.types import Config, Layer


class DarkLayer(Mixin):
    """Turns a stock layer, its base class in Python, dark.

    A stock layer becomes dark once it is built, in place; one made from the config of a dark layer
    when it is built. A model of the user's own that holds it, be it by its tensors, is therefore
    dark again when it is loaded or cloned.

    Attributes:
        stock_cls: the class of KerasHub or Keras that this one is made of.
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

        One that is not built yet becomes dark as far as it goes, and the rest when it is built.
        """
        # Or a recurrent state would arrive in half precision.
        become(stock, cls, autocast=False, _made_with=options)
        if stock.built:
            stock.darken(options)
        else:
            after_build(stock, lambda: stock.darken(options))

    def darken(self, options: AttentionOptions) -> None:
        """Puts in, once the stock layer is built, what a dark one has more."""
        raise NotImplementedError

    def get_attention(self) -> Any:
        """The attention layer: this layer or one in it.

        No property: Keras would save it under that name.
        """
        raise NotImplementedError

    @property
    def made_with(self) -> AttentionOptions:
        """The options of the attention as they are now, also before the layer is built."""
        return self.get_attention().options if self.built else self._made_with

    def stock_config(self) -> Config:
        """The config of the stock layer."""
        return self.stock_cls.get_config(self)

    def get_config(self) -> Config:
        """The stock layer's config, and as `dark` the options of the attention as they are now."""
        return {**self.stock_config(), "dark": self.made_with.get_config()}


def dark_layer_cls(base: Any, stock_cls: Any, **attributes: Any) -> Any:
    """The subclass of a stock class that `base`, a `DarkLayer`, makes dark."""

    @functools.wraps(stock_cls.build)  # Keras reads the names of its arguments
    def build(layer: Layer, *args: Any, **kwargs: Any) -> None:
        stock_cls.build(layer, *args, **kwargs)
        layer.darken(layer._made_with)

    attributes |= {"stock_cls": stock_cls, "build": build}
    return type(stock_cls.__name__, (base, stock_cls), attributes)
