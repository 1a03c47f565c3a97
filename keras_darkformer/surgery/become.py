"""The one verb of surgery: a stock object becomes dark, in place.

The object changes class, to a subclass of its own. Copying weights into a new object would double
the memory. Sharing layers with one would leave a stock object behind whose layers are dark, and
which saves itself as a softmax model.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

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
    _note(stock, ["__class__"])
    stock.__class__ = dark_cls
    return give(stock, **attributes)


def give(layer: Any, **attributes: Any) -> Any:
    """Sets attributes, sublayers too, on a layer that Keras has locked, and returns it."""
    _note(layer, attributes)
    with _unlocked(layer):
        for name, value in attributes.items():
            setattr(layer, name, value)
    return layer


def put(model: Any, **attributes: Any) -> None:
    """Sets attributes that are no sublayers."""
    _note(model, attributes)
    for name, value in attributes.items():
        setattr(model, name, value)


def after_build(layer: Any, action: Callable[[], None]) -> None:
    """Has `action()` follow once a layer, which is not built yet, has built itself."""
    build = layer.build

    @functools.wraps(build)  # Keras reads the names of its arguments
    def build_and_act(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        action()

    give(layer, build=build_and_act)


@contextlib.contextmanager
def as_stock(layer: Any) -> Iterator[None]:
    """Has a dark object be of its stock class, as which Keras then takes it."""
    dark_cls = type(layer)
    layer.__class__ = dark_cls.stock_cls
    try:
        yield
    finally:
        layer.__class__ = dark_cls


@contextlib.contextmanager
def undone_on_error() -> Iterator[None]:
    """Puts back on any error, an interrupt too, whatever was set in here by this module."""
    undo: list[Callable[[], None]] = []
    token = _UNDO.set(undo)
    try:
        yield
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    finally:
        _UNDO.reset(token)


_UNDO: contextvars.ContextVar[list[Callable[[], None]] | None]
_UNDO = contextvars.ContextVar("undo", default=None)
_MISSING = object()


def _note(layer: Any, names: Iterable[str]) -> None:
    undo = _UNDO.get()
    if undo is not None:
        before = {name: _value(layer, name) for name in names}
        undo.append(lambda: _put_back(layer, before))


def _value(layer: Any, name: str) -> Any:
    """An attribute; a method of the class is none of the object's own."""
    value = getattr(layer, name, _MISSING)
    return _MISSING if inspect.ismethod(value) and name not in vars(layer) else value


def _put_back(layer: Any, before: dict[str, Any]) -> None:
    with _unlocked(layer):
        for name, value in before.items():
            new = getattr(layer, name, _MISSING)
            if isinstance(new, keras.Layer):
                layer._tracker.untrack(new)
            if value is not _MISSING:
                setattr(layer, name, value)
            elif new is not _MISSING:
                delattr(layer, name)


@contextlib.contextmanager
def _unlocked(layer: Any) -> Iterator[None]:
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._lock_state()


_MADE: dict[tuple[Callable[[Any], Any], Any], Any] = {}


def dark_subclass(make: Callable[[Any], Any], stock_cls: Any) -> Any:
    """The subclass of a stock class that `make` gives, made once.

    It has the stock class's name, as a file of weights is read by the names of classes, and the
    package of `make`, which a user has to import before such a layer is loaded.
    """
    if (make, stock_cls) not in _MADE:
        _MADE[make, stock_cls] = make(stock_cls)
        _MADE[make, stock_cls].__module__ = ".".join(make.__module__.split(".")[:2])
    return _MADE[make, stock_cls]
