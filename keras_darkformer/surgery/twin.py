"""Copies of models, for conversions that leave the original as it is."""

import re
from collections.abc import Sequence
from typing import Any

import keras

from keras_darkformer.types import Layer, Model, Shape, Tensor


def make_alike(
    model: Model, twin: Model, layers: Sequence[Layer], of_twin: Sequence[Layer]
) -> None:
    """Copies from one model to another, made from its config, what no config has.

    That is weights, names, LoRA, quantization, and which layers and weights are frozen.

    Args:
        model: the original.
        twin: the copy.
        layers: the layers of the original, from the outside in.
        of_twin: those of the copy, in the same order.

    Raises:
        ValueError: if the original has weights that its config does not describe.
    """
    for layer, other in zip(layers, of_twin, strict=False):
        _make_alike_without_weights(layer, other)
    here, there = ([_described(weight) for weight in x.weights] for x in (model, twin))
    if here != there:
        raise ValueError(
            "`copy=True` rebuilds the model from its config, which does not describe all of its "
            f"weights: {_difference(here, there)}. Convert the model in place."
        )
    twin.set_weights(model.get_weights())
    for layer, other in zip(layers, of_twin, strict=False):
        # From the outside in, since a layer passes it on to the layers in it.
        if other.trainable != layer.trainable:
            other.trainable = layer.trainable
        other.name = layer.name
    for weight, other in zip(model.weights, twin.weights, strict=True):
        if other.trainable != weight.trainable:
            other.trainable = weight.trainable


def _described(weight: Tensor) -> tuple[str, Shape, str]:
    """Name, shape and dtype, without the running number that Keras gives to unnamed weights."""
    name = re.sub(r"^(\w*variable)_\d+$", r"\1", weight.name)
    return name, tuple(weight.shape), weight.dtype


def _difference(here: list[Any], there: list[Any]) -> str:
    if len(here) != len(there):
        return f"{len(here)} against {len(there)}"
    name, other = next((x, y) for x, y in zip(here, there, strict=True) if x != y)
    return f"{name} against {other}"


def _make_alike_without_weights(layer: Layer, other: Layer) -> None:
    """Gives `other` the quantization and LoRA of `layer`, which its outer layers may not know."""
    mode = getattr(layer, "quantization_mode", None)
    if mode is not None and getattr(other, "quantization_mode", None) is None:
        other.quantize(mode)
    other._dtype_policy = _dtype_policy(layer)
    if getattr(layer, "lora_enabled", False):
        other.enable_lora(layer.lora_rank, lora_alpha=layer.lora_alpha)


def _dtype_policy(layer: Layer) -> Any:
    """A layer's own policy. With a map for all layers, Keras can't save a quantized layer."""
    policy = layer.dtype_policy
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    return policy[layer.path or ""] if is_map else policy
