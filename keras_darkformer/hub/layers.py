"""KerasHub's `CachedMultiHeadAttention` and `TransformerDecoder` in users' own models."""

import dataclasses
from typing import Any

from keras_hub.layers import CachedMultiHeadAttention, TransformerDecoder

from keras_darkformer.anymodel.attention import DarkKerasAttention, know_attention, named
from keras_darkformer.anymodel.holder import know_block
from keras_darkformer.hub.private import (
    MoonshineMultiHeadAttention,
    WhisperCachedMultiHeadAttention,
    refuse_vllm,
    rotate_moonshine,
)
from keras_darkformer.layers.masks import CausalMask
from keras_darkformer.ops.state import AttentionState, StateShapes
from keras_darkformer.surgery.become import Mixin
from keras_darkformer.surgery.dark_layer import dark_layer_cls
from keras_darkformer.types import Tensor


class DarkCachedAttention(DarkKerasAttention):
    """Mixin that makes a `CachedMultiHeadAttention` dark.

    In linear mode its `cache` is a recurrent state, to which every token is added once.
    """

    stock_cls: Any

    def call(  # type: ignore[override]
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor = None,
        attention_mask: Tensor = None,
        cache: Any = None,
        cache_update_index: Tensor = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
    ) -> Tensor:
        """The stock layer's call.

        Args:
            query: `(b, t, d)`.
            value: `(b, s, d')`.
            key: `(b, s, d'')`; `None` to use `value`.
            attention_mask: bool, `(b, 1, s)` or `(b, t, s)`, or a `CausalMask`. In linear mode it
                must be a causal or padding mask.
            cache: in exact mode keys and values `(b, 2, s, n, h)`. In linear mode the state of the
                preceding tokens, at first from `get_initial_state`; each token attends to these and
                to the new tokens up to itself.
            cache_update_index: position of the first token. Not used with a state.
            return_attention_scores: bool. Exact mode only.
            training: bool. Turns dropout on; linear mode drops whole tokens.

        Returns:
            The output `(b, t, d)`; with a cache, also the next cache.

        Raises:
            ValueError: for what linear attention can't express, for a cache that is not a state,
                and for a cache in cross-attention. The message gives the layer's path.
        """
        refuse_vllm(self)
        if not self.is_linear and (self.observer is None or cache is not None):
            return self.stock_cls.call(
                self,
                query,
                value,
                key=key,
                attention_mask=attention_mask,
                cache=cache,
                cache_update_index=cache_update_index,
                return_attention_scores=return_attention_scores,
                training=training,
            )
        state = None
        with named(self):
            if cache is not None:
                state = self._checked_state(cache, query, value)
            causal, key_mask, pairs = self.read_masks(
                attention_mask,
                state is not None,
                return_attention_scores,
                (query.shape[1], value.shape[1]),
            )
        heads = self._project(query, value, key, key_mask, pairs, causal, training)
        output, state = self.attend(
            heads, training=training, initial_state=state, return_state=state is not None
        )
        output = self._output_dense(output)
        return output if state is None else (output, state)

    @property
    def _state_shapes(self) -> StateShapes:
        return self.feature_map.state_shapes(self._value_dim, dtype=self.compute_dtype)

    def get_initial_state(self, batch_size: Tensor) -> AttentionState:
        """The state before the first token, for `cache`.

        Args:
            batch_size: int, or scalar int tensor.

        Returns:
            Named tuples of float32 tensors of constant shape, batch first; see `ops.initial_state`.
        """
        return self._state_shapes.zeros(batch_size)

    def _checked_state(self, cache: Any, query: Tensor, value: Tensor) -> AttentionState:
        if value is not query:
            raise ValueError(
                "In linear mode `cache` is for self-attention: `query` and `value` must be the "
                "same tensor. To generate with a cache, leave cross-attention exact with `layers=`."
            )
        try:
            return self._state_shapes.check(cache, query.shape[0])
        except ValueError as error:
            raise ValueError(
                "In linear mode `cache` is a recurrent state, not keys and values. Start from this "
                f"layer's `get_initial_state(batch_size)`, and feed every token once. {error}"
            ) from error


