"""The KerasHub families that can be converted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras import ops
from keras.layers import MultiHeadAttention
from keras_hub import models
from keras_hub.layers import CachedMultiHeadAttention, TransformerDecoder, TransformerEncoder

from keras_darkformer.hub import attention as dark
from keras_darkformer.hub import private
from keras_darkformer.hub.family import Family, PairwiseRotary
from keras_darkformer.hub.towers import Tower
from keras_darkformer.types import Layer, Model, Tensor


def _scaled_embedding(backbone: Model, token_ids: Tensor, start_index: Tensor) -> Tensor:
    x = backbone.token_embedding(token_ids)
    return x * ops.cast(ops.sqrt(backbone.hidden_dim), x.dtype)


def _gpt2_embedding(backbone: Model, token_ids: Tensor, start_index: Tensor) -> Tensor:
    tokens = backbone.token_embedding(token_ids)
    positions = backbone.position_embedding(tokens, start_index=start_index)
    return backbone.embeddings_dropout(backbone.embeddings_add((tokens, positions)))


def _opt_embedding(backbone: Model, token_ids: Tensor, start_index: Tensor) -> Tensor:
    return backbone.embeddings(token_ids, start_index=start_index)


def _gpt_neo_x_embedding(backbone: Model, token_ids: Tensor, start_index: Tensor) -> Tensor:
    return backbone.embeddings_dropout(backbone.token_embedding(token_ids))


def _window_by_switch(attention: Layer) -> int | None:
    return attention.sliding_window_size if attention.use_sliding_window_attention else None


def _window_by_size(attention: Layer) -> int | None:
    return attention.sliding_window_size


def _window_of_mistral(attention: Layer) -> int | None:
    return private.part(attention, "sliding_window")


def _refuse_gemma3(backbone: Model) -> str | None:
    if not backbone.text_only_model:
        return (
            "This Gemma 3 has a vision encoder: its image tokens attend to each other in both "
            "directions, which causal linear attention can't express. Text-only Gemma 3 models "
            "can be converted."
        )
    if backbone.use_bidirectional_attention:
        return (
            "This Gemma 3 attends in both directions (`use_bidirectional_attention=True`, an "
            "embedding model). Only causal Gemma 3 models can be converted."
        )
    return None


def _refuse_esm(backbone: Model) -> str | None:
    if backbone.position_embedding_type == "rotary":
        return None
    return (
        "This ESM has absolute positions (ESM-1). Its layers compute attention in one step, which "
        "leaves no place for a geometry. ESM-2, with rotary positions, can be converted."
    )


def _refuse_export_with_lora(backbone: Model) -> str | None:
    if any(getattr(layer, "lora_enabled", False) for layer in backbone._flatten_layers()):
        return "KerasHub's export of this family leaves LoRA out."
    return None


def _refuse_export_of_gemma(backbone: Model) -> str | None:
    if (reason := _refuse_export_with_lora(backbone)) is not None:
        return reason
    like_2b = backbone.num_key_value_heads == 1 and not backbone.use_post_attention_norm
    if like_2b and backbone.num_query_heads * backbone.head_dim == backbone.hidden_dim:
        return None
    return (
        "KerasHub's export is right only for models built like Gemma 1 2B. For others it mixes up "
        "heads, keeps only the first key/value head, and leaves out what Gemma 2 adds."
    )


_GEMMA: dict[str, Any] = private.GEMMA_BLOCK | {
    "window": _window_by_switch,
    "embed": _scaled_embedding,
}
_LLAMA: dict[str, Any] = private.LLAMA_BLOCK | {"dark_attention": dark.LlamaAttention}
_DECODER: dict[str, Any] = private.DECODER_BLOCK | {
    "dark_attention": dark.MultiHeadAttention,
}
_ENCODER: dict[str, Any] = private.ENCODER_BLOCK | {
    "block": TransformerEncoder,
    "attention": MultiHeadAttention,
    "dark_attention": dark.MultiHeadAttention,
    "causal": False,
}
_QWEN3: dict[str, Any] = _LLAMA | {"norms": private.QWEN3_NORMS, "window": _window_by_size}


def _causal_lm(
    name: str, block: type, attention: type, layout: Mapping[str, Any], **others: Any
) -> Family:
    """A family whose class names follow KerasHub's pattern."""
    return Family(
        name=name,
        backbone=getattr(models, f"{name}Backbone"),
        block=block,
        attention=attention,
        tasks={"CausalLM": getattr(models, f"{name}CausalLM")},
        **{**layout, **others},
    )


