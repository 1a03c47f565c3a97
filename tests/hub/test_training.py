"""`fit` moves what is trainable, the geometries above all, and nothing else."""

import keras
import numpy as np
import pytest
from backends import BACKEND

from keras_darkformer import convert_to_dark

from .models import dark, gemma, gemma2, gemma3, inputs, values

# For `compile`; elsewhere what Keras does by itself.
JIT = [False, pytest.param(True, marks=pytest.mark.slow)] if BACKEND == "tensorflow" else ["auto"]


def ids_and_labels():
    batch = inputs(14, 9, 5)
    return {
        "x": batch,
        "y": np.roll(batch["token_ids"], -1, axis=1),
        "sample_weight": batch["padding_mask"].astype("float32"),
    }


def fitted(model, data, jit="auto", epochs=2):
    """Losses, and which weights have moved, by path."""
    before = values(model)
    model.compile(optimizer=keras.optimizers.SGD(0.05), jit_compile=jit)
    history = model.fit(**data, batch_size=3, epochs=epochs, verbose=0)
    after = values(model)
    moved = {path for path, value in before.items() if (after[path] != value).any()}
    assert all(np.isfinite(value.astype("float32")).all() for value in after.values())
    assert np.isfinite(history.history["loss"]).all()
    return history.history["loss"], moved


def trainable(model):
    return {weight.path for weight in model.trainable_weights}


def feature_map_paths(model, name):
    return {path for path in values(model) if path.endswith(f"/feature_map/{name}")}


@pytest.mark.parametrize("jit", JIT)
def test_fit_moves_every_trainable_weight_and_no_projection(jit):
    model = convert_to_dark(gemma2(), num_features=16)
    losses, moved = fitted(model, ids_and_labels(), jit, epochs=5)
    assert moved == trainable(model)
    assert feature_map_paths(model, "geometry") <= moved
    assert not feature_map_paths(model, "projection") & moved
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_fit_on_strings_moves_every_geometry_and_no_projection(preprocessor, texts):
    model = convert_to_dark(gemma(preprocessor=preprocessor), num_features=16)
    _, moved = fitted(model, {"x": texts[:3]})
    assert feature_map_paths(model, "geometry") <= moved
    assert not feature_map_paths(model, "projection") & moved


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Converting")
def test_fit_moves_every_weight_of_gemma3():
    model = convert_to_dark(gemma3(num_layers=3), layers=[1, 2], num_features=16)
    _, moved = fitted(model, ids_and_labels())
    assert moved == trainable(model)
    assert len(feature_map_paths(model, "geometry") & moved) == 2


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("train_geometry", "train_projection"), [(False, False), (False, True), (True, True)]
)
def test_options_say_which_half_of_a_feature_map_is_trained(train_geometry, train_projection):
    options = {"train_geometry": train_geometry, "train_projection": train_projection}
    model = convert_to_dark(gemma(num_layers=1), num_features=16, **options)
    _, moved = fitted(model, ids_and_labels())
    assert moved == trainable(model)
    assert bool(feature_map_paths(model, "geometry") & moved) is train_geometry
    assert bool(feature_map_paths(model, "projection") & moved) is train_projection


@pytest.mark.slow
@pytest.mark.parametrize("jit", JIT)
def test_exact_mode_trains_its_geometries(jit):
    model = convert_to_dark(gemma(num_layers=1), attention_mode="exact")
    _, moved = fitted(model, ids_and_labels(), jit)
    assert moved == trainable(model)
    assert feature_map_paths(model, "geometry") <= moved


@pytest.mark.slow
@pytest.mark.parametrize("jit", JIT[-1:])
def test_fit_in_mixed_bfloat16_keeps_feature_maps_in_float32(jit):
    model = dark(gemma2(dtype="mixed_bfloat16"))
    losses, moved = fitted(model, ids_and_labels(), jit)
    assert np.isfinite(losses).all()
    assert moved == trainable(model)
    assert {w.dtype for w in model.weights if "/feature_map/" in w.path} == {"float32"}


@pytest.mark.parametrize("train_geometry", [True, False])
def test_lora_leaves_feature_maps_trainable_unless_told_otherwise(train_geometry):
    model = dark(gemma())
    model.backbone.enable_lora(2, train_geometry=train_geometry)
    trainable = {weight.path.split("/")[-1] for weight in model.trainable_weights}
    expected = {"lora_kernel_a", "lora_kernel_b"} | ({"geometry"} if train_geometry else set())
    assert trainable == expected
