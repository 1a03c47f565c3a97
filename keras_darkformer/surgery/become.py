"""The one verb of surgery: a stock object becomes dark, in place.

The object changes its class to a subclass of it. Copying weights into a new object would double the
memory. Sharing layers with a new object would leave a stock object behind that has dark layers but
saves itself as a softmax model.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

# Base of the mixins that make a stock class dark: type checkers can't know which stock class they
# are combined with.
Mixin: Any = object


def become(stock: Any, dark_cls: type, **attributes: Any) -> Any:
    """Makes a stock layer or model an instance of a subclass of its class, and returns it.

    Args:
        stock: a built layer or model.
        dark_cls: a subclass of its class.
        attributes: attributes to set on it, which may be sublayers.
    """
    _note(stock, ["__class__"])
    stock.__class__ = dark_cls
    return give(stock, **attributes)


def give(layer: Any, **attributes: Any) -> Any:
    """Sets attributes, which may be sublayers, on a layer that Keras has locked, and returns it."""
    _note(layer, attributes)
    with _unlocked(layer):
        for name, value in attributes.items():
            setattr(layer, name, value)
    return layer


def put(model: Any, **attributes: Any) -> None:
    """Sets attributes that are not sublayers."""
    _note(model, attributes)
    for name, value in attributes.items():
        setattr(model, name, value)


def after_build(layer: Any, action: Callable[[], None]) -> None:
    """Calls `action()` once a layer, which is not built yet, has built itself."""
    build = layer.build

    @functools.wraps(build)  # Keras reads the names of its arguments
    def build_and_act(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        action()

    give(layer, build=build_and_act)


@contextlib.contextmanager
def as_stock(layer: Any) -> Iterator[None]:
    """Gives a dark object its stock class within the context, so that Keras treats it as stock."""
    dark_cls = type(layer)
    layer.__class__ = dark_cls.stock_cls
    try:
        yield
    finally:
        layer.__class__ = dark_cls


@contextlib.contextmanager
def undone_on_error() -> Iterator[None]:
    """Undoes on any error, or an interrupt, whatever this module has set within the context."""
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
    """An attribute of the object; a method of its class counts as missing."""
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
    """The subclass of a stock class that `make` gives, made only once.

    It has the name of the stock class, since files of weights are read by class name. Its module is
    the package of `make`, which users have to import before they load such a layer.
    """
    if (make, stock_cls) not in _MADE:
        _MADE[make, stock_cls] = make(stock_cls)
        _MADE[make, stock_cls].__module__ = ".".join(make.__module__.split(".")[:2])
    return _MADE[make, stock_cls]
