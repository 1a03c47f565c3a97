"""Copies of KerasHub models, for conversions that leave the original as it is."""

from typing import Any

from keras_darkformer.hub.private import copy_lora_facts, forgotten
from keras_darkformer.surgery.twin import make_alike
from keras_darkformer.types import Layer, Model


def twin_of(model: Model) -> Any:
    """A KerasHub model of the same class, config and weights, with variables of its own.

    Names, LoRA and frozen layers and weights, which no config has, are copied, too. The copy is not
    compiled. It shares the model's preprocessor, whose vocabulary is in no config.

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
    copy_lora_facts(backbone, getattr(twin, "backbone", twin))
    make_alike(model, twin, _layers(model), _layers(twin))
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