def _encoder(name: str, kinds: Sequence[str] = ("MaskedLM", "TextClassifier")) -> Family:
    return Family(
        name=name,
        backbone=getattr(models, f"{name}Backbone"),
        tasks={kind: getattr(models, f"{name}{kind}") for kind in kinds},
        **_ENCODER,
    )


FAMILIES = (
    _causal_lm(
        "Gemma",
        private.GemmaDecoderBlock,
        private.CachedGemmaAttention,
        _GEMMA,
        dark_attention=dark.DarkHubAttention,
        rotate=private.rotate_gemma,
        refuse_export=_refuse_export_of_gemma,
    ),
    _causal_lm(
        "Gemma3",
        private.Gemma3DecoderBlock,
        private.CachedGemma3Attention,
        _GEMMA,
        dark_attention=dark.DarkHubAttention,
        norms=private.GEMMA3_NORMS,
        paired_cache=True,
        refuse=_refuse_gemma3,
        refuse_export=_refuse_export_with_lora,
    ),
    _causal_lm("Llama", private.LlamaTransformerDecoder, private.LlamaAttention, _LLAMA),
    _causal_lm("Llama3", private.LlamaTransformerDecoder, private.LlamaAttention, _LLAMA),
    _causal_lm(
        "Mistral",
        private.MistralTransformerDecoder,
        private.CachedMistralAttention,
        _LLAMA,
        window=_window_of_mistral,
    ),
    _causal_lm(
        "Mixtral",
        private.MixtralTransformerDecoder,
        private.CachedMixtralAttention,
        _LLAMA,
        window=_window_of_mistral,
    ),
    _causal_lm(
        "Qwen",
        private.QwenTransformerDecoder,
        private.QwenAttention,
        _LLAMA,
        window=_window_by_switch,
    ),
    _causal_lm(
        "QwenMoe",
        private.QwenMoeTransformerDecoder,
        private.QwenMoeAttention,
        _LLAMA,
        window=_window_by_switch,
        mask_axis=-1,
    ),
    _causal_lm("Qwen3", private.Qwen3TransformerDecoder, private.Qwen3Attention, _QWEN3),
    _causal_lm(
        "Qwen3Moe",
        private.Qwen3MoeTransformerDecoder,
        private.Qwen3MoeAttention,
        _QWEN3,
        mask_axis=-1,
    ),
    _causal_lm(
        "Phi3",
        private.Phi3Decoder,
        private.Phi3Attention,
        private.PHI3_BLOCK,
        dark_attention=dark.LlamaAttention,
    ),
    _causal_lm(
        "SmolLM3",
        private.SmolLM3DecoderLayer,
        private.SmolLM3Attention,
        private.SMOLLM3_BLOCK,
        dark_attention=dark.SmolLM3Attention,
        rotates_all=False,
        rotate=private.rotate_smollm3,
        head_sizes=private.sizes_of_smollm3,
        output_norm="norm",
    ),
    _causal_lm(
        "GPT2", TransformerDecoder, CachedMultiHeadAttention, _DECODER, embed=_gpt2_embedding
    ),
    _causal_lm("OPT", TransformerDecoder, CachedMultiHeadAttention, _DECODER, embed=_opt_embedding),
    _causal_lm(
        "GPTNeoX",
        private.GPTNeoXDecoder,
        private.GPTNeoXAttention,
        private.GPT_NEO_X_BLOCK,
        dark_attention=dark.GPTNeoXAttention,
        rotates_all=False,
        rotate=private.rotate_gpt_neo_x,
        head_sizes=private.sizes_of_gpt_neo_x,
        embed=_gpt_neo_x_embedding,
    ),
    _encoder("Bert"),
    _encoder("Roberta"),
    _encoder("XLMRoberta"),
    _encoder("DistilBert"),
    _encoder("Electra", kinds=()),
    PairwiseRotary(
        name="ESM",
        backbone=models.ESMBackbone,
        block=private.ESMEncoder,
        attention=private.EsmSelfAttention,
        dark_attention=dark.EsmAttention,
        tasks={"MaskedPLM": models.ESMMaskedPLM, "ProteinClassifier": models.ESMProteinClassifier},
        causal=False,
        rotates_all=False,
        rotate=private.rotate_esm,
        head_sizes=private.sizes_of_esm,
        refuse=_refuse_esm,
        **private.ESM_BLOCK,
    ),
)

