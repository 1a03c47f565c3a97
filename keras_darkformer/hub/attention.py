"""KerasHub's attention layers, with the dark kernel in place of softmax.

`DarkHubAttention` does the work. Its subclasses add the `call` that a kind of
KerasHub block expects, and `classes.py` joins these with the stock layers.
"""

import contextlib
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from keras_darkformer.hub.options import DarkOptions, Mixin, argument_names, dark_name
from keras_darkformer.layers import DarkFeatureMap
from keras_darkformer.layers.dark_attention import drop_tokens
from keras_darkformer.layers.observation import Observation, Observer

if TYPE_CHECKING:
    from keras_darkformer.hub.families import Family

# A prompt is prefilled in one pass, but only its first tokens may enter the
# state: the sampler feeds the others again, one by one. Both facts go through
# unmodified decoder blocks as one padding mask of these codes.
PAD, ATTEND, WRITE = 0, 1, 2

FEATURE_MAP_OPTIONS = (
    "num_features",
    "geometry_scale",
    "train_geometry",
    "train_projection",
    "projection",
    "tie_geometry",
    "rope_geometry",
    "sliding_window",
    "window_only",
    "seed",
)
LAYER_OPTIONS = (*FEATURE_MAP_OPTIONS, "attention_mode", "chunk_size", "remat")


def part(layer: Any, name: str) -> Any:
    """A layer's attribute, under its public name or KerasHub's private one."""
    return getattr(layer, name) if hasattr(layer, name) else getattr(layer, f"_{name}")


