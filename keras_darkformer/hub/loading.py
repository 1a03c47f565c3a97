"""Loads models of any kind from no more than the name of a preset."""

from typing import Any

import keras_hub

from keras_darkformer.hub.backbone import DarkBackbone
from keras_darkformer.hub.conversion import BY_STOCK_CLASS, dark_class
from keras_darkformer.hub.private import get_preset_loader, task_class
from keras_darkformer.hub.transformers import warn_of_misread
from keras_darkformer.types import Model


def load_stock(preset: str, dtype: str | None = None) -> Model:
    """Loads a model to convert: a causal LM, or an encoder's task if there is one, or its backbone.

    Args:
        preset: what `from_preset` takes.
        dtype: dtype of the model; `None` for the default of `from_preset`.

    Raises:
        ValueError: if it can't be loaded, can't be converted or is dark already. A model that can't
            be converted is refused before its weights are loaded.
    """
    backbone = _backbone_class(preset)
    if issubclass(backbone, DarkBackbone):
        raise ValueError(f"{preset!r} is dark already; a conversion starts from a stock model.")
    model = _load(preset, dark_class(backbone).family.causal, dtype)
    warn_of_misread(preset, get_preset_loader(preset).config, getattr(model, "backbone", model))
    return model


def load_dark(preset: str, dtype: str | None = None) -> Model:
    """Loads a converted model, with the arguments of `load_stock`.

    Raises:
        ValueError: if it can't be loaded or is not dark.
    """
    backbone = _backbone_class(preset)
    if not issubclass(backbone, DarkBackbone):
        raise ValueError(f"{preset!r} is not dark: it holds a {backbone.__name__}.")
    return _load(preset, backbone.family.causal, dtype)


def load_causal_lm(preset: str, dtype: str | None = None) -> Model:
    """Loads any causal LM, stock or dark.

    Raises:
        ValueError: if it can't be loaded or is an encoder.
    """
    backbone = _backbone_class(preset)
    family = getattr(BY_STOCK_CLASS.get(backbone, backbone), "family", None)
    if family is not None and not family.causal:
        raise ValueError(f"{preset!r} holds a {backbone.__name__}, which writes no text.")
    return _load(preset, True, dtype)


def load_text_preprocessor(preset: str, length: int) -> Any:
    """Loads the preprocessor that makes rows of at most `length` tokens for an encoder.

    Raises:
        ValueError: if the preset has no tokenizer.
    """
    backbone = _backbone_class(preset)
    family = BY_STOCK_CLASS.get(backbone, backbone).family
    if "TextClassifier" not in family.tasks:
        raise ValueError(
            f"{preset!r} can't be linearized from texts: KerasHub has no text classifier with a "
            f"{backbone.__name__}, and so no preprocessor for texts. Convert it with "
            "`convert_to_dark`, and `calibrate` it with batches of its inputs."
        )
    kind = family.tasks["TextClassifier"].preprocessor_cls
    # Its own `from_preset` does not know dark backbones.
    load = get_preset_loader(preset).load_preprocessor
    return _told(preset, lambda: load(kind, sequence_length=length))


def _backbone_class(preset: str) -> Any:
    return _told(preset, lambda: get_preset_loader(preset).check_backbone_class())


def _load(preset: str, causal: bool, dtype: str | None) -> Model:
    def load() -> Model:
        cls = keras_hub.models.CausalLM if causal else task_class(preset)
        cls = cls or keras_hub.models.Backbone
        return cls.from_preset(preset, **({} if dtype is None else {"dtype": dtype}))

    return _told(preset, load)


def _told(preset: str, load: Any) -> Any:
    """Returns `load()`. An error in it is raised again as one about the preset."""
    try:
        return load()
    except Exception as error:  # from the network or any file format
        raise ValueError(f"{preset!r} can't be loaded: {error}") from error