for _family in FAMILIES:
    _family.register_layers()


def _layer(name: str) -> Callable[[Any], list[Layer]]:
    return lambda backbone: [backbone.get_layer(name)]


def _blocks(name: str) -> Callable[[Any], list[Layer]]:
    return lambda backbone: list(getattr(backbone, name))


# The pooling heads of SigLIP, where a single query attends, and the decoders of Whisper and
# Moonshine stay as they are.
TOWERS = (
    Tower(
        "ViT",
        models.ViTBackbone,
        _layer("vit_encoder"),
        {"ImageClassifier": models.ViTImageClassifier},
    ),
    Tower(
        "DeiT",
        models.DeiTBackbone,
        _layer("deit_encoder"),
        {"ImageClassifier": models.DeiTImageClassifier},
    ),
    Tower("DINOV2", models.DINOV2Backbone, lambda backbone: [backbone.encoder]),
    Tower("CLIPVision", models.CLIPVisionEncoder, _blocks("encoder_layers")),
    Tower("CLIPText", models.CLIPTextEncoder, _blocks("encoder_layers"), causal=True),
    Tower("SigLIPVision", models.SigLIPVisionEncoder, _blocks("encoder_layers")),
    Tower("SigLIPText", models.SigLIPTextEncoder, _blocks("encoder_layers")),
    Tower("Whisper", models.WhisperBackbone, _blocks("encoder_transformer_layers")),
    Tower(
        "Moonshine",
        models.MoonshineBackbone,
        _blocks("encoder_blocks"),
        {"AudioToText": models.MoonshineAudioToText},
    ),
)

# Why other families can't be converted, by the prefix of their class names.
INEXPRESSIBLE = {
    "Bloom": "Its logits have linear position biases (ALiBi).",
    "Falcon": "Its logits have linear position biases (ALiBi).",
    "T5Gemma": "It is an encoder-decoder with cross-attention.",
    "T5": "Its logits have learned relative position biases.",
    "Deberta": "Its logits have products of content and relative position.",
    "XLNet": "Its logits have products of content and relative position.",
    "GptOss": "Its softmax has learned attention sinks.",
    "Gemma3n": "Its layers share keys and values.",
    "Gemma4": "Its layers share keys and values.",
    "PaliGemma": "Its image tokens attend to each other in both directions.",
    "Bart": "It is an encoder-decoder with cross-attention; only self-attention is replaced.",
    "Albert": "Its layers share weights: one geometry can't fit them all.",
    "SwinTransformer": "It attends within windows, with learned relative position biases.",
    "SAM": "Its logits have learned relative position biases.",
    "ViTDet": "Its logits have learned relative position biases, and most layers use windows.",
    "MiT": "Its queries attend to a reduced set of keys.",
    "DINOV3": "Its queries and keys are rotated by two-dimensional positions.",
    "RoformerV2": "Its layers compute attention in one step, with no place for a geometry.",
    "Qwen3_5": "Most of its layers have linear attention already.",
    "RWKV7": "It has no softmax attention.",
    "FNet": "It has no softmax attention.",
}
