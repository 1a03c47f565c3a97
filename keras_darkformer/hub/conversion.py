"""`convert_to_dark` for KerasHub models, and the dark classes they become."""

from typing import Any

from keras_darkformer.hub.backbone import DarkBackbone, convert
from keras_darkformer.hub.families import FAMILIES, INEXPRESSIBLE, TOWERS
from keras_darkformer.hub.tasks import DarkTask, dark_classes
from keras_darkformer.hub.twin import twin_of
from keras_darkformer.layers.tree import every_layer
from keras_darkformer.options import ConversionOptions, shows_options
from keras_darkformer.types import Config, Model

_OF_FAMILIES = [dark_classes(family) for family in (*FAMILIES, *TOWERS)]
# By name, and by stock class.
DARK_CLASSES = {dark.__name__: dark for classes in _OF_FAMILIES for dark in classes.values()}
BY_STOCK_CLASS = {stock: dark for classes in _OF_FAMILIES for stock, dark in classes.items()}


@shows_options(ConversionOptions)
def convert_to_dark(model: Model, *, copy: bool = False, **kwargs: Any) -> Model:
    """Replaces the softmax attention of a KerasHub model with DARKFormer attention.

    `keras_darkformer.convert_to_dark` calls this function for KerasHub models.

    The model is converted in place and returned: its weights are not copied, and the object passed
    in is the dark model afterwards. Pass `copy=True` to leave it as it is and get a converted copy.
    Convert a causal LM as a whole: a task does not notice when only its backbone is converted. All
    stock weights keep their paths. Each converted layer gains the weights of a feature map, in
    float32, under `feature_map/`.

    A freshly converted model estimates a different kernel and is worse than the one it came from:
    `calibrate` it, then `transfer_attention` or `distil`.

    A compiled model is compiled again with the same loss, metrics, sampler and learning rate,
    custom objects included, and so are other models that hold its layers. An optimizer that is
    already built is rebuilt from its config, as it does not know the new weights. A copy gets its
    own optimizer, and its own metrics where their configs allow it.

    Args:
        model: a model of `keras_hub.models`. It may be a causal LM or backbone: Gemma (1 and 2),
            Gemma3 (text), Llama, Llama3, Mistral, Mixtral, Qwen (2 and 2.5), QwenMoe, Qwen3,
            Qwen3Moe, Phi3, SmolLM3, GPT2, OPT or GPTNeoX; a bidirectional backbone, masked LM or
            classifier: Bert, Roberta, XLMRoberta, DistilBert, Electra or ESM (2); or a model of
            images or sounds: ViT, DeiT, DINOV2, the encoders of CLIP and SigLIP, and Whisper and
            Moonshine, whose encoder's self-attention is converted.
        copy: bool. Whether to convert a copy, which needs memory for two models. The copy has the
            model's LoRA, quantization and frozen layers.
        **kwargs: the options of `ConversionOptions`: `num_features`, `layers`, `attention_mode`,
            `geometry_scale`, `sliding_window` and others.

    Returns:
        The dark model. Its class is in `keras_darkformer.hub` and has the stock name with `Dark` in
        front, such as `DarkGemmaCausalLM` or `DarkBertBackbone`.

    Raises:
        TypeError: for an unknown option.
        ValueError: if the model's class can't be converted, the model is dark already or attends in
            a way that can't be expressed (such as image tokens that attend in both directions), an
            argument is out of range, or an optimizer can't be rebuilt from its config. The message
            gives the reason. After any error the model is as it was.

    Warns:
        UserWarning: for what the converted layers no longer do: a soft cap of the attention logits,
            a sliding window, dropout of single attention weights.

    Example:

    >>> backbone = keras_hub.models.GemmaBackbone(
    ...     vocabulary_size=256, num_layers=2, num_query_heads=2, num_key_value_heads=1,
    ...     hidden_dim=16, intermediate_dim=32, head_dim=8)
    >>> dark = keras_darkformer.convert_to_dark(backbone, num_features=32)
    >>> type(dark).__name__
    'DarkGemmaBackbone'

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
    """
    return converted(model, copy, kwargs)


def converted(model: Model, copy: bool, arguments: Config) -> Model:
    """What `convert_to_dark` returns."""
    options, _ = ConversionOptions.take(convert_to_dark, arguments, besides=())
    dark_cls = dark_class_of(model)
    if copy:
        return convert(twin_of(model), dark_cls, options, like=model)
    return convert(model, dark_cls, options)


def dark_class_of(model: Model) -> Any:
    """The class that a model becomes.

    Raises:
        ValueError: if there is none, or the model is dark already, with the reason.
    """
    if isinstance(model, DarkBackbone | DarkTask) or isinstance(
        getattr(model, "backbone", None), DarkBackbone
    ):
        raise ValueError(
            f"`model` is dark already: {type(model).__name__}. A second conversion would lose "
            "what the feature maps have learned."
        )
    if parts := _convertible(model):
        raise ValueError(
            f"`model` can't be converted whole: {type(model).__name__}. Convert the models in it "
            f"by themselves, with `convert_to_dark`: {[part.name for part in parts]}."
        )
    dark_cls = dark_class(type(model))
    expected = getattr(dark_cls, "backbone_cls", dark_cls).stock_cls
    backbone = getattr(model, "backbone", model)
    if type(backbone) is not expected:
        raise ValueError(
            f"`model` can't be converted: a {type(model).__name__} must hold a "
            f"{expected.__name__}. Received: one that holds a {type(backbone).__name__}"
        )
    return dark_cls


def dark_class(stock: type) -> Any:
    """The class that a stock class becomes.

    Raises:
        ValueError: if there is none, with the reason.
    """
    if stock not in BY_STOCK_CLASS:
        raise ValueError(
            f"`model` can't be converted: {stock.__module__}.{stock.__name__}. "
            f"{_reason(stock)} Of keras_hub.models, these can be: "
            f"{', '.join(cls.__name__ for cls in BY_STOCK_CLASS)}."
        )
    return BY_STOCK_CLASS[stock]


def _convertible(model: Model) -> list[Any]:
    """The models inside a model of no known class that can be converted by themselves.

    A model that generates has none: it would keep using a key/value cache.
    """
    if hasattr(model, "generate") or any(x in BY_STOCK_CLASS for x in type(model).__mro__):
        return []
    return [x for x in every_layer(model) if x is not model and type(x) in BY_STOCK_CLASS]


def _reason(cls: type) -> str:
    stock = next((base for base in cls.__mro__ if base in BY_STOCK_CLASS), None)
    if stock is not None:
        return f"It subclasses {stock.__name__}, and its changes would be lost silently."
    for family, reason in INEXPRESSIBLE.items():
        if cls.__name__.startswith(family):
            return reason
    if not cls.__module__.startswith("keras_hub."):
        return (
            "It is not a KerasHub model. `keras_darkformer.convert_to_dark`, `calibrate` and "
            "`transfer_attention` take other Keras models, too."
        )
    return "There is no conversion for this class."
