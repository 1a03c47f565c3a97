"""The attention that all dark layers share, from projected heads to its output.

`DarkAttention`, Keras' layers and KerasHub's layers project and count positions in their own ways.
All of them then pass the resulting `Heads` through the code here.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import keras
from keras import ops

from keras_darkformer.layers.feature_maps import BY_KIND, FeatureMap
from keras_darkformer.layers.feature_maps.weights import CheckedWeights
from keras_darkformer.layers.heads import Heads
from keras_darkformer.layers.masks import (
    CausalMask,
    check_attention_mask,
    merge_masks,
    split_attention_mask,
)
from keras_darkformer.ops import exact_dark_attention
from keras_darkformer.ops.crossover import crossover
from keras_darkformer.ops.state import AttentionState
from keras_darkformer.options import AttentionOptions, FeatureOptions
from keras_darkformer.types import Layer, Tensor

# Computes attention, `(b, t, n, v)`, in place of the layer.
Observer = Callable[["FeatureAttention", Heads], Tensor]


class FeatureAttention(CheckedWeights):
    """Mixin for Keras layers: what attention layers with a feature map have in common.

    Attributes:
        options: `AttentionOptions`.
        feature_map: `FeatureMap`, a sublayer.
        observer: computes attention instead, or `None`; see `observed`.
        position_offset: added to all rotary positions, or `None`.
        is_fitted: whether the features are being fitted, and used at any length; see `fitted`.
    """

    options: AttentionOptions
    feature_map: FeatureMap
    observer: Observer | None = None
    position_offset: Tensor = None
    is_fitted: bool = False
    path: str
    compute_dtype: str

    @property
    def is_linear(self) -> bool:
        """Whether there are features and a state, rather than the exact kernel at any length."""
        return self.options.is_linear

    @property
    def is_rotary(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        raise NotImplementedError

    @staticmethod
    def make_feature_map(
        num_heads: int, head_dim: int, num_query_heads: int, options: FeatureOptions
    ) -> FeatureMap:
        """A feature map, not built yet, with the name `feature_map`."""
        own = options.of(FeatureOptions)
        return BY_KIND[own.feature_map](
            num_heads,
            head_dim,
            num_query_heads=num_query_heads,
            dtype="float32",
            name="feature_map",
            **own.get_config(),
        )

    def swap_feature_map(self, kind: str) -> None:
        """Replaces the layer's feature map by a new one of another class, at initial values.

        Optimizers built before do not know the new map's weights.

        Args:
            kind: value of the option `feature_map`.
        """
        before = self.feature_map
        if before.kind == kind:
            return
        options = before.options.of(FeatureOptions, feature_map=kind)
        after = self.make_feature_map(
            before.num_heads, before.head_dim, before.num_query_heads, options
        )
        after.trainable = before.trainable
        if before.built:
            build_at(after, before.path)
        self.put_feature_map(after)

    def put_feature_map(self, feature_map: FeatureMap) -> None:
        """Replaces the layer's feature map by another one, built in the same way."""
        before = self.feature_map
        self._tracker.replace_tracked_value(  # type: ignore[attr-defined]
            "layers", before, feature_map
        )
        self.feature_map = feature_map
        self.options = self.options.of(type(self.options), feature_map=feature_map.kind)

    def read_masks(
        self,
        attention_mask: Tensor,
        causal: bool,
        scores: bool = False,
        lengths: tuple[int | None, int | None] = (None, None),
    ) -> tuple[bool, Tensor, Tensor]:
        """Combines the masks of a call.

        Args:
            attention_mask: bool, of query and key positions; a `CausalMask`; or `None`.
            causal: bool. Whether the call asks for causal attention.
            scores: bool. Whether it asks for the attention weights.
            lengths: of queries and keys, which a mask is checked against; `None` where unknown.

        Returns:
            Whether attention is causal, a mask of keys `(b or 1, s)` or `None`, and in exact mode a
            mask of pairs or `None`.

        Raises:
            ValueError: if linear attention can't express what the call asks for, or a mask has
                other lengths.
        """
        if isinstance(attention_mask, CausalMask):
            causal, attention_mask = True, attention_mask.keys
        check_attention_mask(attention_mask, *lengths)
        if not self.is_linear:
            return causal, None, attention_mask
        if scores:
            raise ValueError(
                '`return_attention_scores=True` needs `attention_mode="exact"`: linear attention '
                "never forms the scores."
            )
        padding = None
        if attention_mask is not None:
            is_causal, padding = split_attention_mask(attention_mask)
            causal = causal or is_causal
        if self.options.memory and not causal:
            raise ValueError(
                "`sliding_window` and `num_sinks` need `use_causal_mask=True`: they hold tokens "
                f"before a query. Received: {self.options.memory}"
            )
        return causal, padding, None

    def computes_exactly(
        self,
        num_queries: int | None,
        num_keys: int | None,
        *,
        causal: bool = False,
        training: bool | None = None,
    ) -> bool:
        """Whether a call without an initial state computes the kernel itself, without features.

        With `attention_mode="auto"`, short sequences are computed exactly. Without an exact memory,
        these are shorter than `exact_below`, and the exact form uses the kernel that the features
        estimate; features that were learned instead of drawn estimate none, and are always used. If
        `exact_below` is `None`, calls that train use the features at any length, since a model that
        was trained without their noise does not tolerate it. With an exact memory, short sequences
        are those that fit into it, and both forms give the same attention.

        Args:
            num_queries: int. Tokens that attend.
            num_keys: int. Tokens attended to. If the two numbers differ, their harmonic mean
                counts, since the cost of the exact form is their product. `None`, for a number that
                is unknown during tracing, gives false.
            causal: bool. Whether query t attends to keys up to t.
            training: bool. Whether the call is part of training.

        Example:

        >>> layer = keras_darkformer.DarkAttention(16, 4, attention_mode="auto", exact_below=512)
        >>> layer.computes_exactly(100, 100), layer.computes_exactly(1000, 1000)
        (True, False)
        """
        options, feature_map = self.options, self.feature_map
        if options.attention_mode != "auto":
            return not options.is_linear
        if not isinstance(num_queries, int) or not isinstance(num_keys, int) or self.is_fitted:
            return False
        if options.memory:
            return causal and num_keys <= options.memory.size
        if not feature_map.estimates_kernel:
            return False
        below = options.exact_below
        if below is None:
            if training:
                return False
            groups = feature_map.num_query_heads // feature_map.num_heads
            sizes = feature_map.head_dim, feature_map.num_features, groups
            below = crossover(*sizes, causal=causal)
        # Whether the harmonic mean is less than `below`, without a division by zero.
        return 2 * num_queries * num_keys < below * (num_queries + num_keys)

    def attend(
        self,
        heads: Heads,
        *,
        training: bool | None = None,
        write_mask: Tensor = None,
        initial_state: AttentionState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, AttentionState | None]:
        """Attention between projected heads: observed, exact or linear.

        Args:
            heads: `Heads`, the outputs of the projections.
            training: bool. Whether the call is part of training.
            write_mask: bool, `(b, s)`: which tokens enter the state; `None` for all that are
                attended to.
            initial_state: state of the tokens before, or `None`.
            return_state: bool. Whether to return the state after these tokens.

        Returns:
            The output, `(b, t, n, v)`, and the state after these tokens or `None`.
        """
        if self.observer is not None:
            return self.observer(self, heads), initial_state
        query, key = heads.for_features(self.feature_map)
        goes_on = initial_state is not None or (return_state and bool(self.options.memory))
        lengths = query.shape[1], key.shape[1]
        if not goes_on and self.computes_exactly(*lengths, causal=heads.causal, training=training):
            if self.options.memory and self.is_linear:  # all tokens fit into it
                return heads.exact_output(), None
            state = None
            if return_state:
                enters = merge_masks(heads.key_mask, write_mask)
                state = self.feature_map.accumulate(key, heads.value, enters)
            query = self.feature_map.exact_query(query)
            return exact_dark_attention(query, key, heads.value, **heads.masks), state
        result = self.feature_map.attend(
            query,
            key,
            heads.value,
            causal=heads.causal,
            key_mask=heads.key_mask,
            write_mask=write_mask,
            initial_state=initial_state,
            return_state=return_state,
            chunk_size=self.options.chunk_size,
            remat=self.options.remat,
        )
        return result if return_state else (result, None)