def head_sizes(attention: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and head size of a built stock attention layer."""
    num_query_heads, head_dim = part(attention, "query_dense").partial_output_shape[-2:]
    return num_query_heads, part(attention, "key_dense").partial_output_shape[-2], head_dim


class DarkHubAttention(Mixin):
    """Turns a KerasHub attention layer, its base class in Python, dark.

    An instance is a stock attention layer that has become dark: same
    projections, norms and rotary embedding, same variable paths, and one new
    sublayer, `feature_map`. In linear mode its `cache` is a recurrent state;
    in exact mode it is the stock layer with M applied after the rotation.

    Attributes:
        family: the `Family` this layer is of.
        stock_cls: the KerasHub layer this one is made of.
    """

    family: "Family"
    stock_cls: type
    # What the stock layer drops: single attention weights, or parts of the output.
    drops_weights = True

    def __init__(self, *args: Any, feature_form: str = "random", **kwargs: Any) -> None:
        dark, stock = DarkOptions.split(kwargs, self.stock_cls)
        # As in `DarkAttention`: a state must arrive in float32.
        super().__init__(*args, autocast=False, **stock)
        self._configure(DarkOptions(**dark), feature_form)

    @classmethod
    def take_over(cls, attention: Any, options: DarkOptions, feature_form: str = "random") -> Any:
        """Makes a built stock layer dark, in place: no weight is copied or moved."""
        attention.__class__ = cls
        attention.autocast = False
        attention._tracker.unlock()
        try:
            attention._configure(options, feature_form)
            attention._add_feature_map(attention.path)
        finally:
            attention._lock_state()
        return attention

    def _configure(self, options: DarkOptions, feature_form: str) -> None:
        # Set by those who calibrate or judge the layer, see `observed`.
        self.observer: Observer | None = None
        self.position_offset: Any = None
        self.dark_options, self.feature_form = options, feature_form
        self.attention_mode = options.attention_mode
        self.chunk_size = options.chunk_size
        self.remat = options.remat
        # A bounded logit is no kernel of this kind. The block keeps the value.
        self.logit_soft_cap = None

    def _add_feature_map(self, path: str | None = None) -> None:
        options = self.dark_options
        num_query_heads, num_heads, head_dim = head_sizes(self)
        assert isinstance(options.num_features, int)  # the backbone gives each layer its own
        self.feature_map = DarkFeatureMap(
            num_heads,
            head_dim,
            options.num_features,
            projection=options.projection,
            train_geometry=options.train_geometry,
            train_projection=options.train_projection,
            geometry_scale=1.0 if options.geometry_scale is None else options.geometry_scale,
            tie_geometry=options.tie_geometry,
            rope_geometry=options.rope_geometry,
            form=self.feature_form,
            sliding_window=options.sliding_window,
            window_only=options.window_only,
            num_query_heads=num_query_heads,
            seed=options.seed,
            dtype="float32",
            name="feature_map",
        )
        with contextlib.ExitStack() as stack:
            for name in path.split("/") if path else ():
                stack.enter_context(keras.name_scope(name))
            self.feature_map.build()
        if self.family.rotary:
            _prepare_rotation(self, getattr(self, self.family.rotary))

    def build(self, inputs_shape: Any) -> None:
        """Builds the stock layer and the feature map."""
        super().build(inputs_shape)
        self._add_feature_map()

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.family.rotary is not None

    def dense_layers(self) -> tuple[Any, Any, Any]:
        """The projections to queries, keys and values."""
        return part(self, "query_dense"), part(self, "key_dense"), part(self, "value_dense")

    def _project(self, x: Any) -> tuple[Any, Any, Any]:
        """Queries `(b, t, n, h)`, keys and values `(b, t, k, h)`, before the rotation."""
        query, key, value = (dense(x) for dense in self.dense_layers())
        if self.family.norms and hasattr(self, self.family.norms[0]):
            query_norm, key_norm = (getattr(self, name) for name in self.family.norms)
            query, key = query_norm(query), key_norm(key)
        return query, key, value

    def _rotate(self, x: Any, start_index: Any) -> Any:
        if self.family.rotary is None:
            return x
        return getattr(self, self.family.rotary)(x, start_index=start_index)

    def _compute_attention(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._compute_attention(self.feature_map.exact_query(query), *args, **kwargs)

    def _attend(
        self,
        x: Any,
        code: Any = None,
        state: Any = None,
        start_index: Any = 0,
        training: bool | None = False,
    ) -> Any:
        """Linear attention and output projection; with a state also the next state.

        Args:
            x: `(b, t, d)`.
            code: `(b, t)`, or `None` where every token counts. Without a
                state a padding mask; with one, tokens are `PAD`, `ATTEND`
                (seen, but not kept) or `WRITE`.
            state: state of the tokens before, or `None`.
            start_index: position of the first token; `None` for 0.
            training: bool.
        """
        start_index = 0 if start_index is None else start_index
        if self.position_offset is not None:
            start_index = start_index + self.position_offset
        query, key, value = self._project(x)
        attends = None if code is None else ops.greater(ops.cast(code, "int32"), PAD)
        causal, output_dense = self.family.causal, part(self, "output_dense")

        def rotate(x: Any) -> Any:
            return self._rotate(x, start_index)

        if self.observer is not None:
            observation = Observation(
                query,
                key,
                value,
                rotate,
                rotate,
                causal=causal,
                key_mask=attends,
                attention_mask=self._local_mask(ops.shape(key)[1]),
            )
            return output_dense(self.observer(self, observation))
        query = rotate(self.feature_map.before_rotation(query))
        key = rotate(self.feature_map.before_rotation(key))
        if state is not None and not (isinstance(state, tuple | list) and len(state) >= 3):
            raise ValueError(
                "A dark attention layer in linear mode needs a recurrent state as `cache`, but "
                "got a key/value cache. Generate with the dark causal LM, such as "
                "`keras_darkformer.hub.DarkGemmaCausalLM`, around this backbone."
            )
        dropout = part(self, "dropout_layer")
        if self.drops_weights:
            value = drop_tokens(dropout, value, training)
        output = self.feature_map.attend(
            query,
            key,
            value,
            causal=causal,
            key_mask=attends,
            initial_state=state,
            return_state=state is not None and code is None,
            chunk_size=self.chunk_size,
            remat=self.remat,
        )
        if state is not None and code is None:
            output, state = output
        elif state is not None:
            writes = ops.equal(ops.cast(code, "int32"), WRITE)
            state = self.feature_map.accumulate(key, value, key_mask=writes, initial_state=state)
        if not self.drops_weights:
            output = dropout(output, training=training)
        output = output_dense(output)
        return output if state is None else (output, tuple(state))

    def _local_mask(self, length: Any) -> Any:
        """What the stock layer's sliding window, if it has one, lets a query see."""
        if (window := self.family.window(self)) is None:
            return None
        index = ops.arange(length, dtype="int32")
        return (index[:, None] - index[None, :] < window)[None, None]

    def _stock_config(self) -> dict[str, Any]:
        """The stock layer's constructor arguments, which it does not list, or not well."""
        config = keras.layers.Layer.get_config(self)
        for name in argument_names(self.stock_cls) - {"kwargs", "logit_soft_cap"}:
            value = part(self, name)
            if isinstance(value, keras.initializers.Initializer):
                value = keras.initializers.serialize(value)
            config[name] = value
        return config

    def get_config(self) -> dict[str, Any]:
        """The stock layer's constructor arguments and ours."""
        options, form = self.dark_options.get_config(), self.feature_form
        if self.built:  # calibration may have changed these
            feature_map = self.feature_map.get_config()
            options |= {name: feature_map[name] for name in FEATURE_MAP_OPTIONS}
            form = feature_map["form"]
        dark = {dark_name(name, self.stock_cls): options[name] for name in LAYER_OPTIONS}
        return {**self._stock_config(), **dark, "feature_form": form}


class GemmaAttention(DarkHubAttention):
    """As the blocks of Gemma 1 and 2 call it."""

    def _rotate(self, x: Any, start_index: Any) -> Any:
        return self._apply_rope(x, start_index)  # also reorders coordinates

    def call(
        self,
        x: Any,
        attention_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = 0,
        training: bool = False,
    ) -> Any:
        """The stock layer's call; in linear mode `cache` is a state, the mask `(b, t)`."""
        if self.attention_mode == "exact":
            return super().call(x, attention_mask, cache, cache_update_index, training)
        return self._attend(x, attention_mask, cache, cache_update_index, training)


class Gemma3Attention(DarkHubAttention):
    """As the blocks of Gemma 3 call it."""

    def call(
        self,
        x: Any,
        attention_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = 0,
        cache_update_mask: Any = None,
        training: bool = False,
    ) -> Any:
        """The stock layer's call; in linear mode `cache` is a state, the mask `(b, t)`."""
        if self.attention_mode == "exact":
            return super().call(
                x, attention_mask, cache, cache_update_index, cache_update_mask, training
            )
        return self._attend(x, attention_mask, cache, cache_update_index, training)


class LlamaAttention(DarkHubAttention):
    """As the blocks of Llama call it, and of those built after it."""

    drops_weights = False

    def call(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
        training: bool | None = None,
    ) -> Any:
        """The stock layer's call; in linear mode `cache` is a state, the mask `(b, t)`."""
        if self.attention_mode == "exact":
            return super().call(hidden_states, attention_mask, cache, cache_update_index, training)
        if attention_mask is not None and len(attention_mask.shape) == 3:  # `(b, t, 1)`
            attention_mask = ops.squeeze(attention_mask, axis=2)
        return self._attend(hidden_states, attention_mask, cache, cache_update_index, training)


class MultiHeadAttention(DarkHubAttention):
    """Self-attention by Keras' `MultiHeadAttention`, with KerasHub's cache or without."""

    def build(  # type: ignore[override]
        self, query_shape: Any, value_shape: Any, key_shape: Any = None
    ) -> None:
        """Builds the stock layer and the feature map."""
        super(DarkHubAttention, self).build(query_shape, value_shape, key_shape)
        self._add_feature_map()

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        attention_mask: Any = None,
        cache: Any = None,
        cache_update_index: Any = None,
        training: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The stock layer's call; in linear mode `cache` is a state, the mask `(b, t)`."""
        if self.attention_mode == "exact":
            if cache is not None:
                kwargs |= {"cache": cache, "cache_update_index": cache_update_index}
            return super().call(
                query, value, key=key, attention_mask=attention_mask, training=training, **kwargs
            )
        if kwargs.get("return_attention_scores"):
            raise ValueError(
                '`return_attention_scores=True` needs `attention_mode="exact"`: linear attention '
                "forms no scores."
            )
        if attention_mask is not None and len(attention_mask.shape) == 3:
            if attention_mask.shape[1] != 1:
                raise ValueError(
                    "Linear attention takes a padding mask, not one of pairs of tokens. Received: "
                    f"`attention_mask` of shape {tuple(attention_mask.shape)}"
                )
            attention_mask = ops.squeeze(attention_mask, axis=1)
        return self._attend(query, attention_mask, cache, cache_update_index, training)

    def _stock_config(self) -> dict[str, Any]:
        return super(DarkHubAttention, self).get_config()


def _prepare_rotation(attention: Any, rotary: Any) -> None:
    """Has the rotary embedding apply a geometry that sits before it, in exact mode.

    Replaced on the instance; in linear mode the attention layer sees to it.
    """
    rotate = rotary.call

    def call(x: Any, *args: Any, **kwargs: Any) -> Any:
        if attention.attention_mode == "exact":
            x = attention.feature_map.before_rotation(x)
        return rotate(x, *args, **kwargs)

    rotary.call = call


def layer_seed(seed: int, index: int) -> int:
    """A seed of its own for every layer."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
