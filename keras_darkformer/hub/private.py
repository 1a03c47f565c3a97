"""All private names of KerasHub that are used, checked when this module is imported.

KerasHub has no public way to replace attention, so conversion reaches into its layers. A KerasHub
with other internals is refused here, by version, rather than converted wrongly.
"""

import importlib.metadata
import inspect
from typing import Any

import keras
import keras_hub
from keras import ops

from keras_darkformer.compiling import left_out
from keras_darkformer.types import Layer, Tensor

WORKS_WITH = "keras-hub>=0.32,<0.33"

try:
    from keras_hub.src.layers.modeling.transformer_decoder import TransformerDecoder
    from keras_hub.src.models.esm.esm_attention import EsmSelfAttention
    from keras_hub.src.models.esm.esm_encoder import ESMEncoder
    from keras_hub.src.models.gemma.gemma_attention import CachedGemmaAttention
    from keras_hub.src.models.gemma.gemma_decoder_block import GemmaDecoderBlock
    from keras_hub.src.models.gemma3.gemma3_attention import CachedGemma3Attention
    from keras_hub.src.models.gemma3.gemma3_decoder_block import Gemma3DecoderBlock
    from keras_hub.src.models.gpt_neo_x.gpt_neo_x_attention import GPTNeoXAttention
    from keras_hub.src.models.gpt_neo_x.gpt_neo_x_decoder import GPTNeoXDecoder
    from keras_hub.src.models.llama.llama_attention import LlamaAttention
    from keras_hub.src.models.llama.llama_decoder import LlamaTransformerDecoder
    from keras_hub.src.models.mistral.mistral_attention import CachedMistralAttention
    from keras_hub.src.models.mistral.mistral_transformer_decoder import MistralTransformerDecoder
    from keras_hub.src.models.mixtral.mixtral_attention import CachedMixtralAttention
    from keras_hub.src.models.mixtral.mixtral_decoder import MixtralTransformerDecoder
    from keras_hub.src.models.moonshine.moonshine_multi_head_attention import (
        MoonshineMultiHeadAttention,
        _apply_rotary_pos_emb,
    )
    from keras_hub.src.models.phi3.phi3_attention import Phi3Attention
    from keras_hub.src.models.phi3.phi3_decoder import Phi3Decoder
    from keras_hub.src.models.qwen.qwen_attention import QwenAttention
    from keras_hub.src.models.qwen.qwen_decoder import QwenTransformerDecoder
    from keras_hub.src.models.qwen3.qwen3_attention import Qwen3Attention
    from keras_hub.src.models.qwen3.qwen3_decoder import Qwen3TransformerDecoder
    from keras_hub.src.models.qwen3_moe.qwen3_moe_attention import Qwen3MoeAttention
    from keras_hub.src.models.qwen3_moe.qwen3_moe_decoder import Qwen3MoeTransformerDecoder
    from keras_hub.src.models.qwen_moe.qwen_moe_attention import QwenMoeAttention
    from keras_hub.src.models.qwen_moe.qwen_moe_decoder import QwenMoeTransformerDecoder
    from keras_hub.src.models.smollm3.smollm3_layers import SmolLM3Attention, SmolLM3DecoderLayer
    from keras_hub.src.models.smollm3.smollm3_utils import apply_rotary_pos_single
    from keras_hub.src.models.whisper.whisper_cached_multi_head_attention import (
        WhisperCachedMultiHeadAttention,
    )
    from keras_hub.src.utils.preset_utils import (
        TASK_CONFIG_FILE,
        check_config_class,
        check_file_exists,
        get_preset_loader,
        load_json,
    )
    from keras_hub.src.utils.tensor_utils import any_equal
    from keras_hub.src.vllm.context import get_vllm_context
except ImportError as error:
    raise ImportError(
        f"keras_darkformer.hub is made for {WORKS_WITH} and does not know the internals of the "
        f"installed keras-hub {importlib.metadata.version('keras-hub')}: {error}"
    ) from error

__all__ = [
    "CachedGemma3Attention",
    "CachedGemmaAttention",
    "CachedMistralAttention",
    "CachedMixtralAttention",
    "ESMEncoder",
    "EsmSelfAttention",
    "GPTNeoXAttention",
    "GPTNeoXDecoder",
    "Gemma3DecoderBlock",
    "GemmaDecoderBlock",
    "LlamaAttention",
    "LlamaTransformerDecoder",
    "MistralTransformerDecoder",
    "MixtralTransformerDecoder",
    "MoonshineMultiHeadAttention",
    "Phi3Attention",
    "Phi3Decoder",
    "Qwen3Attention",
    "Qwen3MoeAttention",
    "Qwen3MoeTransformerDecoder",
    "Qwen3TransformerDecoder",
    "QwenAttention",
    "QwenMoeAttention",
    "QwenMoeTransformerDecoder",
    "QwenTransformerDecoder",
    "SmolLM3Attention",
    "SmolLM3DecoderLayer",
    "WhisperCachedMultiHeadAttention",
    "any_equal",
    "get_preset_loader",
]


