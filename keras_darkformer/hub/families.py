"""The KerasHub families that can be converted: what conversion has to know of each."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from keras import ops
from keras.layers import MultiHeadAttention
from keras_hub import models
from keras_hub.layers import CachedMultiHeadAttention
from keras_hub.src.models.gemma.gemma_attention import CachedGemmaAttention
from keras_hub.src.models.gemma3.gemma3_attention import CachedGemma3Attention
from keras_hub.src.models.llama.llama_attention import LlamaAttention
from keras_hub.src.models.mistral.mistral_attention import CachedMistralAttention
from keras_hub.src.models.mixtral.mixtral_attention import CachedMixtralAttention
from keras_hub.src.models.phi3.phi3_attention import Phi3Attention
from keras_hub.src.models.qwen.qwen_attention import QwenAttention
from keras_hub.src.models.qwen3.qwen3_attention import Qwen3Attention
from keras_hub.src.models.qwen3_moe.qwen3_moe_attention import Qwen3MoeAttention
from keras_hub.src.models.qwen_moe.qwen_moe_attention import QwenMoeAttention

from keras_darkformer.hub import attention as dark


def _token_embedding(backbone: Any, token_ids: Any, start_index: Any) -> Any:
    return backbone.token_embedding(token_ids)


def _no_window(attention: Any) -> int | None:
    return None


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of one KerasHub family are put together.

    From each entry come `Dark{name}Attention`, `Dark{name}Backbone` and one
    class for each task.

    Attributes:
        name: as in the names of the family's classes.
        backbone: the stock backbone.
        attention: the stock attention layer of its blocks.
        dark_attention: what calls and builds it as the blocks do.
        tasks: stock task classes, by what follows the name in theirs.
        causal: whether tokens attend only to those before them.
        slot: a block's attribute that holds the attention layer.
        rotary: the attention layer's attribute that holds the rotary
            embedding, or `None` without one.
        norms: its attributes that norm queries and keys.
        window: the sliding window of an attention layer, or `None`.
        padding_argument: a block's call argument for the padding mask.
        cache_argument: a block's call argument for the cache; with
            `_update_index` behind, the one for the position.
        mask_method: a block's method that makes a mask of all pairs of tokens,
            or `None` if it hands on the padding mask as it is.
        mask_axis: where the block wants an axis of size 1 in a padding mask
            handed on instead, or `None`.
        embed: `embed(backbone, token_ids, start_index)`, what enters the first
            block.
        paired_cache: whether an exact layer's cache is a pair of keys and
            values `(b, s, k, h)`, or one tensor `(b, 2, s, k, h)`.
        kernel_heads_axis: the axis of the key projection's kernel that heads
            are along.
        refuse: says why a backbone can't be converted, or `None` if it can.
    """

    name: str
    backbone: type
    attention: type
    dark_attention: type[dark.DarkHubAttention] = dark.LlamaAttention
    tasks: Mapping[str, type] = dataclasses.field(default_factory=dict)
    causal: bool = True
    slot: str = "_self_attention_layer"
    rotary: str | None = "rotary_embedding_layer"
    norms: tuple[str, str] | None = None
    window: Callable[[Any], int | None] = _no_window
    padding_argument: str = "decoder_padding_mask"
    cache_argument: str = "self_attention_cache"
    mask_method: str | None = "_compute_self_attention_mask"
    mask_axis: int | None = None
    embed: Callable[[Any, Any, Any], Any] = _token_embedding
    paired_cache: bool = False
    kernel_heads_axis: int = 1
    refuse: Callable[[Any], str | None] = lambda backbone: None

    def attention_of(self, block: Any) -> Any:
        """A block's attention layer."""
        return getattr(block, self.slot)


def _scaled_embedding(backbone: Any, token_ids: Any, start_index: Any) -> Any:
    x = backbone.token_embedding(token_ids)
    return x * ops.cast(ops.sqrt(backbone.hidden_dim), x.dtype)


def _gpt2_embedding(backbone: Any, token_ids: Any, start_index: Any) -> Any:
    tokens = backbone.token_embedding(token_ids)
    positions = backbone.position_embedding(tokens, start_index=start_index)
    return backbone.embeddings_dropout(backbone.embeddings_add((tokens, positions)))


def _opt_embedding(backbone: Any, token_ids: Any, start_index: Any) -> Any:
    return backbone.embeddings(token_ids, start_index=start_index)


def _window_by_switch(attention: Any) -> int | None:
    return attention.sliding_window_size if attention.use_sliding_window_attention else None


def _window_by_size(attention: Any) -> int | None:
    return attention.sliding_window_size


def _window_of_mistral(attention: Any) -> int | None:
    return dark.part(attention, "sliding_window")


def _refuse_gemma3(backbone: Any) -> str | None:
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


