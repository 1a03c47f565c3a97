"""The tree of layers that a Keras model is."""

from typing import Any

from keras_darkformer.types import Layer


def every_layer(root: Layer) -> list[Any]:
    """A layer or model and all layers in it, each once, in the order in which they are held."""
    found: dict[int, Any] = {}

    def visit(layer: Any) -> None:
        if id(layer) not in found:
            found[id(layer)] = layer
            for inner in layer._layers:
                visit(inner)

    visit(root)
    return list(found.values())
