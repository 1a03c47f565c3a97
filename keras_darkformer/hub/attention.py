"""KerasHub's cached attention layers, with the dark kernel in place of softmax."""

import contextlib
import inspect
from typing import Any

import keras
import numpy as np
from keras import ops
from keras_hub.src.models.gemma.gemma_attention import CachedGemmaAttention
from keras_hub.src.models.gemma3.gemma3_attention import CachedGemma3Attention

from keras_darkformer.hub.options import DarkOptions, Mixin
from keras_darkformer.layers import DarkFeatureMap
from keras_darkformer.layers.dark_attention import drop_tokens
from keras_darkformer.layers.observation import Observation, Observer

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


class DarkCachedAttention(Mixin):
    """Turns a KerasHub attention layer, its base class in Python, dark.

    An instance is a stock attention layer that has become dark: same
    projections, norms and rotary embedding, same variable paths, and one new
    sublayer, `feature_map`. In linear mode its `cache` is a recurrent state;
    in exact mode it is the stock layer with M applied after the rotation.

    Attributes:
        stock_cls: the KerasHub layer this one is made of.
    """

    stock_cls: type

    def __init__(
        self,
        *args: Any,
        num_features: int = 256,
        attention_mode: str = "linear",
        geometry_scale: float = 1.0,
        train_geometry: bool = True,
        train_projection: bool = False,
        projection: str = "orthogonal",
        tie_geometry: bool = True,
        rope_geometry: str = "after",
        feature_form: str = "random",
        sliding_window: int | None = None,
        window_only: bool = False,
        chunk_size: int | None = None,
        remat: bool | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        # As in `DarkAttention`: a state must arrive in float32.
        super().__init__(*args, autocast=False, **kwargs)
        self._configure(
            DarkOptions(
                num_features=num_features,
                attention_mode=attention_mode,
                geometry_scale=geometry_scale,
                train_geometry=train_geometry,
                train_projection=train_projection,
                projection=projection,
                tie_geometry=tie_geometry,
                rope_geometry=rope_geometry,
                sliding_window=sliding_window,
                window_only=window_only,
                chunk_size=chunk_size,
                remat=remat,
                seed=seed,
            ),
            feature_form,
        )

    @classmethod
    def take_over(cls, attention: Any, options: DarkOptions, feature_form: str = "random") -> Any:
        """Makes a built stock layer dark, in place: no weight is copied or moved."""
        attention.__class__ = cls
        attention.autocast = False
        attention._tracker.unlock()
        try:
            attention._configure(options, feature_form)
            attention._build_feature_map(attention.path)
        finally:
            attention._lock_state()
        return attention

    def _configure(self, options: DarkOptions, feature_form: str) -> None:
        # Set by those who calibrate or judge the layer, see `observed`.
        self.observer: Observer | None = None
        self.position_offset: Any = None
        self.attention_mode = options.attention_mode
        self.chunk_size = options.chunk_size
        self.remat = options.remat
        # A bounded logit is no kernel of this kind. The block keeps the value.
        self.logit_soft_cap = None
        assert isinstance(options.num_features, int)  # the backbone gives each layer its own
        self.feature_map = DarkFeatureMap(
            self.num_key_value_heads,
            self.head_dim,
            options.num_features,
            projection=options.projection,
            train_geometry=options.train_geometry,
            train_projection=options.train_projection,
            geometry_scale=1.0 if options.geometry_scale is None else options.geometry_scale,
            tie_geometry=options.tie_geometry,
            rope_geometry=options.rope_geometry,
            form=feature_form,
            sliding_window=options.sliding_window,
            window_only=options.window_only,
            num_query_heads=self.num_query_heads,
            seed=options.seed,
            dtype="float32",
            name="feature_map",
        )

    def build(self, inputs_shape: Any) -> None:
        """Builds the stock layer and the feature map."""
        super().build(inputs_shape)
        self._build_feature_map()

    def _build_feature_map(self, path: str | None = None) -> None:
        with contextlib.ExitStack() as stack:
            for part in path.split("/") if path else ():
                stack.enter_context(keras.name_scope(part))
            self.feature_map.build()

    def _apply_rope(self, x: Any, start_index: Any = 0, **kwargs: Any) -> Any:
        if self.attention_mode == "exact":  # in linear mode `_attend` sees to it
            x = self.feature_map.before_rotation(x)
        return super()._apply_rope(x, start_index, **kwargs)

    def _compute_attention(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._compute_attention(self.feature_map.exact_query(query), *args, **kwargs)

    def _attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        code: Any,
        state: Any,
        start_index: Any,
        training: bool,
    ) -> Any:
        """Linear attention and output projection; with a state also the next state.

        Args:
            query: `(b, t, n, h)`, before the rotation.
            key: `(b, t, k, h)`, before the rotation.
            value: `(b, t, k, h)`.
            code: `(b, t)`, or `None` where every token counts. Without a
                state a padding mask; with one, tokens are `PAD`, `ATTEND`
                (seen, but not kept) or `WRITE`.
            state: state of the tokens before, or `None`.
            start_index: position of the first token.
            training: bool.
        """
        if self.position_offset is not None:
            start_index = start_index + self.position_offset
        attends = None if code is None else ops.greater(ops.cast(code, "int32"), PAD)

        def rotate(x: Any) -> Any:
            return self._apply_rope(x, start_index)

        if self.observer is not None:
            observation = Observation(
                query,
                key,
                value,
                rotate,
                rotate,
                causal=True,
                key_mask=attends,
                attention_mask=self._local_mask(ops.shape(key)[1]),
            )
            return self.output_dense(self.observer(self, observation))
        query = rotate(self.feature_map.before_rotation(query))
        key = rotate(self.feature_map.before_rotation(key))
        if state is not None and not (isinstance(state, tuple | list) and len(state) >= 3):
            raise ValueError(
                "A dark attention layer in linear mode needs a recurrent state as `cache`, but "
                "got a key/value cache. Generate with the dark causal LM, such as "
                "`keras_darkformer.hub.DarkGemmaCausalLM`, around this backbone."
            )
        value = drop_tokens(self.dropout_layer, value, training)
        output = self.feature_map.attend(
            query,
            key,
            value,
            causal=True,
            key_mask=attends,
            initial_state=state,
            return_state=state is not None and code is None,
            chunk_size=self.chunk_size,
            remat=self.remat,
        )
        if state is None:
            return self.output_dense(output)
        if code is None:
            output, state = output
        else:
            writes = ops.equal(ops.cast(code, "int32"), WRITE)
            state = self.feature_map.accumulate(key, value, key_mask=writes, initial_state=state)
        return self.output_dense(output), tuple(state)

    def _local_mask(self, length: Any) -> Any:
        """What the stock layer's sliding window, if it has one, lets a query see."""
        if not self.use_sliding_window_attention:
            return None
        index = ops.arange(length, dtype="int32")
        near = index[:, None] - index[None, :] < self.sliding_window_size
        return near[None, None]

    def get_config(self) -> dict[str, Any]:
        """The stock layer's constructor arguments, which it does not list, and ours."""
        stock = inspect.signature(self.stock_cls).parameters
        config = {name: getattr(self, name) for name in stock if hasattr(self, name)}
        config["kernel_initializer"] = keras.initializers.serialize(self._kernel_initializer)
        feature_map = self.feature_map.get_config()
        for name in FEATURE_MAP_OPTIONS:
            config[name] = feature_map[name]
        config["feature_form"] = feature_map["form"]
        config["attention_mode"], config["chunk_size"] = self.attention_mode, self.chunk_size
        config["remat"] = self.remat
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkGemmaAttention(DarkCachedAttention, CachedGemmaAttention):
    """Attention of Gemma 1 and 2 with the dark kernel."""

    stock_cls = CachedGemmaAttention

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
        query, key, value = self.query_dense(x), self.key_dense(x), self.value_dense(x)
        return self._attend(query, key, value, attention_mask, cache, cache_update_index, training)


@keras.saving.register_keras_serializable(package="keras_darkformer")
class DarkGemma3Attention(DarkCachedAttention, CachedGemma3Attention):
    """Attention of Gemma 3 (text) with the dark kernel."""

    stock_cls = CachedGemma3Attention

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
        query, key, value = self.query_dense(x), self.key_dense(x), self.value_dense(x)
        if self.use_query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return self._attend(query, key, value, attention_mask, cache, cache_update_index, training)


def layer_seed(seed: int, index: int) -> int:
    """A seed of its own for every layer."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
