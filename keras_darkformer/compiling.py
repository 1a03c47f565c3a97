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
    """As `recompilation`, of models and of all others that hold some of these layers of theirs.

    What another model has compiled would go on as if its layers had not changed, silently.

    Args:
        models: the models.
        layers: those of their layers that change.
        like: the models that these are twins of, which are then held by no others, in their order.

    Raises:
        ValueError: if an optimizer has to be made anew and its config does not tell how.
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
    """All models there are that hold some of these layers, be it deep in other layers.

    A layer does not know what holds it.
    """
    wanted = {id(layer) for layer in layers}
    for found in gc.get_objects():
        # By its type: asked for its class, a proxy of anything may do anything.
        is_made = issubclass(type(found), keras.Model) and hasattr(found, "_layers")
        if is_made and not wanted.isdisjoint(map(id, found._flatten_layers())):
            yield found


def recompilation(model: Any, like: Any = None) -> Callable[[], None]:
    """How to compile a model again, once it has changed, as it, or the model `like`, was.

    What was compiled before computes something else, and an optimizer that has been built does not
    know the new variables. Losses, metrics, learning rates and samplers stay the objects that they
    are; so does an optimizer that no `fit` has built. All that could go wrong goes wrong here, not
    in what is returned.

    Args:
        model: a Keras model.
        like: another one, which shall share nothing with it that accumulates.

    Raises:
        ValueError: if the optimizer has to be made anew and its config does not tell how.
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
        # Keras notes it down nowhere.
        arguments["auto_scale_loss"] = isinstance(
            source.optimizer, keras.optimizers.LossScaleOptimizer
        )

    def compile_anew() -> None:
        track_variables(model._flatten_layers())
        model.train_function = model.test_function = model.predict_function = None
        if hasattr(source, "generate_function"):
            model.generate_function, model.sampler = None, source.sampler
        if arguments:
            # A `compile` of the user's own has done what it does besides.
            keras.Model.compile(model, **arguments)
            model.reset_metrics()

    return compile_anew


def knows_variables(optimizer: Any, model: Any) -> bool:
    """Whether an optimizer has been built, or will be for a model that is compiled with it."""
    its = getattr(model, "optimizer", None)
    known = its is not None and any(
        optimizer is x for x in (its, getattr(its, "inner_optimizer", 0))
    )
    return known or getattr(optimizer, "built", False)


def made_anew(optimizer: Any, kind: Any = None) -> Any:
    """An optimizer with the settings of another one that knows no variables yet.

    Args:
        optimizer: a `keras.optimizers.Optimizer`.
        kind: a subclass of its class for the new one, or `None`.

    Raises:
        ValueError: if its config does not tell how.
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
    except Exception as error:  # whatever a class of the user's own does
        raise ValueError(
            f"{type(optimizer).__name__} has to be made anew for new variables, and can't be: "
            f"{error}. Nothing was changed. Give it a `get_config` that has all its arguments. If "
            "the model was compiled with it, compile it with another optimizer first, such as "
            '`model.compile("sgd")`, and with this one afterwards.'
        ) from error
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(optimizer, name):  # no part of the config
            setattr(fresh, name, getattr(optimizer, name))
    return fresh


def _config(optimizer: Any) -> Config:
    """An optimizer's config, with a learning-rate schedule in it as it is.

    A schedule of the caller's own may be one that Keras can not rebuild from a config, or that has
    none. So the config is taken of a stand-in which has all attributes of the optimizer but the
    schedule.
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
    """A metric of the same settings, or the metric itself if its config does not tell them."""
    if not isinstance(metric, keras.metrics.Metric):
        return metric
    try:
        config = metric.get_config()
        return metric if left_out(type(metric), config) else type(metric).from_config(config)
    except Exception:  # whatever a class of the user's own does
        return metric


def left_out(made: Any, config: Config) -> list[str]:
    """The arguments of a class's constructor that a config does not have."""
    return [
        name
        for name, argument in list(inspect.signature(made.__init__).parameters.items())[1:]
        if argument.kind in (argument.POSITIONAL_OR_KEYWORD, argument.KEYWORD_ONLY)
        and name not in config
    ]