_GEMMA: dict[str, Any] = {
    "slot": "attention",
    "rotary": "rope_layer",
    "window": _window_by_switch,
    "padding_argument": "padding_mask",
    "cache_argument": "cache",
    "mask_method": "_compute_attention_mask",
    "embed": _scaled_embedding,
    "kernel_heads_axis": 0,
}
_LEARNED_POSITIONS: dict[str, Any] = {
    "attention": CachedMultiHeadAttention,
    "dark_attention": dark.MultiHeadAttention,
    "rotary": None,
}
_ENCODER: dict[str, Any] = {
    "attention": MultiHeadAttention,
    "dark_attention": dark.MultiHeadAttention,
    "causal": False,
    "rotary": None,
    "padding_argument": "padding_mask",
    "mask_method": None,
}

FAMILIES = (
    Family(
        "Gemma",
        models.GemmaBackbone,
        CachedGemmaAttention,
        dark.GemmaAttention,
        tasks={"CausalLM": models.GemmaCausalLM},
        **_GEMMA,
    ),
    Family(
        "Gemma3",
        models.Gemma3Backbone,
        CachedGemma3Attention,
        dark.Gemma3Attention,
        tasks={"CausalLM": models.Gemma3CausalLM},
        norms=("query_norm", "key_norm"),
        paired_cache=True,
        refuse=_refuse_gemma3,
        **_GEMMA,
    ),
    Family(
        "Llama",
        models.LlamaBackbone,
        LlamaAttention,
        tasks={"CausalLM": models.LlamaCausalLM},
    ),
    Family(
        "Llama3",
        models.Llama3Backbone,
        LlamaAttention,
        tasks={"CausalLM": models.Llama3CausalLM},
    ),
    Family(
        "Mistral",
        models.MistralBackbone,
        CachedMistralAttention,
        tasks={"CausalLM": models.MistralCausalLM},
        window=_window_of_mistral,
    ),
    Family(
        "Mixtral",
        models.MixtralBackbone,
        CachedMixtralAttention,
        tasks={"CausalLM": models.MixtralCausalLM},
        window=_window_of_mistral,
    ),
    Family(
        "Qwen",
        models.QwenBackbone,
        QwenAttention,
        tasks={"CausalLM": models.QwenCausalLM},
        window=_window_by_switch,
    ),
    Family(
        "QwenMoe",
        models.QwenMoeBackbone,
        QwenMoeAttention,
        tasks={"CausalLM": models.QwenMoeCausalLM},
        window=_window_by_switch,
        mask_axis=-1,
    ),
    Family(
        "Qwen3",
        models.Qwen3Backbone,
        Qwen3Attention,
        tasks={"CausalLM": models.Qwen3CausalLM},
        norms=("_query_dense_layer_norm", "_key_dense_layer_norm"),
        window=_window_by_size,
    ),
    Family(
        "Qwen3Moe",
        models.Qwen3MoeBackbone,
        Qwen3MoeAttention,
        tasks={"CausalLM": models.Qwen3MoeCausalLM},
        norms=("_query_dense_layer_norm", "_key_dense_layer_norm"),
        window=_window_by_size,
        mask_axis=-1,
    ),
    Family(
        "Phi3",
        models.Phi3Backbone,
        Phi3Attention,
        tasks={"CausalLM": models.Phi3CausalLM},
        slot="attention",
        cache_argument="attention_cache",
    ),
    Family(
        "GPT2",
        models.GPT2Backbone,
        tasks={"CausalLM": models.GPT2CausalLM},
        embed=_gpt2_embedding,
        **_LEARNED_POSITIONS,
    ),
    Family(
        "OPT",
        models.OPTBackbone,
        tasks={"CausalLM": models.OPTCausalLM},
        embed=_opt_embedding,
        **_LEARNED_POSITIONS,
    ),
    Family(
        "Bert",
        models.BertBackbone,
        tasks={"MaskedLM": models.BertMaskedLM, "TextClassifier": models.BertTextClassifier},
        **_ENCODER,
    ),
    Family(
        "Roberta",
        models.RobertaBackbone,
        tasks={"MaskedLM": models.RobertaMaskedLM, "TextClassifier": models.RobertaTextClassifier},
        **_ENCODER,
    ),
    Family(
        "DistilBert",
        models.DistilBertBackbone,
        tasks={
            "MaskedLM": models.DistilBertMaskedLM,
            "TextClassifier": models.DistilBertTextClassifier,
        },
        **_ENCODER,
    ),
)

# Why others can't be converted, by how the names of their classes begin.
INEXPRESSIBLE = {
    "Bloom": "Its logits have linear position biases (ALiBi).",
    "Falcon": "Its logits have linear position biases (ALiBi).",
    "T5": "Its logits have learned relative position biases.",
    "Deberta": "Its logits have products of content and relative position.",
    "XLNet": "Its logits have products of content and relative position.",
    "GptOss": "Its softmax has learned attention sinks.",
    "Gemma3n": "Its layers share keys and values.",
    "Gemma4": "Its layers share keys and values.",
    "PaliGemma": "Its image tokens attend to each other in both directions.",
    "Bart": "It is an encoder and a decoder that attends to it; only self-attention is replaced.",
    "Albert": "Its layers share weights: one geometry can't fit them all.",
    "Qwen3_5": "Most of its layers have linear attention already.",
    "RWKV7": "It has no softmax attention.",
    "FNet": "It has no softmax attention.",
}
