"""`convert_to_dark`: softmax attention out, linear attention in."""

from typing import Any

from keras_hub.models import Gemma3Backbone, Gemma3CausalLM, GemmaBackbone, GemmaCausalLM

from keras_darkformer.compiling import compile_anew
from keras_darkformer.hub.backbone import (
    DarkBackbone,
    DarkGemma3Backbone,
    DarkGemmaBackbone,
)
from keras_darkformer.hub.causal_lm import DarkCausalLM, DarkGemma3CausalLM, DarkGemmaCausalLM
from keras_darkformer.hub.options import DarkOptions

DARK_CLASSES: dict[type, Any] = {
    GemmaBackbone: DarkGemmaBackbone,
    GemmaCausalLM: DarkGemmaCausalLM,
    Gemma3Backbone: DarkGemma3Backbone,
    Gemma3CausalLM: DarkGemma3CausalLM,
}

# Families whose logits have terms that no product of features gives.
INEXPRESSIBLE = {
    "Bloom": "Its logits have linear position biases (ALiBi).",
    "Falcon": "Its logits have linear position biases (ALiBi).",
    "T5": "Its logits have learned relative position biases.",
    "GptOss": "Its softmax has learned attention sinks.",
    "Gemma3n": "Its layers share keys and values.",
    "Gemma4": "Its layers share keys and values.",
}


def convert_to_dark(
    model: Any,
    *,
    num_features: Any = 256,
    layers: Any = "global",
    attention_mode: str = "linear",
    geometry_scale: float | None = None,
    train_geometry: bool = True,
    train_projection: bool = False,
    projection: str = "orthogonal",
    tie_geometry: bool = True,
    rope_geometry: str = "after",
    sliding_window: int | None = None,
    window_only: bool = False,
    chunk_size: int | None = None,
    remat: bool | None = None,
    seed: int = 0,
    copy: bool = False,
) -> Any:
    """Replaces the softmax attention of a KerasHub model by DARKFormer attention.

    The model is converted in place and returned: no second copy of its
    weights is made, and the object passed in is the dark model afterwards.
    Convert a causal LM whole, not by its backbone: the task around it would
    not know.
    Pass `copy=True` to leave it as it is and get a converted copy. All
    weights of the stock model stay, under their paths; each converted layer
    gains `feature_map/geometry` and `feature_map/projection`, in float32.

    A freshly converted model estimates a different kernel and is worse than
    the one it came from: `calibrate` it, then `transfer_attention` or `distil`.
    If the model was compiled, it is compiled again with the same arguments, a
    fresh optimizer and fresh metrics.

    Args:
        model: a `GemmaCausalLM`, `GemmaBackbone` (Gemma 1 and 2),
            `Gemma3CausalLM` or `Gemma3Backbone` (text).
        num_features: int, or a sequence with one for each converted layer.
            Random features m per key/value head.
        layers: `"global"` converts the layers without a sliding window (in
            Gemma 1 that is all), `"all"` every layer, a sequence of indices
            just these. Layers left keep softmax and their key/value cache.
        attention_mode: `"linear"`, or `"exact"` for the learned kernel
            computed exactly, quadratic in the length. With
            `geometry_scale=1.0` that is the stock model's function, but for a
            soft cap of the attention logits.
        geometry_scale: float. Each geometry starts at this times the identity.
            `None` for `min(1, sqrt(log(m) / (2 sqrt(h))))`, at which m
            features can just estimate the kernel for queries and keys of unit
            variance. 1.0 starts at softmax's own kernel, which is noise for
            large heads.
        train_geometry: bool. False, with `geometry_scale=1.0`, is Performer.
        train_projection: bool. Also trains the projection; then the features
            are learned, no longer random.
        projection: `"orthogonal"`, `"gaussian"` or `"antithetic"`.
        tie_geometry: bool. One geometry for queries and keys, as in the paper,
            or one each, which fits better.
        rope_geometry: `"after"` the rotation, `"before"` it, or `"planes"`,
            one scalar per rotary plane; see `DarkFeatureMap`.
        sliding_window: int. The last tokens, met with softmax's own kernel;
            features stand for those further back only. `None` for none.
        window_only: bool. With a sliding window: leaves the features out, to
            measure the window alone.
        chunk_size: int, tokens handled at once, or `None` to pick by shape.
        remat: bool. Whether training computes features anew in the backward
            pass instead of keeping them: less memory, more time. `None` where
            that is faster (JAX).
        seed: int. Seed of the projections.
        copy: bool. Convert a copy; needs memory for two models.

    Returns:
        The dark model: `DarkGemmaCausalLM`, `DarkGemmaBackbone`,
        `DarkGemma3CausalLM` or `DarkGemma3Backbone`.

    Raises:
        ValueError: with the reason, if the model is of no class that can be
            converted, is dark already or can't be expressed (vision or
            bidirectional attention), or an argument is out of range. The model
            is then as it was.

    Warns:
        UserWarning: for what the converted layers no longer do: a soft cap of
            the attention logits, a sliding window, dropout of single weights.

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
    options = DarkOptions(
        num_features=num_features,
        layers=layers,
        attention_mode=attention_mode,
        geometry_scale=geometry_scale,
        train_geometry=train_geometry,
        train_projection=train_projection,
        projection=projection,
        tie_geometry=tie_geometry,
        rope_geometry=rope_geometry,
        sliding_window=sliding_window,
        window_only=window_only,
        chunk_size=chunk_size,
        remat=remat,
        seed=seed,
    )
    dark_cls = _dark_class(model)
    return dark_cls.take_over(_copy(model) if copy else model, options)


def _dark_class(model: Any) -> Any:
    if isinstance(model, DarkBackbone | DarkCausalLM) or isinstance(
        getattr(model, "backbone", None), DarkBackbone
    ):
        raise ValueError(
            f"`model` is dark already: {type(model).__name__}. A second conversion would lose "
            "what the feature maps have learned."
        )
    if type(model) not in DARK_CLASSES:
        raise ValueError(
            f"`model` can't be converted: {type(model).__module__}.{type(model).__name__}. "
            f"{_reason(type(model))} Convertible are, from keras_hub.models: "
            f"{', '.join(cls.__name__ for cls in DARK_CLASSES)}."
        )
    return DARK_CLASSES[type(model)]


def _reason(cls: type) -> str:
    stock = next((base for base in cls.__mro__ if base in DARK_CLASSES), None)
    if stock is not None:
        return f"It subclasses {stock.__name__}, and what it changes there would be lost silently."
    for family, reason in INEXPRESSIBLE.items():
        if cls.__name__.startswith(family):
            return reason
    return "There is no conversion for this class."


def _copy(model: Any) -> Any:
    backbone = getattr(model, "backbone", model)
    twin = type(backbone).from_config(backbone.get_config())
    if len(twin.weights) != len(backbone.weights):
        raise ValueError(
            "`copy=True` rebuilds the model from its config, which does not describe all of its "
            f"weights: {len(backbone.weights)} against {len(twin.weights)}, as with LoRA. Save "
            "and load it instead, or convert it in place."
        )
    twin.set_weights(backbone.get_weights())
    if backbone is not model:
        twin = type(model)(backbone=twin, preprocessor=model.preprocessor, name=model.name)
    compile_anew(twin, like=model)
    return twin
