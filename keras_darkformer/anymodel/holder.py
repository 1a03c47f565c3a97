"""Saves and loads users' own layers and models that create their attention layers themselves."""

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
    "Create the model as before the conversion, call `keras_darkformer.convert_to_dark` with the "
    "same options, and then `load_weights`; or call `convert_to_dark` on the attention layers in "
    "the constructor of the class."
)


# All have one name. Keras only needs its `from_config`, which is the same for all.
_register = keras.saving.register_keras_serializable("keras_darkformer", "DarkHolder")


@_register
class DarkHolder(Mixin):
    """Mixin for classes that create their own attention layers: the config says which are dark.

    The stock config says nothing about the attention inside: a layer or model made from it would
    have softmax again. This class's config holds the stock config and the options of the dark
    layers.

    Attributes:
        stock_cls: the class that this one extends.
    """

    stock_cls: Any

    def get_config(self) -> Config:
        """The stock object as Keras saves it, and the options of its dark attention layers."""
        with as_stock(self):
            stock = keras.saving.serialize_keras_object(self)
        stock.pop("compile_config", None)  # Keras saves the dark model's own next to this config
        layers = attention_layers(self)
        dark = {
            str(index): layer.get_config()["dark"]
            for index, layer in enumerate(layers)
            if isinstance(layer, DarkKerasAttention)
        }
        return {"stock": stock, "dark": dark, "num_attention_layers": len(layers)}

    @classmethod
    def from_config(cls, config: Config) -> Any:
        """Makes the stock object from its own config and makes its attention dark.

        Raises:
            ValueError: if it does not create as many attention layers as it had when it was saved.
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
    """Makes the attention layers of a holder dark, as soon as all of them exist.

    Args:
        holder: the layer or model.
        options: those of its dark layers, by their indices.
        count: int. Number of all its attention layers.
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
            f"saved and makes {len(layers)} now: which of them are dark is unknown. {HOW_TO_LOAD}"
        )
    for index, of_layer in options.items():
        if not isinstance(layers[index], DarkKerasAttention):
            take_over(layers[index], stock_class(layers[index]), of_layer)
    hold_all(holder)


def _may_make_layers(holder: Layer) -> list[Any]:
    """Layers that are not built yet and whose own `build` may create attention layers."""
    return [x for x in every_layer(holder) if not x.built and not hasattr(x.build, "_is_default")]


def hold(layer: Layer) -> None:
    """Makes a layer or model of a user's own class save its dark attention."""
    become(layer, dark_subclass(dark_holder_cls, type(layer)))


def hold_all(root: Layer) -> None:
    """Calls `hold` on all in a tree, its root included, that hold dark attention and need it."""
    for layer in [*_outermost(root), *_blocks(root)]:
        if not isinstance(layer, DarkHolder):
            hold(layer)


# What the classes of holders have of their own, by the stock classes that they extend.
_MIXINS: dict[type, type] = {}


def know_block(stock_cls: type, mixin: type) -> None:
    """Adapts layers of a class that call their attention in their own way to dark attention.

    Args:
        stock_cls: the class. Its layers become holders wherever they are.
        mixin: the methods that such a holder overrides.
    """
    _MIXINS[stock_cls] = mixin


def dark_holder_cls(stock_cls: type) -> Any:
    """The dark class of one whose objects create their own attention layers."""
    attributes = {"stock_cls": stock_cls, "__doc__": stock_cls.__doc__}
    mixins = [mixin for cls, mixin in _MIXINS.items() if issubclass(stock_cls, cls)]
    holder_cls = type(stock_cls.__name__, (DarkHolder, *mixins, stock_cls), attributes)
    return _register(holder_cls)


def _blocks(root: Layer) -> Iterator[Any]:
    """Layers of known classes in a tree, its root included, with dark attention in them."""
    return (x for x in every_layer(root) if isinstance(x, tuple(_MIXINS)) and _has_dark(x))


def _outermost(root: Layer) -> list[Any]:
    """The outermost layers in a tree, its root included, that create attention layers themselves.

    Keras' own containers have their layers in their configs.
    """
    if isinstance(root, DarkHolder | DarkKerasAttention):
        return []
    if type(root).__module__.startswith("keras."):
        return list({id(x): x for layer in root._layers for x in _outermost(layer)}.values())
    return [root] if _has_dark(root) else []


def _has_dark(root: Layer) -> bool:
    return any(isinstance(x, DarkKerasAttention) for x in attention_layers(root))
