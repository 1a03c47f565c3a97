"""A second model like another one, for a conversion that leaves that one as it is."""

from typing import Any

import keras

from keras_darkformer.hub.private import copy_lora, forgotten
from keras_darkformer.types import Layer, Model


def twin_of(model: Model) -> Any:
    """A KerasHub model of the same class, config and weights, with variables of its own.

    What is no part of a config is as in the model, too: names, LoRA, and which layers and weights
    are frozen. It is not compiled. The preprocessor is the model's own: its vocabulary is in no
    config.

    Raises:
        ValueError: if the model has weights that its config does not describe.
    """
    config = model.get_config()
    if hasattr(model, "backbone"):
        config |= {"preprocessor": None, "compile": False}
        backbone, of_backbone = model.backbone, config["backbone"]["config"]
    else:
        backbone, of_backbone = model, config
    of_backbone |= forgotten(type(backbone), backbone, of_backbone)
    twin = type(model).from_config(config)
    pairs = list(zip(_layers(model), _layers(twin), strict=False))
    for layer, other in pairs:
        other._dtype_policy = _dtype_policy(layer)
        copy_lora(layer, other)
    here, there = ([(w.name, tuple(w.shape), w.dtype) for w in x.weights] for x in (model, twin))
    if here != there:
        raise ValueError(
            "`copy=True` rebuilds the model from its config, which does not describe all of its "
            f"weights: {_difference(here, there)}. Convert the model in place."
        )
    twin.set_weights(model.get_weights())
    for layer, other in pairs:
        # From the outside in: a layer hands it on to those in it.
        if other.trainable != layer.trainable:
            other.trainable = layer.trainable
        other.name = layer.name
    for weight, other in zip(model.weights, twin.weights, strict=True):
        if other.trainable != weight.trainable:
            other.trainable = weight.trainable
    if hasattr(model, "backbone"):
        twin.preprocessor = model.preprocessor
    if hasattr(model, "sampler"):
        twin.sampler = model.sampler
    return twin


def _layers(model: Model) -> list[Layer]:
    """All layers but those of the preprocessor, which a twin shares."""
    preprocessor = getattr(model, "preprocessor", None)
    flatten = getattr(preprocessor, "_flatten_layers", list)
    shared = {id(layer) for layer in flatten()}
    return [layer for layer in model._flatten_layers() if id(layer) not in shared]


def _dtype_policy(layer: Layer) -> Any:
    """A layer's own policy. With a map of those of all layers Keras can't save one of few bits."""
    policy = layer.dtype_policy
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    return policy[layer.path or ""] if is_map else policy


def _difference(here: list[Any], there: list[Any]) -> str:
    if len(here) != len(there):
        return f"{len(here)} against {len(there)}"
    name, other = next((x, y) for x, y in zip(here, there, strict=True) if x != y)
    return f"{name} against {other}"