def task_class(preset: str) -> Any:
    """The class of the task that a preset holds; `None` if it holds only a backbone."""
    if not check_file_exists(preset, TASK_CONFIG_FILE):
        return None
    return check_config_class(load_json(preset, TASK_CONFIG_FILE))


# How blocks of each kind hold and call their attention: fields of `Family`.
GEMMA_BLOCK: dict[str, Any] = {
    "slot": "attention",
    "rotary": "rope_layer",
    "padding_argument": "padding_mask",
    "cache_argument": "cache",
    "mask_method": "_compute_attention_mask",
    "kernel_heads_axis": 0,
}
LLAMA_BLOCK: dict[str, Any] = {
    "slot": "_self_attention_layer",
    "rotary": "rotary_embedding_layer",
    "padding_argument": "decoder_padding_mask",
    "cache_argument": "self_attention_cache",
    "mask_method": "_compute_self_attention_mask",
}
PHI3_BLOCK = LLAMA_BLOCK | {"slot": "attention", "cache_argument": "attention_cache"}
SMOLLM3_BLOCK = LLAMA_BLOCK | {"slot": "self_attn", "rotary": "rotary_embedding"}
DECODER_BLOCK = LLAMA_BLOCK | {"rotary": None}
GPT_NEO_X_BLOCK = LLAMA_BLOCK
ESM_BLOCK = LLAMA_BLOCK | {"slot": "attention_layer", "padding_argument": "attention_mask"}
ESM_BLOCK |= {"mask_method": None}
ENCODER_BLOCK = DECODER_BLOCK | {"padding_argument": "padding_mask", "mask_method": None}
GEMMA3_NORMS = ("query_norm", "key_norm")
QWEN3_NORMS = ("_query_dense_layer_norm", "_key_dense_layer_norm")
# Names of the projections in SmolLM 3 and ESM, and of the dropout in GPT-NeoX.
_SHORT = {
    "query_dense": ("q_proj", "q_dense"),
    "key_dense": ("k_proj", "k_dense"),
    "value_dense": ("v_proj", "v_dense"),
    "output_dense": ("o_proj", "o_dense"),
    "dropout_layer": ("_attn_dropout_layer",),
}


def part(layer: Layer, name: str) -> Any:
    """A layer's attribute, under its public name or one of KerasHub's private ones."""
    names = (name, f"_{name}", *_SHORT.get(name, ()))
    return getattr(layer, next((x for x in names if hasattr(layer, x)), name))


def rotate_gemma(attention: Layer, x: Tensor, start_index: Tensor) -> Tensor:
    """The rotary embedding of Gemma 1 and 2, which also reorders coordinates."""
    return attention._apply_rope(x, start_index)


def rotate_smollm3(attention: Layer, x: Tensor, start_index: Tensor) -> Tensor:
    """The rotary embedding of SmolLM 3, whose layer only gives the angles."""
    cos, sin = attention.rotary_embedding(x, start_index=start_index)
    return apply_rotary_pos_single(x, cos, sin, expansion_axis=2)


def sizes_of_smollm3(attention: Layer) -> tuple[int, int, int]:
    """Head sizes of SmolLM 3, which the shapes of its flat projections do not show."""
    return attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim


def sizes_of_gpt_neo_x(attention: Layer) -> tuple[int, int, int]:
    """Head sizes of GPT-NeoX, which has one projection to queries, keys and values."""
    return attention.num_heads, attention.num_heads, attention.attn_head_size


def sizes_of_esm(attention: Layer) -> tuple[int, int, int]:
    """Head sizes of ESM, which the shapes of its flat projections do not show."""
    return attention.heads, attention.heads, attention.head_size


def rotate_gpt_neo_x(attention: Layer, x: Tensor, start_index: Tensor) -> Tensor:
    """The rotary embedding of GPT-NeoX, which rotates the first coordinates only."""
    size = attention.rotary_dim
    rotated = attention.rotary_embedding_layer(x[..., :size], start_index=start_index)
    return ops.concatenate((rotated, x[..., size:]), axis=-1)


def rotate_esm(attention: Layer, x: Tensor, start_index: Tensor) -> Tensor:
    """The rotary embedding of ESM, whose layer always starts at position 0."""
    rotary, size = attention.rotary_embedding_layer, x.shape[-1]
    frequency = rotary.scaling_factor / (
        rotary.max_wavelength ** (ops.arange(0, size, 2, dtype=x.dtype) / size)
    )
    position = ops.arange(ops.shape(x)[1], dtype=x.dtype) + ops.cast(start_index, x.dtype)
    angle = ops.outer(position, frequency)
    angle = ops.concatenate((angle, angle), axis=-1)[None, :, None, :]
    return rotary.apply_rotary_pos_emb(x, ops.cos(angle), ops.sin(angle))


def rotate_moonshine(x: Tensor, angles: Tensor) -> Tensor:
    """The rotary embedding of Moonshine, by angles `(t, r)` that its backbone computes."""
    return _apply_rotary_pos_emb(x, angles)


