"""Copies of Keras models, for conversions that leave the original as it is."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_darkformer.layers.tree import every_layer
from keras_darkformer.surgery.twin import make_alike
from keras_darkformer.types import Layer, Model


def twin_of(model: Model) -> Any:
    """A model or layer of the same class, config and weights, with variables of its own.

    The copy is not compiled. The classes of its layers need not be registered with Keras.

    Raises:
        ValueError: if it can't be rebuilt from its config.
    """
    layers = every_layer(model)
    classes = {type(layer).__name__: type(layer) for layer in layers}
    own = {name: x for name, x in classes.items() if not x.__module__.startswith("keras.")}
    try:
        with _uncompiled(layers):
            config = keras.saving.serialize_keras_object(model)
        twin = keras.saving.deserialize_keras_object(config, custom_objects=own)
    except Exception as error:  # whatever a class of the user's own does
        raise ValueError(
            f"`copy=True` rebuilds {model.name!r} from its config, and that failed. Convert the "
            f"model in place. The error was: {error}"
        ) from error
    make_alike(model, twin, layers, every_layer(twin))
    return twin


@contextlib.contextmanager
def _uncompiled(layers: Iterable[Layer]) -> Iterator[None]:
    """Has Keras leave out how models are compiled, since some of it may have no config."""
    compiled = [x for x in layers if isinstance(x, keras.Model) and x.compiled]
    for model in compiled:
        model.compiled = False
    try:
        yield
    finally:
        for model in compiled:
            model.compiled = True
