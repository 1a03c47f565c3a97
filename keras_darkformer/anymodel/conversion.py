"""Conversion of any Keras model, in which Keras' own attention layers become dark."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import keras

from keras_darkformer.anymodel.attention import take_over
from keras_darkformer.anymodel.finding import attention_layers, chosen, is_choice, is_of_keras_hub
from keras_darkformer.anymodel.holder import hold_all
from keras_darkformer.anymodel.report import dropped
from keras_darkformer.anymodel.twin import twin_of
from keras_darkformer.compiling import recompilations
from keras_darkformer.layers.feature_maps import BY_KIND
from keras_darkformer.layers.feature_maps.placement import placement_of
from keras_darkformer.layers.stock import (
    head_sizes,
    refusal,
    stock_class,
    window_of,
)
from keras_darkformer.layers.tree import every_layer
from keras_darkformer.options import (
    AttentionOptions,
    ConversionOptions,
    default_geometry_scale,
)
from keras_darkformer.surgery.become import undone_on_error
from keras_darkformer.surgery.dark_layer import DarkLayer
from keras_darkformer.surgery.report import warn_of_dropped
from keras_darkformer.types import Config, Layer, Model


def convert(model: Model, arguments: Config, *, copy: bool) -> Model:
    """Makes the attention layers of a Keras model or layer dark, and compiles it as it was.

    On any error nothing is changed.

    Args:
        model: a Keras model or layer.
        arguments: options of the conversion by name; `layers` may also be a predicate or names.
        copy: bool. Whether to convert a copy and leave `model` as it is.

    Returns:
        The model, or the copy.
    """
    if not isinstance(model, keras.Layer):
        raise ValueError(f"`model` can't be converted, as it is not a Keras model: {model!r}")
    found = attention_layers(model)
    _check_model(model, found)
    layers = arguments.get("layers")
    if is_choice(layers):
        arguments = {**arguments, "layers": chosen(found, layers)}
    elif layers == "auto":
        arguments = {**arguments, "layers": _convertible(model, found)}
    options = ConversionOptions(**arguments)
    by_layer = _options_by_layer(found, options)
    converted = twin_of(model) if copy else model
    layers = attention_layers(converted)
    compile_anew = recompilations(
        _models(converted),
        [layers[index] for index in by_layer],
        like=_models(model) if copy else None,
    )
    with undone_on_error():
        for index, of_layer in by_layer.items():
            take_over(layers[index], stock_class(layers[index]), of_layer)
        hold_all(converted)
        # Shown at the line that calls `keras_darkformer.convert_to_dark`.
        warn_of_dropped(converted.name, dropped(converted), "attention layers", stacklevel=3)
    compile_anew()
    return converted


def _check_model(model: Model, found: Sequence[Layer]) -> None:
    """Raises a ValueError unless the model is built and has attention layers, none of them dark."""
    if dark := [layer.path for layer in found if isinstance(layer, DarkLayer)]:
        raise ValueError(
            f"`model` is dark already, in {dark}. A second conversion would lose what the feature "
            "maps have learned. Convert the layers that were left one by one, with "
            "`convert_to_dark(layer)`."
        )
    if not found:
        unbuilt = "" if model.built else " It is not built yet: call it on a batch first."
        raise ValueError(
            f"`model` can't be converted: {type(model).__module__}.{type(model).__name__} has no "
            f"keras.layers.MultiHeadAttention or keras.layers.GroupQueryAttention in it.{unbuilt}"
        )
    if hub := [x.name for x in every_layer(model) if is_of_keras_hub(x) and attention_layers(x)]:
        raise ValueError(
            f"`model` holds models of KerasHub, {hub}. Convert these first, each with "
            "`convert_to_dark(backbone)`."
        )
    if waiting := [x.path or x.name for x in found if not x.built and x is not model]:
        raise ValueError(
            f"`model` must be built, so that all its layers are there. Call it on a batch first. "
            f"Not built are: {waiting}"
        )


def _convertible(model: Model, found: Sequence[Layer]) -> list[int]:
    """Indices of the attention layers that can be converted; warns of the others.

    Layers with a window are left out, unless all have one.
    """
    reasons = [refusal(layer, stock_class(layer)) for layer in found]
    able = [index for index, reason in enumerate(reasons) if reason is None]
    told = " ".join(
        f"{layer.path!r}: {reason}"
        for layer, reason in zip(found, reasons, strict=True)
        if reason is not None
    )
    if not able:
        raise ValueError(f"No attention layer of {model.name!r} can be converted. {told}")
    if told:
        warnings.warn(f"Layers of {model.name!r} keep softmax attention. {told}", stacklevel=4)
    return [index for index in able if window_of(found[index]) is None] or able


def _options_by_layer(
    found: Sequence[Layer], options: ConversionOptions
) -> dict[int, AttentionOptions]:
    """Checks the options, and gives those of every layer to convert, by its index."""
    windows = [window_of(layer) for layer in found]
    resolved = options.resolve([window is not None for window in windows], 1)
    placement = placement_of(resolved)
    if placement.needs_rotation:
        raise ValueError(
            f"`rope_geometry={placement.name!r}` needs rotary positions, which the attention "
            "layers of Keras do not have."
        )
    by_layer = resolved.by_layer()
    for index, of_layer in by_layer.items():
        layer = found[index]
        if (reason := refusal(layer, stock_class(layer))) is not None:
            raise ValueError(
                f"Attention layer {layer.path!r} can't be converted. {reason} Leave it out with "
                "`layers=`."
            )
        head_dim = head_sizes(layer)[2]
        if options.geometry_scale is None:
            scale = default_geometry_scale(head_dim, of_layer.num_features)
            of_layer = dataclasses.replace(of_layer, geometry_scale=scale)
        if windows[index] is not None:
            # The layer sees the same as before, in linear time.
            of_layer = dataclasses.replace(
                of_layer,
                feature_map="none",
                sliding_window=windows[index],
                num_sinks=0,
                cache_size=0,
            )
        BY_KIND[of_layer.feature_map].check(of_layer, head_dim)
        by_layer[index] = of_layer
    return by_layer


def _models(model: Model) -> list[Any]:
    """The models in a model, from the inside out; the model itself comes last."""
    return [x for x in reversed(every_layer(model)) if isinstance(x, keras.Model)]
