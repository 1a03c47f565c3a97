"""Tiny models under which every token counts, and what to feed and ask them."""

import dataclasses
import io

import keras
import keras_hub
import numpy as np
from backends import graph, to_numpy
from keras import ops
from keras_hub.models import Gemma3Backbone, Gemma3CausalLM, GemmaBackbone, GemmaCausalLM

from keras_darkformer import convert_to_dark
from keras_darkformer.hub.families import TOWERS

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


def gemma3(num_layers=6, preprocessor=None, seed=1, **options):
    """Of six layers the first five have a sliding window."""
    options = {"image_size": 16} | SIZES | SLIDING | POST_NORMS | options
    backbone = Gemma3Backbone(num_layers=num_layers, **options)
    return _randomized(Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor), seed)


FAMILIES = {"gemma": gemma, "gemma2": gemma2, "gemma3": gemma3}

_GROUPED = {name: SIZES[name] for name in SIZES if name != "head_dim"} | {"hidden_dim": 32}
_ONE_TO_ONE = {
    "vocabulary_size": VOCABULARY,
    "num_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 32,
    "max_sequence_length": 64,
    "dropout": 0.0,
}
_EXPERTS = {"num_experts": 4, "top_k": 2}
_OWN_HEADS = {"head_dim": 6, "sliding_window_size": None}
# The families that differ from Gemma in how they are put together: arguments of the backbone.
ROWS = {
    "Llama": _GROUPED,
    "Llama3": _GROUPED
    | {"rope_frequency_adjustment_factor": 8.0, "rope_low_freq_factor": 1.0}
    | {"rope_high_freq_factor": 4.0, "rope_pretraining_sequence_length": 32},
    "Mistral": _GROUPED | {"sliding_window": WINDOW},
    "Mixtral": _GROUPED | _EXPERTS | {"sliding_window": None},
    "Qwen": _GROUPED,
    "QwenMoe": _GROUPED
    | _EXPERTS
    | {"moe_intermediate_dim": 8, "shared_expert_intermediate_dim": 8},
    "Qwen3": _GROUPED | _OWN_HEADS,
    "Qwen3Moe": _GROUPED | _OWN_HEADS | _EXPERTS | {"moe_intermediate_dim": 8},
    "Phi3": _GROUPED,
    # Of its layers the second has no positions.
    "SmolLM3": {name: _GROUPED[name] for name in _GROUPED if name != "num_query_heads"}
    | {"num_attention_heads": 4, "attention_bias": True, "mlp_bias": False}
    | {"attention_dropout": 0.0, "layer_norm_epsilon": 1e-6, "max_position_embeddings": 64}
    | {"rope_layer_enabled_list": [True, False, True], "layer_types": ["full_attention"] * 3}
    | {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
    "GPT2": _ONE_TO_ONE,
    "OPT": _ONE_TO_ONE,
    # Half of its coordinates are rotated.
    "GPTNeoX": _ONE_TO_ONE | {"rotary_percentage": 0.5},
    "Bert": _ONE_TO_ONE,
    "Roberta": _ONE_TO_ONE,
    "XLMRoberta": _ONE_TO_ONE,
    "DistilBert": _ONE_TO_ONE,
    "Electra": {name: _ONE_TO_ONE[name] for name in _ONE_TO_ONE if name != "vocabulary_size"}
    | {"vocab_size": VOCABULARY, "embedding_dim": 24},
    "ESM": _ONE_TO_ONE,
}
# Encoders with a masked LM and a classifier of text, and those that have others or none.
ENCODERS = ("Bert", "Roberta", "XLMRoberta", "DistilBert")
CLASSIFIERS = {name: f"{name}TextClassifier" for name in ENCODERS} | {"ESM": "ESMProteinClassifier"}
NOT_CAUSAL = (*ENCODERS, "Electra", "ESM")
CAUSAL = tuple(name for name in ROWS if name not in NOT_CAUSAL)


IMAGE = {"image_shape": (16, 16, 3), "patch_size": 4, "hidden_dim": 32}
_VISION = IMAGE | {"num_heads": 4, "intermediate_dim": 32}
_TEXT = _ONE_TO_ONE | {"embedding_dim": 32, "max_sequence_length": LENGTH}
del _TEXT["dropout"]
# Models of images, sounds and the texts beside them: arguments of the backbone.
TOWER_ROWS = {
    "ViT": IMAGE | {"num_heads": 4, "mlp_dim": 32},
    "DeiT": _VISION,
    "DINOV2": _VISION | {"position_embedding_shape": (16, 16, 3), "num_register_tokens": 1},
    "CLIPVision": _VISION,
    "CLIPText": _TEXT,
    "SigLIPVision": _VISION,
    "SigLIPText": _TEXT,
    "Whisper": _ONE_TO_ONE
    | {"num_mels": 4, "max_encoder_sequence_length": 32, "max_decoder_sequence_length": LENGTH},
    "Moonshine": {"vocabulary_size": VOCABULARY, "filter_dim": 32, "hidden_dim": 32}
    | {"intermediate_dim": 32, "encoder_num_heads": 4, "decoder_num_heads": 4}
    | {"decoder_num_layers": 1},
}
TOWERS_BY_NAME = {tower.name: tower for tower in TOWERS}


def tower(name, num_layers=2, **options):
    """A backbone of images or sounds, or a classifier of images with one in it."""
    family, layers = TOWERS_BY_NAME[name], {"num_layers": num_layers}
    if name == "Moonshine":
        layers = {"encoder_num_layers": num_layers}
    model = _randomized(family.backbone(**layers, **TOWER_ROWS[name] | options))
    if "ImageClassifier" in family.tasks:
        task = family.tasks["ImageClassifier"](model, num_classes=VOCABULARY, preprocessor=None)
        model = _randomized(task)
    return model


def tower_inputs(model):
    """Three random images or sounds, and tokens as many as a model of text takes."""
    rng = np.random.default_rng(2)

    def one(name, tensor):
        if name.endswith("token_ids"):
            return rng.integers(1, VOCABULARY, (3, LENGTH)).astype("int32")
        shape = [3, *(size or 32 for size in tensor.shape[1:])]
        if name.startswith("encoder_input") or name == "encoder_padding_mask":  # raw sound
            shape[1] = 6000
        if name == "mask":
            return real(*(LENGTH, 9, 5)).astype("int32")
        if name.endswith("padding_mask"):
            shape[1] = LENGTH if name.startswith("decoder") else shape[1]
            return np.ones(shape, "int32")
        return rng.standard_normal(shape).astype("float32")

    given = body(model).input
    if isinstance(given, dict):
        return {name: one(name, tensor) for name, tensor in given.items()}
    return one("images", given)


OWN_WIDTH = 32


def own(name, num_layers=2, **options):
    """A model of a user's own that is made of one kind of KerasHub's layers."""
    x = inputs = keras.Input((LENGTH, OWN_WIDTH), name="x")
    mask = keras.Input((LENGTH,), dtype="int32", name="mask")
    given = {"x": inputs, "mask": mask}
    if name == "cross-attention":
        given["encoded"] = keras.Input((LENGTH + 2, OWN_WIDTH), name="encoded")
    make = getattr(keras_hub.layers, name, keras_hub.layers.TransformerDecoder)
    for _ in range(num_layers):
        if name == "TransformerEncoder":
            x = make(32, 4, **options)(x, padding_mask=mask)
        elif name == "CachedMultiHeadAttention":
            padding = keras.layers.Reshape((1, LENGTH))(mask)
            x = x + make(4, OWN_WIDTH // 4, **options)(x, x, attention_mask=padding)
        else:
            x = make(32, 4, **options)(x, given.get("encoded"), decoder_padding_mask=mask)
    return _randomized(keras.Model(given, x))


@dataclasses.dataclass(frozen=True)
class Own:
    """What stands for a family there."""

    name: str
    causal: bool = False


OWN = {
    name: Own(name)
    for name in (
        "TransformerEncoder",
        "TransformerDecoder",
        "cross-attention",
        "CachedMultiHeadAttention",
    )
}


def row(name, num_layers=3, **options):
    """A causal LM of a family, or an encoder's backbone."""
    backbone_class = getattr(keras_hub.models, f"{name}Backbone")
    backbone = backbone_class(num_layers=num_layers, **ROWS[name] | options)
    if name in CAUSAL:
        return _randomized(getattr(keras_hub.models, f"{name}CausalLM")(backbone))
    return _randomized(backbone)


def task_of(name, num_layers=2, **options):
    """A causal LM of a family, or an encoder with a classifier around it if it has one."""
    if name in ("Gemma", "Gemma3"):
        return {"Gemma": gemma, "Gemma3": gemma3}[name](
            num_layers, use_sliding_window_attention=False, **options
        )
    if name in TOWER_ROWS:
        return tower(name, num_layers, **options)
    if name in OWN:
        return own(name, num_layers, **options)
    model = row(name, num_layers, **options)
    if name not in CLASSIFIERS:
        return model
    classifier = getattr(keras_hub.models, CLASSIFIERS[name])
    return _randomized(classifier(backbone=model, num_classes=VOCABULARY, preprocessor=None))


def _randomized(model, seed=1):
    """The model with weights under which attention is sharp and the next token hangs on it."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        *_, layer, name = ("", *weight.path.split("/"))
        value = rng.standard_normal(weight.shape)
        # Constants: of the rotary embedding, and places in a table. DINOv2 keeps positions twice.
        if name in ("inv_freq", "position_ids") or "rotary" in layer or "position_emb" in name:
            continue
        if name == "kernel":
            onto_heads = layer in ("attention_output", "o_proj")
            fan_in = np.prod(weight.shape[:-1]) if onto_heads else weight.shape[-2]
            sharp = layer in ("query", "key", "q_proj", "k_proj", "q_dense_layer", "k_dense_layer")
            value *= (2.0 if sharp else 3.0) / np.sqrt(fan_in)
        elif name.startswith("expert_"):
            value *= 3.0 / np.sqrt(weight.shape[-2])
        elif name in ("scale", "gamma", "beta", "bias"):
            # Around what it starts from: Gemma's norms add 1, others have it.
            value = 0.2 * value + to_numpy(weight.value).mean()
            value += 2.0 if layer.startswith("post_") and name == "scale" else 0.0
        else:  # embeddings; of one norm, for else the longest always win
            value /= np.linalg.norm(value, axis=-1, keepdims=True)
        weight.assign(value.astype("float32"))
    return model


def dark(model, **options):
    """The model converted, with geometries that are no longer what they started as."""
    return scramble_geometries(convert_to_dark(model, **{"num_features": 16} | options))


def scramble_geometries(model, seed=1):
    rng = np.random.default_rng(seed)
    for feature_map in filter(lambda x: x.num_features, feature_maps(model)):
        geometry = feature_map.geometry
        geometry.assign(to_numpy(geometry.value) + 0.2 * rng.standard_normal(geometry.shape))
    return model


# The weights of a dark feature map of queries and keys that share a geometry.
DARK_WEIGHTS = (
    "geometry",
    "projection",
    "proposal",
    "log_weight",
    "query_shift",
    "key_shift",
)


def body(model):
    """The backbone of a task, or what is one."""
    return getattr(model, "backbone", model)


def blocks(model):
    return body(model).transformer_layers


def attentions(model):
    if type(model) is keras.Model or type(model).__name__ == "Functional":
        return [x for x in model._flatten_layers() if hasattr(x, "feature_map")]
    if hasattr(body(model), "family"):
        return body(model).attention_layers
    slots = ("attention", "_self_attention_layer", "self_attn", "attention_layer")
    return [next(getattr(block, x) for x in slots if hasattr(block, x)) for block in blocks(model)]


def feature_maps(model):
    maps = (getattr(attention, "feature_map", None) for attention in attentions(model))
    return [feature_map for feature_map in maps if feature_map is not None]


def real(*lengths, total=LENGTH):
    """True for tokens, false for the padding behind them."""
    return np.arange(total) < np.array(lengths)[:, None]


def inputs(*lengths, total=LENGTH, vocabulary=VOCABULARY, model=None):
    """A batch of random tokens with padding behind, with all inputs that `model` has."""
    mask = real(*lengths, total=total)
    token_ids = np.random.default_rng(2).integers(1, vocabulary, mask.shape)
    batch = {"token_ids": (token_ids * mask).astype("int32"), "padding_mask": mask.astype("int32")}
    for name in getattr(model, "input", {}):
        batch.setdefault(name, np.zeros_like(batch["token_ids"]))
    if model is not None and "padding_mask" not in model.input:  # what ESM knows by its ids
        del batch["padding_mask"]
    return batch


def outputs(model, batch):
    """The model called as it is now, past anything compiled earlier."""
    return _of_tokens(model(batch))


def _of_tokens(result):
    if isinstance(result, dict):  # of Bert's backbone; of Whisper's
        names = ("sequence_output", "encoder_sequence_output")
        result = next(result[name] for name in names if name in result)
    return to_numpy(result).astype("float32")


def forward(model):
    """As `outputs`, for many batches of one shape: compiled now where the backend compiles."""
    call = graph(lambda batch: model(batch))
    return lambda batch: _of_tokens(
        call({name: ops.convert_to_tensor(array) for name, array in batch.items()})
    )


def values(model):
    """Weights by their paths."""
    return {weight.path: to_numpy(weight.value) for weight in model.weights}


def gemma_proto(texts, **options):
    """A SentencePiece model with Gemma's special tokens, learned on texts."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="BPE",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        unk_piece="<unk>",
        minloglevel=2,
        **options,
    )
    return model.getvalue()
