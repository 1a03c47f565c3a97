"""Finds the attention layers of a Keras model, and those that `layers` chooses."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import keras

from keras_darkformer.anymodel.attention import DarkKerasAttention
from keras_darkformer.layers.stock import STOCK_CLASSES
from keras_darkformer.layers.tree import every_layer
from keras_darkformer.surgery.dark_layer import DarkLayer
from keras_darkformer.types import Layer

# Registers how KerasHub's own attention layers become dark. This part must not import KerasHub, so
# a part that may sets this function.
know_keras_hub: Callable[[], object] = tuple
# What `layers` may be besides what `ConversionOptions` takes.
Choice = Callable[[Layer], bool] | Sequence[str]


def attention_layers(root: Layer) -> list[Any]:
    """All `MultiHeadAttention` and `GroupQueryAttention` layers in a layer, in the tree's order.

    Includes dark ones, except those of KerasHub models, which become dark in another way.
    """
    found = [layer for layer in every_layer(root) if isinstance(layer, STOCK_CLASSES)]
    if any(map(_comes_from_keras_hub, found)):
        know_keras_hub()
    return [x for x in found if not isinstance(x, DarkLayer) or isinstance(x, DarkKerasAttention)]


def is_of_keras_hub(model: Any) -> bool:
    """Whether a layer is a KerasHub model, or an instance of a subclass of one."""
    return isinstance(model, keras.Model) and _comes_from_keras_hub(model)


def _comes_from_keras_hub(layer: Any) -> bool:
    return any(cls.__module__.startswith("keras_hub.") for cls in type(layer).__mro__)


def is_choice(layers: Any) -> TypeGuard[Choice]:
    """Whether `layers` is a predicate or names."""
    if callable(layers):
        return True
    is_sequence = isinstance(layers, Iterable) and not isinstance(layers, str)
    return is_sequence and any(isinstance(name, str) for name in layers)


def chosen(found: Sequence[Layer], layers: Choice) -> list[int]:
    """Indices of the attention layers that a predicate or names choose.

    Args:
        found: attention layers.
        layers: a predicate of a layer, or names or paths of layers. A name that several layers have
            chooses all of them.

    Raises:
        ValueError: if a name is unknown, or no layer is chosen.
    """
    if callable(layers):
        indices = [index for index, layer in enumerate(found) if layers(layer)]
    else:
        names = set(layers)
        known = {name for layer in found for name in (layer.name, layer.path)}
        if unknown := sorted(names - known, key=str):
            raise ValueError(
                f"`layers` must name attention layers. Received: {unknown}; the model has "
                f"{[layer.path for layer in found]}"
            )
        indices = [i for i, layer in enumerate(found) if names & {layer.name, layer.path}]
    if not indices:
        raise ValueError("`layers` chooses none of the attention layers of the model.")
    return indices
