"""Converted models of a user's own are saved, loaded and cloned dark, or an error says why not."""

import json

import keras
import numpy as np
import pytest
from backends import on_one_backend, to_numpy
from fresh_process import run_python
from keras.layers import MultiHeadAttention
from layers.helpers import assert_close

from keras_darkformer import calibrate, convert_to_dark

from .models import MODELS, WIDTH, Block, X, dark_layers_of, outputs


def dark(model, **options):
    return convert_to_dark(model, **{"num_features": 8} | options)


def saved_and_loaded(model, folder, **options):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras", **options)


@pytest.mark.parametrize("which", MODELS)
def test_a_model_is_saved_loaded_and_cloned_dark(which, tmp_path):
    model = dark(MODELS[which](), layers=[0, -1], num_features=[4, 8])
    expected, options = outputs(model, X), [x.options for x in dark_layers_of(model)]
    loaded = saved_and_loaded(model, tmp_path)
    assert type(loaded) is type(model)
    assert [x.options for x in dark_layers_of(loaded)] == options
    assert_close(outputs(loaded, X), expected)
    again = saved_and_loaded(loaded, tmp_path)
    assert_close(outputs(again, X), expected)
    if which != "own":
        clone = keras.models.clone_model(model)
        assert [x.options for x in dark_layers_of(clone)] == options
        clone.set_weights(model.get_weights())
        assert_close(outputs(clone, X), expected)


@pytest.mark.parametrize("which", MODELS)
def test_files_of_weights_belong_to_a_model_converted_alike(which, tmp_path):
    path = tmp_path / "model.weights.h5"
    model = dark(MODELS[which]())
    model.save_weights(path)
    twin = dark(MODELS[which]())
    twin.load_weights(path)
    assert_close(outputs(twin, X), outputs(model, X))
    with pytest.raises(ValueError, match="object <EinsumDense name=key"):
        MODELS[which]().load_weights(path)
    MODELS[which]().save_weights(path)
    with pytest.raises(ValueError, match="Weights of a softmax model are loaded into that model"):
        twin.load_weights(path)


@pytest.mark.parametrize("which", ["sequential", "own"])
def test_a_compiled_model_and_what_calibration_put_in_come_back(which, tmp_path, few_steps):
    model = dark(MODELS[which]())
    model.compile("adam", "mse")
    calibrate(model, X, method="clusters", refine=False, verbose=False)
    model.fit(X, np.zeros_like(outputs(model, X)), verbose=0)
    loaded = saved_and_loaded(model, tmp_path)
    assert {x.feature_map.kind for x in dark_layers_of(loaded)} == {"exponential"}
    assert_close(outputs(loaded, X), outputs(model, X))
    optimizers = [[to_numpy(v) for v in x.optimizer.variables] for x in (loaded, model)]
    for mine, theirs in zip(*optimizers, strict=True):
        np.testing.assert_array_equal(mine, theirs)


class Unregistered(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = MultiHeadAttention(2, 4)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


def test_a_class_that_is_not_registered_is_given_to_load_model(tmp_path):
    model = dark(keras.Sequential([keras.Input((None, WIDTH)), Unregistered()]))
    with pytest.raises(TypeError, match="Could not locate class 'Unregistered'"):
        saved_and_loaded(model, tmp_path)
    loaded = saved_and_loaded(model, tmp_path, custom_objects={"Unregistered": Unregistered})
    assert_close(outputs(loaded, X), outputs(model, X))
    assert (
        len(
            dark_layers_of(
                dark(keras.Sequential([keras.Input((None, WIDTH)), Unregistered()]), copy=True)
            )
        )
        == 1
    )


@keras.saving.register_keras_serializable("tests")
class Converting(keras.layers.Layer):
    """Converts the attention that it makes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = dark(MultiHeadAttention(2, 4))

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


def test_a_class_may_convert_what_it_makes(tmp_path):
    model = keras.Sequential([keras.Input((None, WIDTH)), Converting()])
    loaded = saved_and_loaded(model, tmp_path)
    assert type(loaded.layers[0]) is Converting
    assert len(dark_layers_of(loaded)) == 1
    assert_close(outputs(loaded, X), outputs(model, X))


@keras.saving.register_keras_serializable("tests")
class Growing(Block):
    """Makes one more attention layer than before where its config is read."""

    more = 0

    def build(self, shape):
        super().build(shape)
        self.others = [MultiHeadAttention(2, 4) for _ in range(self.more)]
        for layer in self.others:
            layer.build(shape, shape)


@keras.saving.register_keras_serializable("tests")
class Lazy(keras.layers.Layer):
    """Has its attention in a layer that makes it when it is called, and no `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.block = Block()

    def call(self, x):
        return self.block(x)


def test_a_class_that_does_not_make_what_it_had_is_refused_with_what_to_do(tmp_path):
    model = dark(keras.Sequential([keras.Input((None, WIDTH)), Growing()]))
    config = model.get_config()
    Growing.more = 1
    try:
        with pytest.raises(ValueError, match=r"had 2 attention .* makes 3 now.*load_weights"):
            keras.Sequential.from_config(config)
    finally:
        Growing.more = 0


@pytest.mark.filterwarnings("ignore:.build.. was called on layer 'lazy:UserWarning")
def test_attention_that_is_made_by_a_layer_in_one_without_build_comes_back_dark(tmp_path):
    model = dark(keras.Sequential([keras.Input((None, WIDTH)), Lazy()]))
    loaded = saved_and_loaded(model, tmp_path)
    assert len(dark_layers_of(loaded)) == 2
    assert_close(outputs(loaded, X), outputs(model, X))


SESSION = """
    import json, sys
    import keras, numpy as np
    sys.path.insert(0, "tests")
    folder, *names = sys.argv[1:]
    missing, found = [], {}
    for name in names:
        try:
            keras.saving.load_model(f"{folder}/{name}.keras")
        except Exception as error:
            missing.append(str(error))
    import anymodel.models as models

    for name in names:
        model = keras.saving.load_model(f"{folder}/{name}.keras")
        x = np.load(f"{folder}/x.npy")
        found[name] = [len(models.dark_layers_of(model)), models.outputs(model, x).tolist()]
    for name in names[:2]:
        model = models.MODELS[name]()
        models.convert_to_dark(model, num_features=8)
        model.load_weights(f"{folder}/{name}.weights.h5")
        assert models.outputs(model, x).tolist() == found[name][1]
    print(json.dumps([missing, found]))
"""


@on_one_backend
@pytest.mark.slow
def test_a_fresh_process_loads_it_dark(tmp_path):
    models = {name: dark(make()) for name, make in MODELS.items()}
    np.save(tmp_path / "x.npy", X)
    for name, model in models.items():
        model.save(tmp_path / f"{name}.keras")
        model.save_weights(tmp_path / f"{name}.weights.h5")
    missing, found = json.loads(run_python(SESSION, tmp_path, *models).splitlines()[-1])
    assert len(missing) == 3
    assert all("Could not locate class" in x for x in missing)
    for name, model in models.items():
        count, output = found[name]
        assert count == len(dark_layers_of(model))
        assert_close(np.asarray(output), outputs(model, X))


def test_a_layer_whose_shapes_keras_infers_comes_back_with_its_memory(tmp_path):
    """JAX is asked for them with a length that stands for any."""
    memory = {"sliding_window": 2, "num_sinks": 1, "cache_size": 1}
    model = dark(MODELS["sequential"](), layers=[-1], num_features=4, **memory)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    (layer,) = dark_layers_of(loaded)
    assert layer.feature_map.memory == (2, 1, 1)
    assert_close(outputs(loaded, X), outputs(model, X))