def forgotten(stock_cls: Any, backbone: Layer, config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a stock backbone's constructor that its config leaves out.

    Llama's config leaves out `tie_word_embeddings`: without it a loaded model has an output layer
    of its own, with random weights. QwenMoe's leaves out how much its routers add to the loss. Only
    Mixtral's blocks know what its config leaves out.
    """
    found: dict[str, Any] = {}
    for name in left_out(stock_cls, config):
        for holder in (backbone, *getattr(backbone, "transformer_layers", ())):
            if hasattr(holder, name):
                found.setdefault(name, getattr(holder, name))
    return found


def layer_config(layer: Layer, stock_cls: Any) -> dict[str, Any]:
    """The config of a stock block or attention layer, with what KerasHub's config leaves out.

    Raises:
        ValueError: if the layer does not keep an argument it was made with.
    """
    # Those of Llama read an attribute that they do not have.
    broken = stock_cls in (LlamaTransformerDecoder, LlamaAttention)
    config = keras.layers.Layer.get_config(layer) if broken else stock_cls.get_config(layer)
    if stock_cls is GPTNeoXDecoder:  # which its constructor does not take
        config.pop("decoder_sequence_shape")
    kept = _kept_by_smollm3(layer) if stock_cls is SmolLM3DecoderLayer else {}
    for name in left_out(stock_cls, config):
        try:
            value = kept[name] if name in kept else part(layer, name)
        except AttributeError as error:
            raise ValueError(
                f"{layer.name!r} can't be saved by itself: {stock_cls.__name__} does not keep the "
                f"`{name}` it was made with. Save the KerasHub model that holds it."
            ) from error
        config[name] = keras.saving.serialize_keras_object(value)
    return config


def _kept_by_smollm3(block: Layer) -> dict[str, Any]:
    """Arguments of a SmolLM 3 block that only the layers in it keep."""
    attention = inspect.signature(SmolLM3Attention.__init__).parameters
    return {
        **{name: getattr(block.self_attn, name, None) for name in attention},
        **{name: getattr(block.mlp, name) for name in ("intermediate_size", "mlp_bias")},
        "layer_norm_epsilon": block.input_layernorm.epsilon,
    }


def copy_lora_facts(backbone: Layer, other: Layer) -> None:
    """Copies what a backbone knows about LoRA in its layers to another one."""
    for name in ("_lora_enabled_layers", "_lora_rank"):
        if hasattr(backbone, name):
            setattr(other, name, getattr(backbone, name))


def renumbered_lora_layers(backbone: Layer) -> list[int] | None:
    """Indices of the layers whose LoRA was enabled before the conversion; `None` without LoRA.

    The stock backbone stores their indices among all layers with weights, which feature maps shift.
    """
    if not getattr(backbone, "_lora_enabled_layers", None):
        return None
    layers = [x for x in backbone._flatten_layers(include_self=False) if x.weights]
    return [index for index, x in enumerate(layers) if getattr(x, "lora_enabled", False)]


def refuse_vllm(attention: Layer) -> None:
    """Raises an error if KerasHub serves the model through vLLM, which bypasses its attention."""
    if get_vllm_context() is not None:
        raise NotImplementedError(
            f"{attention.name!r} has dark attention, which KerasHub's vLLM serving can't compute: "
            "its paged attention is softmax. Serve the model it was converted from, or generate "
            "with `generate` or `keras_darkformer.hub.Stream`."
        )


def any_stop(token_ids: Tensor, stop_token_ids: Any, padding_mask: Tensor) -> Tensor:
    """Which tokens after the prompt end a row."""
    return any_equal(token_ids, stop_token_ids, ops.logical_not(padding_mask))


def _check() -> None:
    """Raises an ImportError unless KerasHub has all methods that are overridden."""
    llama_like = (
        (LlamaAttention, LlamaTransformerDecoder),
        (CachedMistralAttention, MistralTransformerDecoder),
        (CachedMixtralAttention, MixtralTransformerDecoder),
        (QwenAttention, QwenTransformerDecoder),
        (QwenMoeAttention, QwenMoeTransformerDecoder),
        (Qwen3Attention, Qwen3TransformerDecoder),
        (Qwen3MoeAttention, Qwen3MoeTransformerDecoder),
        (Phi3Attention, Phi3Decoder),
        (SmolLM3Attention, SmolLM3DecoderLayer),
        (GPTNeoXAttention, GPTNeoXDecoder),
        (keras_hub.layers.CachedMultiHeadAttention, TransformerDecoder),
    )
    gemma_like = (
        (CachedGemmaAttention, GemmaDecoderBlock),
        (CachedGemma3Attention, Gemma3DecoderBlock),
    )
    expected = [(CachedGemmaAttention, "_apply_rope")]
    for layout, pairs in ((LLAMA_BLOCK, llama_like), (GEMMA_BLOCK, gemma_like)):
        for attention, block in pairs:
            expected += [(attention, "_compute_attention"), (block, layout["mask_method"])]
    missing = [f"{cls.__name__}.{name}" for cls, name in expected if not hasattr(cls, name)]
    if missing:
        raise ImportError(
            f"keras_darkformer.hub is made for {WORKS_WITH}. The installed keras-hub "
            f"{importlib.metadata.version('keras-hub')} lacks {', '.join(missing)}."
        )


_check()
