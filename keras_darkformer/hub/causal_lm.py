"""Tasks around dark backbones; causal language models generate with a state of constant size."""

from typing import Any

import numpy as np
from keras import ops, tree
from keras_hub.samplers import SpeculativeSampler
from keras_hub.samplers import get as get_sampler

from keras_darkformer.hub.attention import Code
from keras_darkformer.hub.backbone import DarkBackbone, PresetLoading
from keras_darkformer.hub.private import any_stop
from keras_darkformer.hub.record import Recorded
from keras_darkformer.hub.transformers import TransformersExport
from keras_darkformer.ops.state import nbytes
from keras_darkformer.options import ConversionOptions
from keras_darkformer.surgery.become import become
from keras_darkformer.types import Layer, Model, Tensor


class DarkTask(PresetLoading, Recorded):
    """Mixin that makes a KerasHub task dark.

    Attributes:
        stock_cls: the KerasHub class that this one extends.
        backbone_cls: the class of its dark backbone.
    """

    backbone_cls: type[DarkBackbone]

    @classmethod
    def take_over(cls, model: Model, options: ConversionOptions) -> Model:
        """Makes a stock model and its backbone dark, in place, and returns it."""
        cls.backbone_cls.take_over(model.backbone, options)
        return become(model, cls)


class DarkCausalLM(DarkTask, TransformersExport):
    """Mixin that makes a KerasHub causal LM dark.

    Generation carries a tuple with one entry per layer: a recurrent state for linear layers, whose
    size does not depend on the length, and the stock key/value cache for exact layers.

    Attributes:
        prefill_size: int. Prompt tokens that go through the layers at once. A longer prompt is read
            in pieces, in memory that does not grow with its length. `None` reads all of it at once.
    """

    prefill_size: int | None = 2048
    generate_function: Any

    @classmethod
    def take_over(cls, model: Model, options: ConversionOptions) -> Model:
        """Converts as other tasks do, but refuses a model compiled for speculative sampling."""
        if options.is_linear:
            _refuse_speculative(getattr(model, "sampler", None))
        return super().take_over(model, options)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the model as the stock model does.

        Raises:
            ValueError: for a speculative sampler, which would have to roll the recurrent state
                back.
        """
        if self._is_recurrent() and "sampler" in kwargs:
            _refuse_speculative(get_sampler(kwargs["sampler"]))
        super().compile(*args, **kwargs)

    def make_generate_function(self) -> Tensor:
        """The compiled part of `generate`, preceded by a check of the prompts."""
        if self.generate_function is None:
            generate = super().make_generate_function()

            def checked(inputs: Any, stop_token_ids: Any = None) -> Tensor:
                if not len(inputs["token_ids"]):  # XLA can't loop over nothing
                    return inputs
                if self._is_recurrent():
                    _refuse_empty(inputs["padding_mask"])
                return generate(inputs, stop_token_ids)

            self.generate_function = checked
        return self.generate_function

    def _is_recurrent(self) -> bool:
        """Whether any layer carries a state."""
        return any(map(is_linear, self.backbone.attention_layers))

    def call_with_cache(
        self,
        token_ids: Tensor,
        cache: Tensor,
        cache_update_index: Tensor,
        padding_mask: Tensor = None,
    ) -> Tensor:
        """Logits for tokens that follow those in the cache.

        Args:
            token_ids: int tensor of shape `(b, t)`.
            cache: tuple with one entry per layer, from `get_initial_cache` or an earlier call.
            cache_update_index: int or int tensor, the position of the first of these tokens.
            padding_mask: `(b, t)`, for linear layers only: how they treat each token, see
                `hub.attention.Code`. `None` has all tokens enter the new states.

        Returns:
            `(logits, hidden_states, cache)`, of which logits are `(b, t, vocabulary)` and hidden
            states `(b, t, d)`.
        """
        hidden_states, cache = self._run_layers(token_ids, cache, cache_update_index, padding_mask)
        logits = self.backbone.token_embedding(hidden_states, reverse=True)
        return logits, hidden_states, cache

    def enter_cache(self, token_ids: Tensor, cache: Tensor, cache_update_index: Tensor) -> Tensor:
        """The cache after tokens that follow those in it, without their logits.

        Args:
            token_ids: int tensor of shape `(b, t)`.
            cache: tuple with one entry per layer, from `get_initial_cache` or an earlier call.
            cache_update_index: int or int tensor, the position of the first of these tokens.
        """
        return self._run_layers(token_ids, cache, cache_update_index, None)[1]

    def _run_layers(
        self, token_ids: Tensor, cache: Tensor, cache_update_index: Tensor, padding_mask: Tensor
    ) -> Tensor:
        backbone, family = self.backbone, self.backbone.family
        # The blocks of SmolLM 3 take it next to the cache, where Keras accepts tensors only.
        cache_update_index = ops.convert_to_tensor(cache_update_index, dtype="int32")
        x = family.embed(backbone, token_ids, cache_update_index)
        entries = []
        for block, attention, entry in zip(
            backbone.transformer_layers, backbone.attention_layers, cache, strict=True
        ):
            arguments = {
                # Exact layers need none: rows are padded on the right, and the causal mask hides
                # padding until it is overwritten.
                family.padding_argument: padding_mask if is_linear(attention) else None,
                family.cache_argument: entry,
                f"{family.cache_argument}_update_index": cache_update_index,
            }
            x, entry = block(x, **arguments)
            entries.append(entry)
        return getattr(backbone, family.output_norm)(x), tuple(entries)

    def get_initial_cache(self, batch_size: Tensor, max_length: Tensor) -> Tensor:
        """The cache that generation starts with.

        Args:
            batch_size: int, or scalar int tensor.
            max_length: int. Longest sequence, in tokens, that exact layers can hold.

        Returns:
            A tuple with one entry per layer. A linear layer's entry is a state, see
            `ops.initial_state`.
        """
        return tuple(
            attention.feature_map.get_initial_state(batch_size, dtype=attention.compute_dtype)
            if is_linear(attention)
            else self._empty_key_value_cache(attention, batch_size, max_length)
            for attention in self.backbone.attention_layers
        )

    def cache_bytes(self, max_length: int, exact: bool = False) -> int:
        """Number of bytes that generation carries for one text.

        Args:
            max_length: int. Longest text, in tokens.
            exact: bool. Whether to count as if all layers had been left exact.
        """
        if exact:
            layers = self.backbone.attention_layers
            entries = tuple(self._empty_key_value_cache(x, 1, max_length) for x in layers)
        else:
            entries = self.get_initial_cache(1, max_length)
        return sum(nbytes(leaf.shape, leaf.dtype) for leaf in tree.flatten(entries))

    def _empty_key_value_cache(
        self, attention: Layer, batch_size: Tensor, max_length: Tensor
    ) -> Tensor:
        _, num_heads, head_dim = self.backbone.family.head_sizes(attention)
        if self.backbone.family.paired_cache:
            pair = (batch_size, max_length, num_heads, head_dim)
            return tuple(ops.zeros(pair, dtype=self.compute_dtype) for _ in range(2))
        both = (batch_size, 2, max_length, num_heads, head_dim)
        return ops.zeros(both, dtype=self.compute_dtype)

    def _prefill_mask(self, padding_mask: Tensor, start: Tensor) -> Tensor:
        """Codes for a padded batch of prompts, which sampling continues at `start`.

        Sampling begins at the end of the shortest prompt, `start = min(length)`. It feeds the token
        before that position first, and every later prompt token again. A key/value cache may be
        written twice but a state may not, so only positions before `start - 1` enter the state now.
        """
        position = ops.arange(ops.shape(padding_mask)[1], dtype="int32")
        real = ops.where(position[None, :] < start - 1, Code.WRITE.value, Code.ATTEND.value)
        return ops.where(ops.cast(padding_mask, "bool"), real, Code.PAD.value)

    def _build_cache(self, token_ids: Tensor, padding_mask: Tensor, start: Tensor) -> Tensor:
        batch_size, length = ops.shape(token_ids)[:2]
        codes = self._prefill_mask(padding_mask, start)
        cache = self.get_initial_cache(batch_size, length)
        size = self.prefill_size
        if size is None or not isinstance(length, int) or length <= size:
            return self._run_layers(token_ids, cache, 0, codes)
        # The shorter piece comes first: as the last one, padded to full size, it would ask for
        # positions that a table may not have.
        first = length % size or size
        found, cache = self._run_layers(token_ids[:, :first], cache, 0, codes[:, :first])
        hidden_states = ops.pad(found, [[0, 0], [0, length - first], [0, 0]])

        def unread(index: Tensor, hidden_states: Tensor, cache: Tensor) -> Tensor:
            return index < start  # the sampler feeds all tokens from there on

        def read(index: Tensor, hidden_states: Tensor, cache: Tensor) -> Tensor:
            piece = [ops.slice(x, [0, index], [batch_size, size]) for x in (token_ids, codes)]
            found, cache = self._run_layers(piece[0], cache, index, piece[1])
            return index + size, ops.slice_update(hidden_states, [0, index, 0], found), cache

        index = ops.convert_to_tensor(first, "int32")
        _, hidden_states, cache = ops.while_loop(unread, read, (index, hidden_states, cache))
        return hidden_states, cache

    def generate_step(self, inputs: Any, stop_token_ids: Any = None) -> Tensor:
        """Generates for one batch: the compiled part of `generate`.

        Args:
            inputs: dict of `token_ids` and `padding_mask`, `(b, max_length)`, with prompts padded
                on the right.
            stop_token_ids: tuple of ids that end a row, or `None`.

        Returns:
            A dict of the same two tensors, with the generated tokens.
        """
        token_ids, padding_mask = inputs["token_ids"], ops.cast(inputs["padding_mask"], "bool")
        start = ops.min(ops.sum(ops.cast(padding_mask, "int32"), axis=-1))
        hidden_states, cache = self._build_cache(token_ids, padding_mask, start)

        def next_token(prompt: Tensor, cache: Tensor, index: Tensor) -> Tensor:
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
        stops = ops.cast(any_stop(token_ids, stop_token_ids, padding_mask), "int32")
        behind_stop = ops.cumsum(stops, axis=-1) - stops
        return {"token_ids": token_ids, "padding_mask": ops.equal(behind_stop, 0)}


def is_linear(attention: Layer) -> bool:
    """Whether an attention layer carries a state rather than a key/value cache."""
    return getattr(attention, "is_linear", False)


def _refuse_speculative(sampler: Any) -> None:
    if isinstance(sampler, SpeculativeSampler):
        raise ValueError(
            "Speculative sampling is refused: it feeds drafted tokens and takes the rejected ones "
            "back. A key/value cache is simply overwritten, but a recurrent state can't be rolled "
            'back. Use another sampler, or convert with `attention_mode="exact"`.'
        )


def _refuse_empty(padding_mask: Tensor) -> None:
    lengths = np.sum(ops.convert_to_numpy(padding_mask) != 0, axis=-1)
    if (lengths == 0).any():
        # The sampler would begin with the last token of the row. A key/value cache overwrites it
        # later, but the states of all rows would keep it.
        raise ValueError(
            "Every prompt needs at least one token to continue, such as the start token. "
            f"Received prompts of lengths {lengths.tolist()}."
        )
