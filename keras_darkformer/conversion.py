"""`convert_to_dark`: softmax attention out, linear attention in; and the report of what changed."""

import importlib
from typing import Any

from keras_darkformer.anymodel import finding
from keras_darkformer.anymodel.conversion import convert
from keras_darkformer.anymodel.report import conversion_report as report_of_keras_model
from keras_darkformer.options import ConversionOptions, shows_options
from keras_darkformer.surgery.report import ConversionReport
from keras_darkformer.types import Model

# A model with KerasHub's attention layers in it is there, and so is KerasHub.
finding.know_keras_hub = lambda: importlib.import_module("keras_darkformer.hub.layers")


@shows_options(ConversionOptions)
def convert_to_dark(model: Model, *, copy: bool = False, **kwargs: Any) -> Model:
    """Replaces the softmax attention of a Keras model by DARKFormer attention.

    In a functional, Sequential or subclassed model every `keras.layers.MultiHeadAttention` and
    `keras.layers.GroupQueryAttention` becomes dark, wherever it is held: in nested models, in
    layers of your own, in wrappers; so does such a layer by itself. Models of KerasHub are
    converted with the task and the generation around them, see `hub.convert_to_dark`.

    The model is converted in place and returned: no second copy of its weights is made, all stock
    weights stay under their paths, and each converted layer gains those of a feature map, under
    `feature_map/`, in float32. A freshly converted model estimates a different kernel and is worse
    than the one it came from: `calibrate` it, then `transfer_attention`, or train it.

    Layers of your own classes that make their attention themselves change class, to a subclass
    whose config says which of it is dark, so that they are saved, loaded and cloned dark.

    If the model was compiled, it is compiled again, as `hub.convert_to_dark` says, and so are all
    models that hold it.

    Args:
        model: a built Keras model or layer with attention layers in it, or such a layer, built or
            not.
        copy: bool. Convert a copy, made from the model's config; needs memory for two models.
        **kwargs: the options of `ConversionOptions`: `num_features`, `attention_mode`,
            `geometry_scale`, `sliding_window` and others. The indices of `layers` count the
            attention layers as they are held; it may also be names or paths of them, or a function
            that says of a layer whether it is meant. A layer with a sliding window is left unless
            it is named or `layers="all"`, and then has just this window, exactly.

    Returns:
        The dark model, of the class that it was; for KerasHub's, of the one in
        `keras_darkformer.hub`.

    Raises:
        TypeError: for an option that is unknown.
        ValueError: with the reason, if the model has no attention layer that can be converted, is
            dark already, or is not built; if an attention layer attends along other axes than that
            of the tokens, or is of a subclass that computes something else; if an argument is out
            of range or `rope_geometry="before"`; or an optimizer has to be made anew and its config
            does not tell how. After any error the model is as it was. Masks are judged when the
            model is called.

    Warns:
        UserWarning: where dropout of single attention weights becomes dropout of whole tokens.

    Example:

    >>> x = inputs = keras.Input((None, 16))
    >>> for _ in range(2):
    ...     x = x + keras.layers.MultiHeadAttention(num_heads=2, key_dim=8)(x, x)
    >>> model = keras.Model(inputs, keras.layers.Dense(1)(x))
    >>> model = keras_darkformer.convert_to_dark(model, num_features=32)
    >>> model(np.ones((1, 100, 16), "float32")).shape
    (1, 100, 1)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
    """
    if finding.is_of_keras_hub(model):
        hub = importlib.import_module("keras_darkformer.hub.conversion")
        return hub.converted(model, copy, kwargs)
    ConversionOptions.check_names(convert_to_dark, kwargs, besides=())
    return convert(model, kwargs, copy=copy)


def conversion_report(model: Model) -> ConversionReport:
    """Says what `convert_to_dark` changed in a model, also after saving and loading it.

    Args:
        model: a converted Keras model, or a dark causal LM, task or backbone of KerasHub.

    Returns:
        A `ConversionReport`: print it, or read it as a dict.

    Raises:
        ValueError: if the model is not dark.

    Example:

        print(conversion_report(model))
        conversion_report(model)["dropped"]
    """
    if finding.is_of_keras_hub(model):
        return importlib.import_module("keras_darkformer.hub.report").conversion_report(model)
    return report_of_keras_model(model)
