"""Causal language models that generate with a state of constant size."""

from typing import Any

import keras
from keras import ops
from keras_hub.models import Gemma3CausalLM, GemmaCausalLM
from keras_hub.src.utils.tensor_utils import any_equal

from keras_darkformer.compiling import compile_anew
from keras_darkformer.hub.attention import ATTEND, PAD, WRITE, DarkCachedAttention
from keras_darkformer.hub.backbone import (
    DarkBackbone,
    DarkGemma3Backbone,
    DarkGemmaBackbone,
    PresetLoading,
)
from keras_darkformer.hub.options import DarkOptions


class DarkCausalLM(PresetLoading):
    """Turns a KerasHub causal LM, its base class in Python, dark.

    Generation carries a tuple with one entry a layer: a recurrent state for
    linear layers, whose size does not depend on the length, and the stock
    key/value cache for layers left exact.
    """

    backbone_cls: type[DarkBackbone]

    @classmethod
    def take_over(cls, model: Any, options: DarkOptions) -> Any:
        """Makes a stock model and its backbone dark, in place, and returns it."""
        cls.backbone_cls.take_over(model.backbone, options)
        model.__class__ = cls
        compile_anew(model)
        return model

    def call_with_cache(
        self, token_ids: Any, cache: Any, cache_update_index: Any, padding_mask: Any = None
    ) -> Any:
        """Logits of tokens that follow those in the cache.

        Args:
            token_ids: int tensor of shape `(b, t)`.
            cache: tuple with one entry a layer, from `get_initial_cache` or an
                earlier call.
            cache_update_index: int or int tensor, the position of the first
                of these tokens.
            padding_mask: `(b, t)`, for linear layers only: 0 for padding, 1
                for tokens that are attended to but left out of the new
                states, 2 for tokens that enter them. `None` for all to enter.

        Returns:
            `(logits, hidden_states, cache)`.
        """
        hidden_states, cache = self._run_layers(token_ids, cache, cache_update_index, padding_mask)
        logits = self.backbone.token_embedding(hidden_states, reverse=True)
        return logits, hidden_states, cache

    def _run_layers(
        self, token_ids: Any, cache: Any, cache_update_index: Any, padding_mask: Any
    ) -> Any:
        backbone = self.backbone
        x = backbone.token_embedding(token_ids)
        x = x * ops.cast(ops.sqrt(backbone.hidden_dim), x.dtype)
        entries = []
        for block, entry in zip(backbone.transformer_layers, cache, strict=True):
            x, entry = block(
                x,
                # Exact layers need none: in a row padded behind, the causal
                # mask hides padding until it is overwritten.
                padding_mask=padding_mask if _is_linear(block.attention) else None,
                cache=entry,
                cache_update_index=cache_update_index,
            )
            entries.append(entry)
        return backbone.layer_norm(x), tuple(entries)

    def get_initial_cache(self, batch_size: Any, max_length: Any) -> Any:
        """What generation carries before the first token.

        Args:
            batch_size: int, or scalar int tensor.
            max_length: int, the longest sequence layers left exact can hold.

        Returns:
            A tuple with one entry a layer. A linear layer's is a tuple of
            float32 tensors `(b, k, m, h)`, `(b, k, m)`, `(b, k)`.
        """
        return tuple(
            block.attention.feature_map.get_initial_state(batch_size)
            if _is_linear(block.attention)
            else self._empty_key_value_cache(batch_size, max_length)
            for block in self.backbone.transformer_layers
        )

    def _empty_key_value_cache(self, batch_size: Any, max_length: Any) -> Any:
        shape = (batch_size, 2, max_length, self.backbone.num_key_value_heads)
        return ops.zeros((*shape, self.backbone.head_dim), dtype=self.compute_dtype)

    def _prefill_mask(self, padding_mask: Any, start: Any) -> Any:
        """Codes of a padded batch of prompts from which sampling goes on at `start`.

        The sampler begins at the shortest prompt, `start = min(length)`, with
        the token before it, and feeds every later prompt token again. A
        key/value cache may be written twice, a state may not: only positions
        before `start - 1` enter it now.
        """
        position = ops.arange(ops.shape(padding_mask)[1], dtype="int32")
        real = ops.where(position[None, :] < start - 1, WRITE, ATTEND)
        return ops.where(ops.cast(padding_mask, "bool"), real, PAD)

    def _build_cache(self, token_ids: Any, padding_mask: Any, start: Any) -> Any:
        batch_size, max_length = ops.shape(token_ids)[:2]
        cache = self.get_initial_cache(batch_size, max_length)
        return self._run_layers(token_ids, cache, 0, self._prefill_mask(padding_mask, start))

    def generate_step(self, inputs: Any, stop_token_ids: Any = None) -> Any:
        """Generates for one batch: the compiled part of `generate`.

        Args:
            inputs: dict of `token_ids` and `padding_mask`, `(b, max_length)`,
                prompts padded behind.
            stop_token_ids: tuple of ids that end a row, or `None`.

        Returns:
            The dict, filled.
        """
        token_ids, padding_mask = inputs["token_ids"], ops.cast(inputs["padding_mask"], "bool")
        start = ops.min(ops.sum(ops.cast(padding_mask, "int32"), axis=-1))
        hidden_states, cache = self._build_cache(token_ids, padding_mask, start)

        def next_token(prompt: Any, cache: Any, index: Any) -> Any:
            batch_size = ops.shape(prompt)[0]
            last = ops.slice(prompt, [0, index - 1], [batch_size, 1])
            logits, hidden_states, cache = self.call_with_cache(last, cache, index - 1)
            return ops.squeeze(logits, axis=1), ops.squeeze(hidden_states, axis=1), cache

        token_ids = self.sampler(
            next=next_token,
            prompt=token_ids,
            cache=cache,
            index=start,
            mask=padding_mask,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden_states,
            model=self,
        )
        if stop_token_ids is None:
            return {"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids, dtype="bool")}
        # Real tokens: everything up to the first generated stop token.
        stops = any_equal(token_ids, stop_token_ids, ops.logical_not(padding_mask))
        stops = ops.cast(stops, "int32")
        behind_stop = ops.cumsum(stops, axis=-1) - stops
        return {"token_ids": token_ids, "padding_mask": ops.equal(behind_stop, 0)}


def _is_linear(attention: Any) -> bool:
    return isinstance(attention, DarkCachedAttention) and attention.attention_mode == "linear"


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkGemmaCausalLM(DarkCausalLM, GemmaCausalLM):
    """Gemma 1 or 2 with linear attention, trained and used as the stock model.

    Args:
        backbone: a `DarkGemmaBackbone`.
        preprocessor: a `keras_hub.models.GemmaCausalLMPreprocessor` or `None`.
        **kwargs: as for `keras_hub.models.GemmaCausalLM`.

    Example:

        model = keras_darkformer.hub.DarkGemmaCausalLM.from_preset("gemma_2b_en")
        model.compile(optimizer=keras.optimizers.AdamW(1e-4), sampler="greedy")
        model.fit(texts, batch_size=2)
        model.generate("Linear attention", max_length=4096)
        model.save_to_preset("dark_gemma")
    """

    stock_cls = GemmaCausalLM
    backbone_cls = DarkGemmaBackbone


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkGemma3CausalLM(DarkCausalLM, Gemma3CausalLM):
    """Gemma 3 (text) with linear attention in its global layers.

    Args:
        backbone: a `DarkGemma3Backbone`.
        preprocessor: a `keras_hub.models.Gemma3CausalLMPreprocessor` or `None`.
        **kwargs: as for `keras_hub.models.Gemma3CausalLM`.

    Example:

        model = keras_darkformer.hub.DarkGemma3CausalLM.from_preset("gemma3_1b")
        model.generate("Linear attention", max_length=4096)
    """

    stock_cls = Gemma3CausalLM
    backbone_cls = DarkGemma3Backbone

    def _empty_key_value_cache(self, batch_size: Any, max_length: Any) -> Any:
        backbone = self.backbone
        shape = (batch_size, max_length, backbone.num_key_value_heads, backbone.head_dim)
        return tuple(ops.zeros(shape, dtype=self.compute_dtype) for _ in range(2))
