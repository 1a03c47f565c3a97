"""What conversion has to know of Keras' own attention layers."""

from typing import Any

import keras

from keras_darkformer.types import Layer

STOCK_CLASSES = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
# What a subclass may have of its own beside a constructor: a dark layer has these itself.
_HARMLESS = {"get_config", "from_config"}


def is_of_keras_hub(model: Any) -> bool:
    """Whether a layer is a model of KerasHub, or of a subclass of one."""
    is_hub = any(cls.__module__.startswith("keras_hub.") for cls in type(model).__mro__)
    return is_hub and isinstance(model, keras.Model)


def stock_class(layer: Layer) -> Any:
    """Which of Keras' classes an attention layer is of."""
    return next(cls for cls in STOCK_CLASSES if isinstance(layer, cls))


def head_sizes(layer: Layer) -> tuple[int, int, int]:
    """Query heads, key/value heads and the size of a head, also of a layer that is not built."""
    if isinstance(layer, keras.layers.MultiHeadAttention):
        return layer.num_heads, layer.num_heads, layer.key_dim
    return layer.num_query_heads, layer.num_key_value_heads, layer.head_dim


def window_of(layer: Layer) -> int | None:
    """How near a key must be to a query, this one included; `None` for no such limit."""
    is_multi_head = isinstance(layer, keras.layers.MultiHeadAttention)
    return layer._sliding_window if is_multi_head else layer.sliding_window


def refusal(layer: Layer) -> str | None:
    """Why an attention layer can't be converted, or `None` if it can."""
    stock_cls = stock_class(layer)
    if changed := _overridden(type(layer), stock_cls):
        return (
            f"{type(layer).__name__} has its own {', '.join(f'`{name}`' for name in changed)}, and "
            f"what it changes there of {stock_cls.__name__} would be lost silently."
        )
    return refusal_of_axes(layer) if layer.built else None


def refusal_of_axes(layer: Layer) -> str | None:
    """Why a built attention layer can't be converted for the axes it attends along."""
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
