"""The tree of layers that a Keras model is."""

from typing import Any

from keras_darkformer.types import Layer


def every_layer(root: Layer) -> list[Any]:
    """A layer or model and all layers in it, each once, in the order in which they are held."""
    found = {id(root): root}
    for layer in root._layers:
        found |= {id(x): x for x in every_layer(layer) if id(x) not in found}
    return list(found.values())
