"""Conversions of Keras models in random states: whole or not at all, and what was theirs stays."""

import dataclasses
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import on_one_backend, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from keras_darkformer import convert_to_dark
from keras_darkformer.anymodel.finding import attention_layers

from .models import MODELS, WIDTH, X, dark_layers_of, outputs

OPTIONS = {
    "exact": {"attention_mode": "exact", "geometry_scale": 1.0, "num_features": 4},
    "linear": {"num_features": 4},
    "exponential": {"num_features": 4, "feature_map": "exponential"},
    "before": {"num_features": 4, "rope_geometry": "before"},
}


class Breaking(keras.optimizers.SGD):
    """Can't be made anew from its config."""

    def __init__(self, rate):
        super().__init__(rate)

    def get_config(self):
        return {}


OPTIMIZERS = {"sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9), "own": lambda: Breaking(0.1)}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A model, what was done to it, and how it is converted."""

    which: str
    frozen: bool
    adapted: str
    renamed: bool
    compiled: str
    fitted: bool
    held: bool  # by another model, compiled and called before
    copy: bool
    options: str
    layers: object


samples = st.builds(
    Sample,
    which=st.sampled_from(list(MODELS)),
    frozen=st.booleans(),
    adapted=st.sampled_from(["", "lora", "int8"]),
    renamed=st.booleans(),
    compiled=st.sampled_from(["", *OPTIMIZERS]),
    fitted=st.booleans(),
    held=st.booleans(),
    copy=st.booleans(),
    options=st.sampled_from(list(OPTIONS)),
    layers=st.sampled_from(["all", "auto", [-1], lambda layer: isinstance(layer, keras.Layer)]),
)


def state(model):
    """All that a refused conversion, or one of a copy, leaves as it was."""
    layers = [(id(x), type(x), x.name, x.trainable) for x in model._flatten_layers()]
    weights = [(id(w), w.path, w.trainable, to_numpy(w.value).tolist()) for w in model.weights]
    optimizer = model.optimizer if model.compiled else None
    slots = [to_numpy(v.value).tolist() for v in optimizer.variables] if optimizer else []
    return layers, weights, id(optimizer), slots


def prepare(sample):
    """The model in its state, and one that holds it or `None`."""
    model = MODELS[sample.which]()
    dense = attention_layers(model)[-1]._query_dense
    if sample.adapted == "lora":
        dense.enable_lora(2)
    elif sample.adapted == "int8":
        dense.quantize("int8")
    if sample.frozen:
        attention_layers(model)[0].trainable = False
    if sample.renamed:
        model.name = "mine"
    if sample.compiled:
        optimizer = OPTIMIZERS[sample.compiled]()
        model.compile(optimizer, "mse", jit_compile=False)
        if sample.fitted:
            train(model)
    holder = None
    if sample.held:
        holder = keras.Sequential([keras.Input((None, WIDTH)), model])
        holder.compile(loss="mse", jit_compile=False)
        holder.predict(X, verbose=0)
    return model, holder


def train(model):
    logs = model.train_on_batch(X, np.zeros(outputs(model, X).shape), return_dict=True)
    assert np.isfinite(logs["loss"])


def refusal(sample):
    if sample.options == "before":
        return "needs rotary positions"
    if sample.compiled == "own" and (sample.fitted or sample.copy):
        return "Breaking has to be made anew"
    return None


@on_one_backend
@given(samples)
@tried(0.1)
def test_a_conversion_is_whole_or_leaves_all_as_it_was(sample):
    keras.backend.clear_session()
    model, holder = prepare(sample)
    before, expected = state(model), outputs(model, X)
    options = OPTIONS[sample.options] | {"layers": sample.layers, "copy": sample.copy}
    if (match := refusal(sample)) is not None:
        with pytest.raises(ValueError, match=match):
            convert_to_dark(model, **options)
        assert state(model) == before
        return
    found = convert_to_dark(model, **options)
    assert (found is model) != sample.copy
    if sample.copy:
        assert state(model) == before
        assert not {id(x) for x in found.variables} & {id(x) for x in model.variables}
    stock = [w for w in found.weights if "/feature_map/" not in w.path]
    assert [w.trainable for w in stock] == [trainable for _, _, trainable, _ in before[1]]
    if not sample.copy:
        assert [w.path for w in stock] == [path for _, path, _, _ in before[1]]
    assert len(dark_layers_of(found)) == (
        1 if sample.layers == [-1] else len(attention_layers(found))
    )
    after = outputs(found, X)
    assert np.isfinite(after).all()
    if sample.options == "exact":
        assert np.abs(after - expected).max() < 1e-4
    assert found.compiled == bool(sample.compiled)
    if found.compiled:
        np.testing.assert_allclose(found.predict(X, verbose=0), after, rtol=1e-4, atol=1e-5)
        train(found)
    if holder is not None:
        # Compiled before, it computes what its model computes now.
        np.testing.assert_allclose(
            holder.predict(X, verbose=0), outputs(model, X), rtol=1e-4, atol=1e-5
        )
    if sample.adapted != "int8":  # which Keras can't load in its own layers
        assert_saved_whole(found)


def assert_saved_whole(model):
    expected = outputs(model, X)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path, compile=False)
    assert type(loaded) is type(model)
    assert len(dark_layers_of(loaded)) == len(dark_layers_of(model))
    np.testing.assert_allclose(outputs(loaded, X), expected, rtol=1e-4, atol=1e-5)
