"""Compiling a model again after its layers have changed."""

from typing import Any

import keras


def compile_anew(model: Any, like: Any = None) -> None:
    """Compiles a converted model as it, or the model `like`, was, with a fresh optimizer.

    What was compiled before computes softmax, and the optimizer does not know the new variables.
    """
    source = model if like is None else like
    model.train_function = model.test_function = model.predict_function = None
    if not source.compiled:
        return
    arguments = keras.tree.map_structure(
        _fresh, dict(source._compile_config.config), none_is_leaf=True
    )
    if hasattr(source, "sampler"):
        arguments["sampler"] = source.sampler
    model.compile(**arguments)


def _fresh(value: Any) -> Any:
    """An optimizer or metric of the same settings without what it has accumulated."""
    if isinstance(value, keras.optimizers.Optimizer | keras.metrics.Metric):
        return value.__class__.from_config(value.get_config())
    return value
