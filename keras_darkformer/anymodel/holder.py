"""Layers and models of a user's own that make their attention themselves, saved and loaded dark."""

from collections.abc import Iterator
from typing import Any

import keras

from keras_darkformer.anymodel.attention import DarkKerasAttention, take_over
from keras_darkformer.anymodel.finding import attention_layers
from keras_darkformer.layers.stock import stock_class
from keras_darkformer.layers.tree import every_layer
from keras_darkformer.options import AttentionOptions
from keras_darkformer.surgery.become import Mixin, after_build, as_stock, become, dark_subclass
from keras_darkformer.types import Config, Layer

HOW_TO_LOAD = (
    "Make the model as it was made before it was converted, call `keras_darkformer."
    "convert_to_dark` with the same options, and then `load_weights`; or call `convert_to_dark` on "
    "the attention layers in the constructor of the class."
)


# All under one name, of which Keras needs no more than `from_config`: that is the same for all.
_register = keras.saving.register_keras_serializable("keras_darkformer", "DarkHolder")


@_register
class DarkHolder(Mixin):
    """Turns a class whose objects make their own attention layers into one that says they are dark.

    The config of such a layer or model says nothing of the attention in it: from the config alone
    it would come back with softmax. This one's holds that config, and the options of its dark
    layers.

    Attributes:
        stock_cls: the class it is made of.
    """

    stock_cls: Any

    def get_config(self) -> Config:
        """The stock object as Keras saves it, and the options of its dark attention layers."""
        with as_stock(self):
            stock = keras.saving.serialize_keras_object(self)
        stock.pop("compile_config", None)  # the dark model's own is beside this config
        layers = attention_layers(self)
        dark = {
            str(index): layer.get_config()["dark"]
            for index, layer in enumerate(layers)
            if isinstance(layer, DarkKerasAttention)
        }
        return {"stock": stock, "dark": dark, "num_attention_layers": len(layers)}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        """Makes the stock object from its own config and has its attention become dark.

        Raises:
            ValueError: if it does not make the attention layers that it had when it was saved.
        """
        holder = keras.saving.deserialize_keras_object(config["stock"])
        options = {int(i): AttentionOptions(**dark) for i, dark in config["dark"].items()}
        count = config["num_attention_layers"]
        hold(holder)
        _settle(holder, options, count, hooked=set())
        return holder


def _settle(
    holder: Layer, options: dict[int, AttentionOptions], count: int, hooked: set[int]
) -> None:
    """Has the attention layers of a holder become dark, as soon as all of them are there.

    Args:
        holder: the layer or model.
        options: of its dark layers, by their indices.
        count: int. Of all its attention layers.
        hooked: ids of layers that call this once they are built.
    """
    layers = attention_layers(holder)
    if len(layers) < count and (waiting := _may_make_layers(holder)):
        for layer in waiting:
            if id(layer) not in hooked:
                hooked.add(id(layer))
                after_build(layer, lambda: _settle(holder, options, count, hooked))
        return
    if len(layers) != count:
        raise ValueError(
            f"{holder.name!r}, a {type(holder).__name__}, had {count} attention layers when it was "
            f"saved and makes {len(layers)} now: which of them are dark is not known. {HOW_TO_LOAD}"
        )
    for index, of_layer in options.items():
        if not isinstance(layers[index], DarkKerasAttention):
            take_over(layers[index], stock_class(layers[index]), of_layer)
    hold_all(holder)


def _may_make_layers(holder: Layer) -> list[Any]:
    """Layers that are not built yet and have a `build` of their own, which may make attention."""
    return [x for x in every_layer(holder) if not x.built and not hasattr(x.build, "_is_default")]


def hold(layer: Layer) -> None:
    """Has a layer or model of a user's own class be saved as one that holds dark attention."""
    become(layer, dark_subclass(dark_holder_cls, type(layer)))


def hold_all(root: Layer) -> None:
    """Does so with all that need it in a tree, its root too, once some of its attention is dark."""
    for layer in [*_outermost(root), *_blocks(root)]:
        if not isinstance(layer, DarkHolder):
            hold(layer)


# What the classes of holders have of their own, by the stock classes that they are made of.
_MIXINS: dict[type, type] = {}


def know_block(stock_cls: type, mixin: type) -> None:
    """Has layers of a class that call their attention in a way of their own do so as dark ones do.

    Args:
        stock_cls: the class. Its layers become holders wherever they are.
        mixin: what such a holder does instead.
    """
    _MIXINS[stock_cls] = mixin


def dark_holder_cls(stock_cls: type) -> Any:
    """What a class whose objects make their own attention layers becomes."""
    attributes = {"stock_cls": stock_cls, "__doc__": stock_cls.__doc__}
    mixins = [mixin for cls, mixin in _MIXINS.items() if issubclass(stock_cls, cls)]
    holder_cls = type(stock_cls.__name__, (DarkHolder, *mixins, stock_cls), attributes)
    return _register(holder_cls)


def _blocks(root: Layer) -> Iterator[Any]:
    """Layers of known classes in a tree, or its root, with dark attention in them."""
    return (x for x in every_layer(root) if isinstance(x, tuple(_MIXINS)) and _has_dark(x))


def _outermost(root: Layer) -> list[Any]:
    """The outermost layers in a tree, or its root, that make attention layers themselves.

    Keras' own containers have the layers in them in their configs.
    """
    if isinstance(root, DarkHolder | DarkKerasAttention):
        return []
    if type(root).__module__.startswith("keras."):
        return list({id(x): x for layer in root._layers for x in _outermost(layer)}.values())
    return [root] if _has_dark(root) else []


def _has_dark(root: Layer) -> bool:
    return any(isinstance(x, DarkKerasAttention) for x in attention_layers(root))
