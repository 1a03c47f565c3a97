"""Tiny Gemmas under which every token counts, and what to feed and ask them."""

import numpy as np
from backends import to_numpy
from keras_hub.models import Gemma3Backbone, Gemma3CausalLM, GemmaBackbone, GemmaCausalLM

from keras_darkformer import convert_to_dark

VOCABULARY, LENGTH, WINDOW = 64, 14, 4
SIZES = {
    "vocabulary_size": VOCABULARY,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 32,
    "head_dim": 8,
}
SLIDING = {"use_sliding_window_attention": True, "sliding_window_size": WINDOW}
POST_NORMS = {"use_post_ffw_norm": True, "use_post_attention_norm": True}


def gemma(num_layers=2, preprocessor=None, **options):
    backbone = GemmaBackbone(num_layers=num_layers, **SIZES | options)
    return _randomized(GemmaCausalLM(backbone, preprocessor))


def gemma2(soft_cap=None, num_layers=2, **options):
    """Its even layers have a sliding window."""
    caps = {"attention_logit_soft_cap": soft_cap, "final_logit_soft_cap": 30.0}
    return gemma(num_layers, **caps | SLIDING | POST_NORMS | options)


def gemma3(num_layers=6, preprocessor=None, **options):
    """Of six layers the first five have a sliding window."""
    options = {"image_size": 16} | SIZES | SLIDING | POST_NORMS | options
    backbone = Gemma3Backbone(num_layers=num_layers, **options)
    return _randomized(Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor))


FAMILIES = {"gemma": gemma, "gemma2": gemma2, "gemma3": gemma3}


def _randomized(model, seed=1):
    """The model with weights under which attention is sharp and the next token hangs on it."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        *_, layer, name = weight.path.split("/")
        value = rng.standard_normal(weight.shape)
        if name == "kernel":
            fan_in = np.prod(weight.shape[:-1]) if layer == "attention_output" else weight.shape[-2]
            value *= (2.0 if layer in ("query", "key") else 3.0) / np.sqrt(fan_in)
        elif name == "scale":  # of an RMSNorm, which adds 1
            value = 0.2 * value + (2.0 if layer.startswith("post") else 0.0)
        else:  # embeddings; of one norm, for else the longest always win
            value /= np.linalg.norm(value, axis=-1, keepdims=True)
        weight.assign(value.astype("float32"))
    return model


def dark(model, **options):
    """The model converted, with geometries that are no longer what they started as."""
    model = convert_to_dark(model, **{"num_features": 16} | options)
    scramble_geometries(model)
    return model


def scramble_geometries(model, seed=1):
    rng = np.random.default_rng(seed)
    for feature_map in feature_maps(model):
        geometry = feature_map.geometry
        geometry.assign(to_numpy(geometry.value) + 0.2 * rng.standard_normal(geometry.shape))


def blocks(model):
    return getattr(model, "backbone", model).transformer_layers


def attentions(model):
    return [block.attention for block in blocks(model)]


def feature_maps(model):
    maps = (getattr(attention, "feature_map", None) for attention in attentions(model))
    return [feature_map for feature_map in maps if feature_map is not None]


def real(*lengths, total=LENGTH):
    """True for tokens, false for the padding behind them."""
    return np.arange(total) < np.array(lengths)[:, None]


def inputs(*lengths, total=LENGTH, vocabulary=VOCABULARY):
    """A batch of random tokens with padding behind."""
    mask = real(*lengths, total=total)
    token_ids = np.random.default_rng(2).integers(1, vocabulary, mask.shape)
    return {"token_ids": (token_ids * mask).astype("int32"), "padding_mask": mask.astype("int32")}


def outputs(model, batch):
    """The model called as it is now, past anything compiled earlier."""
    return to_numpy(model(batch)).astype("float32")


def values(model):
    """Weights by their paths."""
    return {weight.path: to_numpy(weight.value) for weight in model.weights}
