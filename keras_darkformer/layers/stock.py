"""Properties of Keras' own attention layers."""

import dataclasses
from typing import Any

import keras

from keras_darkformer.layers.dense import DenseOptions
from keras_darkformer.types import Config, Layer

STOCK_CLASSES = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
# Subclasses that compute something else, and that also have dark layers.
_KNOWN_SUBCLASSES: list[type] = []
# What a subclass may override besides the constructor, since a dark layer has its own.
_HARMLESS = {"get_config", "from_config"}


def know_subclass(cls: type) -> None:
    """Makes `stock_class` distinguish a subclass of a Keras attention layer from that layer."""
    _KNOWN_SUBCLASSES.append(cls)


def stock_class(layer: Layer) -> Any:
    """The Keras class, or the known subclass of one, to which an attention layer belongs."""
    known = (*STOCK_CLASSES, *_KNOWN_SUBCLASSES)
    return next(cls for cls in type(layer).__mro__ if cls in known)


def head_sizes(layer: Layer) -> tuple[int, int, int]:
    """Query heads, key/value heads and head size of a layer, which need not be built."""
    if isinstance(layer, keras.layers.MultiHeadAttention):
        return layer.num_heads, layer.num_heads, layer.key_dim
    return layer.num_query_heads, layer.num_key_value_heads, layer.head_dim


def window_of(layer: Layer) -> int | None:
    """The sliding window of a layer, the query's own position included; `None` for none."""
    is_multi_head = isinstance(layer, keras.layers.MultiHeadAttention)
    return layer._sliding_window if is_multi_head else layer.sliding_window


def refusal(layer: Layer, stock_cls: Any) -> str | None:
    """Why an attention layer can't take the place of one of a stock class, or `None` if it can."""
    if changed := _overridden(type(layer), stock_cls):
        return (
            f"{type(layer).__name__} has its own {', '.join(f'`{name}`' for name in changed)}, and "
            f"what it changes there of {stock_cls.__name__} would be lost silently."
        )
    return refusal_of_axes(layer) if layer.built else None


def refusal_of_axes(layer: Layer) -> str | None:
    """Why the axes that a built attention layer attends along can't be converted, or `None`."""
    axes = getattr(layer, "_attention_axes", (1,))
    rank = len(layer._query_dense.partial_output_shape)
    if rank == 3 and tuple(axes) == (1,):
        return None
    return (
        f"It attends along the axes {tuple(axes)} of inputs of rank {rank}, and linear attention "
        "sums along one axis, that of the tokens. Reshape its inputs to (batch, tokens, features) "
        "and leave `attention_axes` out."
    )


def _overridden(cls: type, stock_cls: type) -> list[str]:
    """Methods and properties that a subclass has instead of those of its stock class."""
    own = [vars(x) for x in cls.__mro__[: cls.__mro__.index(stock_cls)]]
    names = {name for found in own for name in found if hasattr(stock_cls, name)}
    return sorted(name for name in names - _HARMLESS if name == "__call__" or name[:2] != "__")


def equivalent(layer: Layer) -> Config:
    """The arguments of a `DarkAttention` that can take the weights of an attention layer.

    Raises:
        ValueError: if there is no such layer; the message gives the reason.
    """
    if not isinstance(layer, STOCK_CLASSES) or not layer.built:
        raise ValueError(
            "`layer` must be a built keras.layers.MultiHeadAttention or GroupQueryAttention. "
            f"Received: {layer!r}"
        )
    stock_cls = next(cls for cls in STOCK_CLASSES if isinstance(layer, cls))
    num_query_heads, num_heads, head_dim = head_sizes(layer)
    reason = refusal(layer, stock_cls)
    if hasattr(layer, "_gate_dense"):
        reason = "It has a gate (`use_gate=True`)."
    elif layer._value_dense.partial_output_shape[-1] != head_dim:
        reason = f"Its values are of another size than its keys, {head_dim}."
    elif layer._output_dense.kernel.shape[2:] != layer._query_dense.kernel.shape[:1]:
        reason = "Its output is of another size than its queries (`output_shape`)."
    if reason is not None:
        raise ValueError(
            f"`DarkAttention` can't take the place of {layer.path!r}. {reason} Use "
            "`keras_darkformer.convert_to_dark(layer)`."
        )
    config = layer.get_config()
    dense = {field.name for field in dataclasses.fields(DenseOptions)}
    arguments = {name: config[name] for name in dense & config.keys()}
    if (window := window_of(layer)) is not None:
        arguments |= {"feature_map": "none", "sliding_window": window}
    return arguments | {
        "head_dim": head_dim,
        "num_query_heads": num_query_heads,
        "num_key_value_heads": num_heads,
        "dropout": layer.dropout,
        "trainable": layer.trainable,
        "dtype": layer.dtype_policy,
    }
