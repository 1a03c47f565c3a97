"""`convert_to_dark`, which replaces softmax attention, and the report of what it changed."""

import importlib
from typing import Any

from keras_darkformer.anymodel import finding
from keras_darkformer.anymodel.conversion import convert
from keras_darkformer.anymodel.report import conversion_report as report_of_keras_model
from keras_darkformer.options import ConversionOptions, shows_options
from keras_darkformer.surgery.report import ConversionReport
from keras_darkformer.types import Model

# If a model holds KerasHub's attention layers, KerasHub is installed.
finding.know_keras_hub = lambda: importlib.import_module("keras_darkformer.hub.layers")


@shows_options(ConversionOptions)
def convert_to_dark(model: Model, *, copy: bool = False, **kwargs: Any) -> Model:
    """Replaces the softmax attention of a Keras model by DARKFormer attention.

    In a functional, Sequential or subclassed model, every `keras.layers.MultiHeadAttention` and
    `keras.layers.GroupQueryAttention` becomes dark, wherever it is held: in nested models, in
    wrappers or in your own layers. Such a layer can also be converted by itself. KerasHub models
    are converted together with their task and its generation; see `hub.convert_to_dark`.

    The model is converted in place and returned. Its weights are not copied and keep their paths,
    and each converted layer gains the float32 weights of a feature map under `feature_map/`. A
    freshly converted model estimates a different kernel and is worse than the original. To improve
    it, run `calibrate` and then `transfer_attention`, or train it.

    Layers of your own classes that create attention layers themselves change class. Their new class
    is a subclass whose config says which of these layers are dark, so that they stay dark when
    saved, loaded or cloned.

    If the model was compiled, it is compiled again as described for `hub.convert_to_dark`, and so
    are all models that hold it.

    Args:
        model: a built Keras model or layer with attention layers in it, or such a layer, built or
            not.
        copy: bool. Whether to convert a copy made from the model's config, which needs memory for
            two models.
        **kwargs: the options of `ConversionOptions`: `num_features`, `attention_mode`,
            `geometry_scale`, `sliding_window` and others. Indices in `layers` count the attention
            layers in the order in which they are held. `layers` may also give their names or paths,
            or be a function that takes a layer and says whether to convert it. A layer with a
            sliding window is converted only if it is named or `layers="all"`; it then computes just
            this window, exactly.

    Returns:
        The dark model. It has the same class as before, or for a KerasHub model the corresponding
        class in `keras_darkformer.hub`.

    Raises:
        TypeError: if an option is unknown.
        ValueError: if the model has no attention layer that can be converted, is already dark, or
            is not built; if an attention layer attends along axes other than that of the tokens, or
            is of a subclass that computes something else; if an argument is out of range or
            `rope_geometry="before"`; or if an optimizer must be recreated but can't be from its
            config. The message gives the reason, and the model is left unchanged. Masks are checked
            only when the model is called.

    Warns:
        UserWarning: if dropout of single attention weights becomes dropout of whole tokens.

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
    """Reports what `convert_to_dark` changed in a model, even after saving and loading it.

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
