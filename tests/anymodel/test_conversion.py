"""`convert_to_dark` on functional, Sequential and subclassed models of Keras."""

import warnings

import keras
import numpy as np
import pytest
from backends import on_one_backend, to_numpy
from fresh_process import run_python
from keras.layers import GroupQueryAttention, MultiHeadAttention
from layers.helpers import assert_close, differ, normal

from keras_darkformer import (
    DarkTransformerBlock,
    RedrawProjections,
    approximation_report,
    calibrate,
    choose_layers,
    conversion_report,
    convert_to_dark,
    linearize,
    transfer_attention,
)

from .models import (
    MODELS,
    WIDTH,
    Block,
    X,
    dark_layers_of,
    functional,
    outputs,
    sequential,
    weights_of,
)

EXACT = {"attention_mode": "exact", "geometry_scale": 1.0}
PATHS = [
    "shared",
    "inside",
    "block/multi_head_attention",
    "block/grouped_query_attention",
    "time_distributed/pair/of_pair",
]


def dark(model, **options):
    return convert_to_dark(model, **{"num_features": 8} | options)


@pytest.mark.parametrize("which", MODELS)
def test_every_attention_layer_becomes_dark_in_place(which):
    model = MODELS[which]()
    expected, before = outputs(model, X), weights_of(model)
    kind = type(model)
    assert dark(model, **EXACT) is model
    assert isinstance(model, kind)
    assert len(dark_layers_of(model)) == (5 if which == "functional" else 2)
    assert_close(outputs(model, X), expected)
    after = weights_of(model)
    assert after.keys() == before.keys()
    assert all((after[path] == before[path]).all() for path in before)
    assert len({x.feature_map.options.seed for x in dark_layers_of(model)}) == len(
        dark_layers_of(model)
    )


def test_layers_come_in_order_once_each():
    keras.backend.clear_session()
    assert [x.path for x in dark_layers_of(dark(functional()))] == PATHS


CHOICES = {
    "indices": [0, -1],
    "names": ["shared", "of_pair"],
    "paths": ["shared", PATHS[-1]],
    "predicate": lambda layer: layer.name in ("shared", "of_pair"),
}


@pytest.mark.parametrize("which", CHOICES)
def test_layers_are_chosen(which):
    keras.backend.clear_session()
    model = dark(functional(), layers=CHOICES[which], num_features=[4, 8])
    found = [(x.path, x.feature_map.num_features) for x in dark_layers_of(model)]
    assert found == [(PATHS[0], 4), (PATHS[-1], 8)]


def test_layers_with_a_window_are_left_unless_they_are_meant():
    def model():
        x = keras.Input((None, WIDTH))
        y = MultiHeadAttention(2, 4, sliding_window=2, name="local")(x, x, use_causal_mask=True)
        y = MultiHeadAttention(2, 4, name="global")(y, y, use_causal_mask=True)
        return keras.Model(x, y)

    assert [x.name for x in dark_layers_of(dark(model()))] == ["global"]
    every = dark(model(), layers="all")
    kinds = [(x.name, x.feature_map.kind) for x in dark_layers_of(every)]
    assert kinds == [("local", "none"), ("global", "dark")]


def test_auto_converts_what_can_be_and_warns_of_the_rest():
    x = inputs = keras.Input((None, WIDTH))
    for layer in (
        Scaled(2, 4, name="scaled"),
        MultiHeadAttention(2, 4, name="plain"),
        MultiHeadAttention(2, 4, name="local", sliding_window=2),
    ):
        x = layer(x, x)
    model = keras.Model(inputs, x)
    with pytest.warns(UserWarning, match="keep softmax attention. 'scaled': Scaled has its own"):
        dark(model, layers="auto")
    assert [x.path for x in dark_layers_of(model)] == ["plain"]
    refused(with_attention(Scaled(2, 4)), "No attention layer .* Scaled has", layers="auto")


@pytest.mark.parametrize("which", MODELS)
def test_a_copy_leaves_the_model_as_it_is(which):
    model = MODELS[which]()
    model.layers[-1].trainable = False
    expected = outputs(model, X)
    copy = dark(model, copy=True, **EXACT)
    assert type(model) is not type(copy) or which != "own"
    assert not dark_layers_of(model)
    assert len(dark_layers_of(copy)) == (5 if which == "functional" else 2)
    for found in (outputs(model, X), outputs(copy, X)):
        assert_close(found, expected)
    names = [[w.path for w in x.trainable_weights] for x in (model, copy)]
    stock = [name for name in names[1] if "/feature_map/" not in name]
    assert len(stock) == len(names[0])
    for weight in copy.weights:
        weight.assign(weight * 0)
    assert_close(outputs(model, X), expected)


