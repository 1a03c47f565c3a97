"""Compiling models again after their layers have changed."""

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

from keras_darkformer.ops.backend import track_variables
from keras_darkformer.types import Config, Layer, Model


def recompilations(
    models: Iterable[Model], layers: Iterable[Layer], like: Iterable[Model] | None = None
) -> Callable[[], None]:
    """Like `recompilation`, for several models and all others that hold any of these layers.

    Otherwise, the compiled functions of another model would silently ignore the change.

    Args:
        models: the models.
        layers: the layers that change.
        like: the models that `models` were copied from, in the same order. No other model then
            holds the layers.

    Raises:
        ValueError: if an optimizer must be recreated but can't be from its config.
    """
    models = list(models)
    if like is not None:
        compilations = [recompilation(*pair) for pair in zip(models, like, strict=True)]
    else:
        compilations = [recompilation(model) for model in models]
        for model in _holders(layers):
            if any(model is x for x in models):
                continue
            try:
                compilations.append(recompilation(model))
            except ValueError as error:
                raise ValueError(
                    f"{model.name!r} holds layers that would change: {error}"
                ) from error

    def compile_anew() -> None:
        for compile_one in compilations:
            compile_one()

    return compile_anew


def _holders(layers: Iterable[Layer]) -> Iterator[Model]:
    """All live models that hold any of these layers, directly or nested.

    A layer does not know which models hold it.
    """
    wanted = {id(layer) for layer in layers}
    for found in gc.get_objects():
        # Checks the type, since asking a proxy object for its class may have any effect.
        is_made = issubclass(type(found), keras.Model) and hasattr(found, "_layers")
        if is_made and not wanted.isdisjoint(map(id, found._flatten_layers())):
            yield found


def recompilation(model: Any, like: Any = None) -> Callable[[], None]:
    """A function that compiles a changed model again, as it or the model `like` was compiled.

    Functions compiled before compute something else, and an optimizer that has been built does not
    know the new variables. Losses, metrics, learning rates and samplers are kept as the same
    objects, and so is an optimizer that no `fit` has built. Everything that can fail fails here,
    not in the returned function.

    Args:
        model: a Keras model.
        like: another model, whose settings are used. The two then share nothing that accumulates.

    Raises:
        ValueError: if the optimizer must be recreated but can't be from its config.
    """
    source = model if like is None else like
    arguments: Config = {}
    if source.compiled:
        arguments = dict(source._compile_config.config)
        optimizer = arguments["optimizer"]
        if optimizer is not None and (model is not source or optimizer.built):
            arguments["optimizer"] = made_anew(optimizer)
        if model is not source:
            for name in ("metrics", "weighted_metrics"):
                arguments[name] = keras.tree.map_structure(
                    _of_its_own, arguments[name], none_is_leaf=True
                )
        # Keras does not record this anywhere.
        arguments["auto_scale_loss"] = isinstance(
            source.optimizer, keras.optimizers.LossScaleOptimizer
        )

    def compile_anew() -> None:
        track_variables(model._flatten_layers())
        model.train_function = model.test_function = model.predict_function = None
        if hasattr(source, "generate_function"):
            model.generate_function, model.sampler = None, source.sampler
        if arguments:
            # Whatever a user's own `compile` does besides has been done already.
            keras.Model.compile(model, **arguments)
            model.reset_metrics()

    return compile_anew


def knows_variables(optimizer: Any, model: Any) -> bool:
    """Whether an optimizer is built, or belongs to a model that is compiled with it."""
    its = getattr(model, "optimizer", None)
    known = its is not None and any(
        optimizer is x for x in (its, getattr(its, "inner_optimizer", 0))
    )
    return known or getattr(optimizer, "built", False)


def made_anew(optimizer: Any, kind: Any = None) -> Any:
    """A new optimizer with the settings of another one and no variables yet.

    Args:
        optimizer: a `keras.optimizers.Optimizer`.
        kind: a subclass of its class to make instead, or `None`.

    Raises:
        ValueError: if the optimizer can't be made from its config.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = made_anew(optimizer.inner_optimizer, kind)
        names = ("initial_scale", "dynamic_growth_steps", "name")
        return type(optimizer)(inner, **{name: getattr(optimizer, name) for name in names})
    try:
        config = _config(optimizer)
        if forgotten := left_out(type(optimizer), config):
            told = ", ".join(f"`{argument}`" for argument in forgotten)
            raise ValueError(f"its config leaves out {told}")
        fresh = (kind or type(optimizer)).from_config(config)
    except Exception as error:  # a user's class may raise anything
        raise ValueError(
            f"{type(optimizer).__name__} has to be made anew for new variables, and can't be: "
            f"{error}. Nothing was changed. Give it a `get_config` that has all its arguments. If "
            "the model was compiled with it, compile it with another optimizer first, such as "
            '`model.compile("sgd")`, and with this one afterwards.'
        ) from error
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(optimizer, name):  # not part of the config
            setattr(fresh, name, getattr(optimizer, name))
    return fresh


def _config(optimizer: Any) -> Config:
    """An optimizer's config, with a learning-rate schedule in it as the object itself.

    A user's own schedule may have no config, or one that Keras can't rebuild it from. The config is
    therefore taken from a stand-in that has all attributes of the optimizer except the schedule.
    """
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return optimizer.get_config()
    stand_in = object.__new__(type(optimizer))
    rate = optimizer._learning_rate
    is_variable = isinstance(rate, keras.Variable)
    vars(stand_in).update(vars(optimizer) | {"_learning_rate": rate if is_variable else 0.0})
    config = stand_in.get_config()
    return config if is_variable else {**config, "learning_rate": rate}


def _of_its_own(metric: Any) -> Any:
    """A new metric with the same settings, or the metric itself if its config lacks any."""
    if not isinstance(metric, keras.metrics.Metric):
        return metric
    try:
        config = metric.get_config()
        return metric if left_out(type(metric), config) else type(metric).from_config(config)
    except Exception:  # a user's class may raise anything
        return metric


def left_out(made: Any, config: Config) -> list[str]:
    """The arguments of a class's constructor that a config does not have."""
    return [
        name
        for name, argument in list(inspect.signature(made.__init__).parameters.items())[1:]
        if argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
        and name not in config
    ]
