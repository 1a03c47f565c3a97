"""The one verb of surgery: a stock object becomes dark, in place.

The object changes class, to a subclass of its own. Copying weights into a new object would double
the memory. Sharing layers with one would leave a stock object behind whose layers are dark, and
which saves itself as a softmax model.
"""

from collections.abc import Callable
from typing import Any

# Base of the classes that turn a stock class dark: type checkers can't know which stock class
# stands behind them.
Mixin: Any = object


def become(stock: Any, dark_cls: type, **attributes: Any) -> Any:
    """Makes a stock layer or model one of a subclass of its class, and returns it.

    Args:
        stock: a built layer or model.
        dark_cls: a subclass of its class.
        attributes: what to set on it besides, sublayers too.
    """
    stock.__class__ = dark_cls
    return give(stock, **attributes)


def give(layer: Any, **attributes: Any) -> Any:
    """Sets attributes, sublayers too, on a layer that Keras has locked, and returns it."""
    layer._tracker.unlock()
    try:
        for name, value in attributes.items():
            setattr(layer, name, value)
    finally:
        layer._lock_state()
    return layer


_MADE: dict[tuple[Callable[[Any], Any], Any], Any] = {}


def dark_subclass(make: Callable[[Any], Any], stock_cls: Any) -> Any:
    """The subclass of a stock class that `make` gives, made once.

    It has the stock class's name: a file of weights is read by the names of classes.
    """
    if (make, stock_cls) not in _MADE:
        _MADE[make, stock_cls] = make(stock_cls)
        _MADE[make, stock_cls].__module__ = "keras_darkformer.hub"
    return _MADE[make, stock_cls]