@keras.saving.register_keras_serializable("tests")
class Unnamed(keras.layers.Layer):
    """Weights as Keras' guides make them, without names: Keras counts these itself."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), initializer="glorot_uniform")
        self.bias = self.add_weight(shape=shape[-1:], initializer="ones")

    def call(self, x):
        return x @ self.kernel + self.bias


def test_a_copy_takes_over_weights_that_have_no_names():
    x = keras.Input((None, WIDTH))
    model = keras.Model(x, MultiHeadAttention(2, 4)(*2 * [Unnamed()(x)]))
    assert_close(outputs(dark(model, copy=True, **EXACT), X), outputs(model, X))


def refused(model, match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        dark(model, **options)


class Scaled(MultiHeadAttention):
    def call(self, query, value, key=None):
        return 2.0 * super().call(query, value, key)


class Eight(MultiHeadAttention):
    def __init__(self, key_dim=4, **kwargs):
        super().__init__(num_heads=8, key_dim=key_dim, **kwargs)


def with_attention(layer, shape=(None, WIDTH)):
    x = keras.Input(shape)
    return keras.Model(x, layer(x, x))


def test_what_can_not_be_is_refused_with_the_reason_and_nothing_is_changed():
    model = functional()
    dark_one = dark(functional(), layers=[0])
    for options, match in (
        ({"rope_geometry": "before"}, "`rope_geometry='before'` needs rotary"),
        ({"layers": [5]}, r"indices of the model's 5 layers. Received: \[5\]"),
        ({"layers": ["shared", "nowhere"]}, r"Received: \['nowhere'\]; the model has \['shared"),
        ({"layers": lambda layer: False}, "chooses none"),
        ({"num_features": [1, 2]}, "one for each of the 5 converted layers"),
    ):
        refused(model, match, **options)
    refused(model, "no argument `num_sink`. Did you mean `num_sinks`", TypeError, num_sink=3)
    refused(dark_one, r"is dark already, in \['shared.*`convert_to_dark\(layer\)`")
    refused(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), "has no keras.layers.Mul")
    refused(keras.Sequential([Block()]), "Call it on a batch first. Not built are")
    refused(3, "is not a Keras model: 3")
    folded = with_attention(MultiHeadAttention(2, 4), (None, 3, WIDTH))
    refused(folded, r"'multi_head_attention.*axes \(1, 2\) of inputs of rank 4.*Reshape its inputs")
    alone = MultiHeadAttention(2, 4, attention_axes=2)
    refused(with_attention(alone, (None, 3, WIDTH)), r"along the axes \(2,\)")
    refused(with_attention(Scaled(2, 4)), "Scaled has its own `call`, and what it changes there")
    assert not dark_layers_of(model)
    assert len(dark_layers_of(dark(with_attention(Eight())))) == 1
    unbuilt = dark(MultiHeadAttention(2, 4))
    with pytest.raises(ValueError, match=r"axes \(1, 2\) of inputs of rank 4"):
        unbuilt(normal(1, 2, 3, WIDTH), normal(1, 2, 3, WIDTH))


def test_a_layer_left_is_converted_by_itself():
    model = dark(functional(), layers=[0])
    dark(model.get_layer("block").attention, seed=7)
    assert len(dark_layers_of(model)) == 2
    assert np.isfinite(outputs(model, X)).all()


def test_after_an_error_all_is_as_it_was():
    inputs = keras.Input((None, WIDTH))
    x = Block(0.5)(MultiHeadAttention(2, 4)(inputs, inputs))
    model = keras.Model(inputs, x)
    expected, layers = outputs(model, X), [type(x) for x in model._flatten_layers()]
    paths = [w.path for w in model.weights]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(model, "drops from attention layers", UserWarning)
    assert [type(x) for x in model._flatten_layers()] == layers
    assert [w.path for w in model.weights] == paths
    assert_close(outputs(model, X), expected)
    with pytest.warns(UserWarning, match="drops from attention layers"):
        assert len(dark_layers_of(dark(model))) == 3


@on_one_backend
def test_a_model_that_was_compiled_is_compiled_again(few_steps):
    model = functional()
    target = normal(2, 6, 3, seed=5)[:, :3]
    optimizer = keras.optimizers.Adam(0.01)
    model.compile(optimizer, "mse", metrics=["mae"])
    model.fit(X, np.repeat(target[:, :3, None], 2, 2), verbose=0)
    before = model.predict(X, verbose=0)
    dark(model)
    assert differ(model.predict(X, verbose=0), before)
    assert_close(model.predict(X, verbose=0), outputs(model, X))
    assert model.optimizer is not optimizer
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)
    geometries = [to_numpy(x.feature_map.geometry.value) for x in dark_layers_of(model)]
    found = model.fit(X, np.repeat(target[:, :3, None], 2, 2), epochs=3, verbose=0).history
    assert found["loss"][-1] < found["loss"][0]
    assert "mae" in found
    for layer, geometry in zip(dark_layers_of(model), geometries, strict=True):
        assert (to_numpy(layer.feature_map.geometry.value) != geometry).any(), layer.path


def test_frozen_layers_stay_frozen():
    model = functional()
    model.get_layer("block").trainable = False
    before = [w.path for w in model.trainable_weights]
    dark(model)
    after = [w.path for w in model.trainable_weights]
    assert [path for path in after if "/feature_map/" not in path] == before
    assert len(after) - len(before) == len(dark_layers_of(model)), "geometries train alone"
    model.trainable = False
    assert not model.trainable_weights


def test_a_converted_model_is_calibrated_transferred_judged_and_redrawn(few_steps):
    model = sequential()
    exact = outputs(model, X)
    dark(model, num_features=64)
    before = np.abs(outputs(model, X) - exact).mean()
    calibrate(model, X, refine=False, verbose=False)
    fitted = [to_numpy(x.feature_map.projection.value) for x in dark_layers_of(model)]
    loss = transfer_attention(
        model, X, steps=4, learning_rate=1e-2, validate_every=2, verbose=0
    ).history["loss"]
    assert loss[-1] < loss[0]
    assert np.abs(outputs(model, X) - exact).mean() < before
    report = approximation_report(model, X)
    assert [layer["name"] for layer in report["layers"]] == [x.path for x in dark_layers_of(model)]
    redraw = RedrawProjections(every=1)
    redraw.set_model(model)
    redraw.on_train_batch_end(0)
    for layer, projection in zip(dark_layers_of(model), fitted, strict=True):
        assert (to_numpy(layer.feature_map.projection.value) != projection).any()


def test_a_window_counts_when_a_model_is_judged():
    x = keras.Input((None, WIDTH))
    y = GroupQueryAttention(4, 2, 1, sliding_window=2)(x, x, use_causal_mask=True)
    model = dark(keras.Model(x, y), layers="all")
    (layer,) = approximation_report(model, X)["layers"]
    assert max(head["relative_error"]["dark"] for head in layer["heads"]) < 1e-4


def test_a_converted_model_inside_another_one():
    inner = dark(sequential())
    inputs = keras.Input((None, WIDTH))
    x = DarkTransformerBlock(8, 2, num_features=4)(inputs)
    outer = keras.Model(inputs, inner(x))
    assert len(dark_layers_of(outer)) == 2
    assert_close(outputs(keras.Model(x, inner(x)), X), outputs(inner, X))
    refused(outer, "is dark already")


@pytest.mark.slow
@on_one_backend
def test_keras_hub_is_not_needed_and_not_imported():
    code = """
        import sys
        sys.modules["keras_hub"] = None
        import keras, keras_darkformer
        layer = keras.layers.MultiHeadAttention(2, 4)
        keras_darkformer.convert_to_dark(layer, num_features=4)
        print(layer(keras.ops.ones((1, 3, 8)), keras.ops.ones((1, 3, 8))).shape[2])
    """
    assert run_python(code).split()[-1] == "8"


def test_the_report_says_what_was_converted(tmp_path):
    x = inputs = keras.Input((None, WIDTH))
    x = MultiHeadAttention(2, 4, name="plain", dropout=0.5)(x, x)
    x = MultiHeadAttention(2, 8, name="local", sliding_window=2)(x, x, use_causal_mask=True)
    model = keras.Model(inputs, x)
    with pytest.raises(ValueError, match="be a model converted by `convert_to_dark`"):
        conversion_report(model)
    with pytest.warns(UserWarning, match=r"drops from attention layers \[0\]: dropout"):
        dark(model, num_features=8)
    model.save(tmp_path / "model.keras")
    report = conversion_report(keras.saving.load_model(tmp_path / "model.keras"))
    assert (report["converted"], report["left"], report["num_features"]) == ([0], [1], 8)
    assert [(x["name"], x["kind"]) for x in report["layers"]] == [
        ("plain", "global"),
        ("local", "local"),
    ]
    (drop,) = report["dropped"]
    assert drop["layers"] == [0]
    every = conversion_report(dark(keras.models.clone_model(model).get_layer("local")))
    assert (every["sliding_window"], every["num_features"]) == (2, 0)


def test_the_report_lists_what_differs_between_layers():
    x = inputs = keras.Input((None, WIDTH))
    for key_dim in (4, 16):
        x = MultiHeadAttention(2, key_dim)(x, x)
    report = conversion_report(dark(keras.Model(inputs, x), num_features=[4, 8]))
    assert report["num_features"] == [4, 8]
    assert len(set(report["geometry_scale"])) == 2
    told = " I and ".join(f"{scale:.3g}" for scale in report["geometry_scale"])
    assert f"geometry starts at {told} I" in str(report)


def test_models_around_a_converted_one_are_compiled_again():
    inner = functional()
    outer = keras.Sequential([keras.Input((None, WIDTH)), inner])
    outer.compile("sgd", "mse")
    before = outer.predict(X, verbose=0)
    dark(inner)
    after = outer.predict(X, verbose=0)
    assert np.abs(after - before).max() > 1e-4
    assert_close(after, outputs(inner, X))


def test_what_needs_keras_hub_says_so():
    for function in (choose_layers, linearize):
        options = {"keep_exact": 1} if function is choose_layers else {}
        with pytest.raises(ValueError, match="It is not a KerasHub model"):
            function(functional(), X, **options)