class DarkMoonshineAttention(DarkCachedAttention):
    """Mixin that makes the attention layer of Moonshine dark."""

    def call(  # type: ignore[override]
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor,
        rotary_embedding: Tensor = None,
        attention_mask: Tensor = None,
        cache: Any = None,
        cache_update_index: Tensor = None,
        training: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The stock layer's call. Linear mode takes no cache: it is for the encoder.

        Args:
            query: `(b, t, d)`.
            value, key: `(b, s, d)`.
            rotary_embedding: angles `(t, r)` of the positions, or `None`.
            attention_mask: bool, `(b, s)` or as for `DarkCachedAttention`.
            cache, cache_update_index: exact mode only.
            training: bool. Turns dropout on; linear mode drops whole tokens.
            **kwargs: passed on in exact mode, not used in linear mode.
        """
        if not self.is_linear and (self.observer is None or cache is not None):
            return self.stock_cls.call(
                self,
                query,
                value,
                key,
                rotary_embedding=rotary_embedding,
                attention_mask=attention_mask,
                cache=cache,
                cache_update_index=cache_update_index,
                training=training,
                **kwargs,
            )
        with named(self):
            if cache is not None:
                raise ValueError("In linear mode it takes no `cache`: only encoders are converted.")
            if attention_mask is not None and len(attention_mask.shape) == 2:
                attention_mask = attention_mask[:, None, :]
            lengths = (query.shape[1], value.shape[1])
            causal, key_mask, pairs = self.read_masks(attention_mask, False, lengths=lengths)
        heads = self._project(query, value, key, key_mask, pairs, causal, training)
        if rotary_embedding is not None:

            def rotate(x: Tensor) -> Tensor:
                return rotate_moonshine(x, rotary_embedding)

            heads = dataclasses.replace(heads, rotate_query=rotate)
            if self.apply_rotary_embedding:
                heads = dataclasses.replace(heads, rotate_key=rotate)
        return self._output_dense(self.attend(heads, training=training)[0])


class DecoderMasks(Mixin):
    """Mixin that has a `TransformerDecoder` pass its masks on without a mask of token pairs."""

    def _compute_self_attention_mask(
        self,
        decoder_sequence: Tensor,
        decoder_padding_mask: Tensor,
        decoder_attention_mask: Tensor,
        use_causal_mask: bool,
        self_attention_cache: Any,
        self_attention_cache_update_index: Tensor,
    ) -> Any:
        attention = self._self_attention_layer
        is_linear = isinstance(attention, DarkKerasAttention) and attention.is_linear
        keys = super()._compute_self_attention_mask(
            decoder_sequence=decoder_sequence,
            decoder_padding_mask=decoder_padding_mask,
            decoder_attention_mask=decoder_attention_mask,
            use_causal_mask=use_causal_mask and not is_linear,
            self_attention_cache=self_attention_cache,
            self_attention_cache_update_index=self_attention_cache_update_index,
        )
        return CausalMask(keys) if is_linear and use_causal_mask else keys


def dark_cached_cls(stock_cls: type) -> Any:
    """The dark class of `CachedMultiHeadAttention`, or of a known subclass."""
    return dark_layer_cls(DarkCachedAttention, stock_cls)


def dark_moonshine_cls(stock_cls: type) -> Any:
    """The dark class of Moonshine's attention layer."""
    return dark_layer_cls(DarkMoonshineAttention, stock_cls)


for _stock_cls in (CachedMultiHeadAttention, WhisperCachedMultiHeadAttention):
    know_attention(_stock_cls, dark_cached_cls)
know_attention(MoonshineMultiHeadAttention, dark_moonshine_cls)
know_block(TransformerDecoder, DecoderMasks)