@contextlib.contextmanager
def observed(
    layers: Iterable[FeatureAttention], observer: Observer, position_offset: Tensor = None
) -> Iterator[None]:
    """A context in which `observer(layer, heads)` computes the layers' attention.

    Args:
        layers: dark attention layers.
        observer: returns the output of attention, `(b, t, n, v)`.
        position_offset: int or scalar tensor added to all positions.
    """
    layers = list(layers)
    for layer in layers:
        layer.observer, layer.position_offset = observer, position_offset
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = layer.position_offset = None


@contextlib.contextmanager
def fitted(layers: Iterable[FeatureAttention]) -> Iterator[None]:
    """A context in which layers with `attention_mode="auto"` use features at any length.

    The texts to which features are fitted are shorter than those they are meant for.
    """
    before = [(layer, layer.is_fitted) for layer in layers]
    for layer, _ in before:
        layer.is_fitted = True
    try:
        yield
    finally:
        for layer, was_fitted in before:
            layer.is_fitted = was_fitted


@contextlib.contextmanager
def exactly(layers: Iterable[FeatureAttention]) -> Iterator[None]:
    """A context in which the layers compute softmax attention."""
    with observed(layers, lambda layer, heads: heads.exact_output()):
        yield


def build_at(layer: Layer, path: str) -> None:
    """Builds a layer under a path, the last name of which is its own."""
    *above, parent, _ = path.split("/")
    with keras.name_scope(parent, override_parent="/".join(above)):
        layer.build()


def without_masked(output: Tensor, query_mask: Tensor) -> Tensor:
    """`output`, `(b, t, n, v)`, with zeros for the queries that a mask `(b, t)` leaves out."""
    if query_mask is None:
        return output
    return ops.where(ops.cast(query_mask, "bool")[:, :, None, None], output, 0.0)


def drop_tokens(dropout: Layer, value: Tensor, training: bool | None) -> Tensor:
    """Drops whole tokens from `value` (b, s, k, v), per head, the same for every query."""
    if not dropout.rate:
        return value
    return value * dropout(ops.ones_like(value[..., :1]), training=training)
