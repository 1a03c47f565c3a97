"""KerasHub's attention layers, with the dark kernel in place of softmax.

`DarkHubAttention` does the work. Each subclass reads the calls of one kind of KerasHub block, and
`Family` combines it with the stock layer.
"""

import dataclasses
import enum
from typing import Any

from keras import ops, tree

from keras_darkformer.hub.dark_layer import DarkHubLayer
from keras_darkformer.hub.private import part, refuse_vllm
from keras_darkformer.layers.core import FeatureAttention, build_at, drop_tokens
from keras_darkformer.layers.heads import Heads
from keras_darkformer.ops.state import AttentionState
from keras_darkformer.options import AttentionOptions
from keras_darkformer.surgery.become import become, dark_subclass, give
from keras_darkformer.surgery.mark import mark_weights
from keras_darkformer.types import Layer, Tensor


class Code(enum.IntEnum):
    """How a layer with a recurrent state treats a token of a prompt.

    A prompt is prefilled in one pass, but only its first tokens may enter the state, because the
    sampler feeds the others again, one by one. The codes pass through the unmodified decoder blocks
    in place of the padding mask.
    """

    PAD = 0
    ATTEND = 1
    WRITE = 2


class DarkHubAttention(FeatureAttention, DarkHubLayer):
    """Mixin that makes a KerasHub attention layer dark.

    An instance is a stock attention layer that has become dark. It keeps its projections, norms,
    rotary embedding and variable paths, and has one new sublayer, `feature_map`. In linear mode its
    `cache` is a recurrent state; in exact mode the layer computes the stock attention with the
    learned kernel.
    """

    # What the stock layer applies dropout to: the attention "weights", its "output", or nothing.
    drops: str | None = "weights"

    def get_attention(self) -> "DarkHubAttention":
        """This layer."""
        return self

    def darken(self, options: AttentionOptions) -> None:
        """Adds the feature map, and has the rotary embedding apply the geometry in exact mode."""
        num_query_heads, num_heads, head_dim = self.family.head_sizes(self)
        feature_map = self.make_feature_map(num_heads, head_dim, num_query_heads, options)
        # A dark kernel can't bound its logits. The block keeps the value.
        give(self, options=options, feature_map=feature_map, logit_soft_cap=None)
        build_at(feature_map, f"{self.path}/feature_map")
        mark_weights(self.dense_layers()[1])
        if self.family.rotary is not None:
            rotary = getattr(self, self.family.rotary)
            rotary_cls = dark_subclass(self.family.dark_rotary_cls, type(rotary))
            become(rotary, rotary_cls, in_exact_mode=self.in_exact_mode)

    def in_exact_mode(self, x: Tensor) -> Tensor:
        """What is rotated: in exact mode `x` with a geometry that sits before the rotation."""
        return x if self.is_linear else self.feature_map.before_rotation(x)

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.family.rotary is not None

    def dense_layers(self) -> tuple[Layer, Layer, Layer]:
        """The projections to queries, keys and values."""
        return part(self, "query_dense"), part(self, "key_dense"), part(self, "value_dense")

    def _compute_attention(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._compute_attention(self.feature_map.exact_query(query), *args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Tensor:
        """The stock layer's call. In linear mode `cache` is a state, and the mask is `(b, t)`."""
        refuse_vllm(self)
        if self.is_linear:
            return self.call_linear(*args, **kwargs)
        return super().call(*args, **kwargs)

    def call_linear(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attends in linear mode, as the blocks of Gemma call it."""
        return self.attend_cached(*args, **kwargs)

    def attend_cached(
        self,
        x: Tensor,
        attention_mask: Tensor = None,
        cache: AttentionState | None = None,
        cache_update_index: Tensor = None,
        cache_update_mask: Tensor = None,
        training: bool | None = None,
    ) -> Tensor:
        """Linear attention and the output projection; with a state, also the next state.

        Args:
            x: `(b, t, d)`.
            attention_mask: `(b, t)`, or `None` if every token counts. Without a state it is a
                padding mask, with one it holds `Code` values.
            cache: state of the preceding tokens, or `None`.
            cache_update_index: position of the first token; `None` for 0.
            cache_update_mask: not used.
            training: bool.
        """
        heads = self._heads(x, attention_mask, cache_update_index)
        write_mask = None
        if cache is not None:
            if len(tree.flatten(cache)) < 3:
                raise ValueError(
                    "A dark attention layer in linear mode needs a recurrent state as `cache`, but "
                    "got a key/value cache. Generate with the dark causal LM, such as "
                    "`keras_darkformer.hub.DarkGemmaCausalLM`, around this backbone."
                )
            if attention_mask is not None:
                write_mask = ops.equal(ops.cast(attention_mask, "int32"), Code.WRITE.value)
        if self.drops == "weights":
            value = drop_tokens(part(self, "dropout_layer"), heads.value, training)
            heads = dataclasses.replace(heads, value=value)
        output, state = self.attend(
            heads,
            training=training,
            write_mask=write_mask,
            initial_state=cache,
            return_state=cache is not None,
        )
        if self.drops == "output":
            output = part(self, "dropout_layer")(output, training=training)
        output = self.combine(output)
        return output if cache is None else (output, state)

    def combine(self, output: Tensor) -> Tensor:
        """The output projection of the heads' outputs, `(b, t, n, h)`."""
        return part(self, "output_dense")(output)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of `x`, `(b, t, heads, h)`."""
        return tuple(dense(x) for dense in self.dense_layers())

    def _heads(self, x: Tensor, code: Tensor, start_index: Tensor) -> Heads:
        query, key, value = self.project(x)
        if self.family.norms and hasattr(self, self.family.norms[0]):
            query_norm, key_norm = (getattr(self, name) for name in self.family.norms)
            query, key = query_norm(query), key_norm(key)
        start_index = 0 if start_index is None else start_index
        if self.position_offset is not None:
            start_index = start_index + self.position_offset

        def rotate(x: Tensor) -> Tensor:
            return self.family.rotate(self, x, start_index) if self.is_rotary else x

        return Heads(
            query,
            key,
            value,
            rotate_query=rotate,
            rotate_key=rotate,
            causal=self.family.causal,
            key_mask=None if code is None else ops.greater(ops.cast(code, "int32"), Code.PAD.value),
            # What the stock layer lets a query see, for observers that compare with it.
            attention_mask=None if self.observer is None else self._local_mask(x),
        )

    def _local_mask(self, x: Tensor) -> Tensor:
        """What the stock layer's sliding window, if it has one, lets a query see."""
        if (window := self.family.window(self)) is None:
            return None
        index = ops.arange(ops.shape(x)[1], dtype="int32")
        return (index[:, None] - index[None, :] < window)[None, None]


class LlamaAttention(DarkHubAttention):
    """Attention as the blocks of Llama, and of families modelled on it, call it."""

    drops = "output"

    def call_linear(
        self, hidden_states: Tensor, attention_mask: Tensor = None, **kwargs: Any
    ) -> Tensor:
        """Takes the mask as `(b, t)` or `(b, t, 1)`, as these blocks pass it on."""
        if attention_mask is not None and len(attention_mask.shape) == 3:
            attention_mask = ops.squeeze(attention_mask, axis=2)
        return self.attend_cached(hidden_states, attention_mask, **kwargs)


class SmolLM3Attention(DarkHubAttention):
    """Attention as the blocks of SmolLM 3 call it. Some of its layers have no positions."""

    drops = None

    @property
    def is_rotary(self) -> bool:
        """Whether this layer is one of those with rotary positions."""
        return self.use_rope

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of `x`, from flat projections."""
        num_query_heads, num_heads, head_dim = self.family.head_sizes(self)
        return tuple(
            ops.reshape(y, (*ops.shape(y)[:2], heads, head_dim))
            for y, heads in zip(
                super().project(x), (num_query_heads, num_heads, num_heads), strict=True
            )
        )

    def call_linear(
        self,
        hidden_states: Tensor,
        training: bool | None = None,
        attention_mask: Tensor = None,
        self_attention_cache: AttentionState | None = None,
        self_attention_cache_update_index: Tensor = None,
        **kwargs: Any,
    ) -> Tensor:
        """Ignores other keyword arguments: the backbone passes its own on to every layer."""
        return self.attend_cached(
            hidden_states,
            attention_mask,
            self_attention_cache,
            self_attention_cache_update_index,
            training=training,
        )


class GPTNeoXAttention(DarkHubAttention):
    """Attention as the blocks of GPT-NeoX call it: one projection to queries, keys and values."""

    def dense_layers(self) -> tuple[Layer, Layer, Layer]:
        """The single projection, three times."""
        dense = part(self, "qkv_dense")
        return dense, dense, dense

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of `x`."""
        return tuple(ops.split(part(self, "qkv_dense")(x), 3, axis=-1))

    def combine(self, output: Tensor) -> Tensor:
        """The output projection, which is flat."""
        return super().combine(ops.reshape(output, (*ops.shape(output)[:2], self.hidden_dim)))

    def call_linear(
        self, hidden_states: Tensor, attention_mask: Tensor = None, **kwargs: Any
    ) -> Tensor:
        """Always returns a cache, as these blocks expect; it is `None` if they passed none."""
        result = self.attend_cached(hidden_states, attention_mask, **kwargs)
        return result if kwargs.get("cache") is not None else (result, None)


class EsmAttention(DarkHubAttention):
    """Attention as the blocks of ESM call it: flat projections, and one method for all of it."""

    drops = None

    def in_exact_mode(self, x: Tensor) -> Tensor:
        """Applies the kernel to queries, whose last step before attention is the rotation."""
        return x if self.is_linear else self.feature_map.exact_query(x)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of `x`."""
        shape = (*ops.shape(x)[:2], self.heads, self.head_size)
        return tuple(ops.reshape(y, shape) for y in super().project(x))

    def combine(self, output: Tensor) -> Tensor:
        """The output projection, which is flat."""
        return super().combine(ops.reshape(output, (*ops.shape(output)[:2], -1)))


class MultiHeadAttention(DarkHubAttention):
    """Self-attention by Keras' `MultiHeadAttention`, with or without KerasHub's cache."""

    def call_linear(
        self,
        query: Tensor,
        value: Tensor,
        key: Tensor = None,
        attention_mask: Tensor = None,
        return_attention_scores: bool = False,
        query_mask: Tensor = None,
        value_mask: Tensor = None,
        key_mask: Tensor = None,
        use_causal_mask: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Takes the mask as `(b, t)` or `(b, 1, t)`; keys and values are the queries.

        Keras fills in the masks `(b, t)` that its layers propagate. The output for a padding query
        does not matter.
        """
        if return_attention_scores:
            raise ValueError(
                '`return_attention_scores=True` needs `attention_mode="exact"`: linear attention '
                "forms no scores."
            )
        if use_causal_mask:
            raise ValueError(
                "`use_causal_mask=True` would change what this layer computes, which its "
                "family's blocks determine."
            )
        if attention_mask is not None and len(attention_mask.shape) == 3:
            if attention_mask.shape[1] != 1:
                raise ValueError(
                    "`attention_mask` must be a padding mask in linear mode, not a mask of token "
                    f"pairs. Received: shape {tuple(attention_mask.shape)}"
                )
            attention_mask = ops.squeeze(attention_mask, axis=1)
        for mask in (value_mask, key_mask):
            if mask is not None:
                mask = ops.cast(mask, "int32")
                if attention_mask is not None:  # it may hold `Code` values
                    mask = mask * ops.cast(attention_mask, "int32")
                attention_mask = mask
        return self.attend_cached(query, attention_mask, **kwargs)
