"""Models of a user's own that hold what was converted, by its tensors too, stay dark."""

import copy
import json

import keras
import numpy as np
import pytest
from backends import BACKEND, further, on_one_backend, to_numpy
from fresh_process import run_python

from keras_darkformer import (
    RedrawProjections,
    approximation_report,
    calibrate,
    convert_to_dark,
)
from keras_darkformer.hub.attention import DarkHubAttention
from keras_darkformer.hub.families import FAMILIES

from .models import (
    attentions,
    blocks,
    body,
    dark,
    gemma,
    inputs,
    outputs,
    row,
    task_of,
    values,
)

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

# One of each kind, and all of them where nothing has to be compiled.
KINDS = ("Gemma", "Llama", "Bert")
ASKED = [family.name for family in FAMILIES] if BACKEND == "torch" else KINDS
BATCH = inputs(14, 5, 9)
OPTIONS = [
    {"attention_mode": "exact"},
    {"attention_mode": "exact", "rope_geometry": "before"},
    {"sliding_window": 3, "num_sinks": 1, "cache_size": 2, "layers": [1]},
    {"feature_map": "none", "sliding_window": 3},
]
ONE = {"num_features": 8, "layers": "all"}


def on_top_of(tensors, inputs):
    """A functional model that holds the layers behind tensors of a backbone, not the backbone."""
    tensors = tensors["sequence_output"] if isinstance(tensors, dict) else tensors
    return keras.Model(inputs, keras.layers.Dense(3, name="top")(tensors))


def holder(model):
    """Such a model over all of a task's backbone."""
    return on_top_of(body(model).output, body(model).input)


def dark_layers_of(model):
    return [x for x in model._flatten_layers() if isinstance(x, DarkHubAttention)]


def saved_and_loaded(model, folder):
    path = folder / "model.keras"
    model.save(path)
    return keras.saving.load_model(path)


@pytest.mark.parametrize("name", ASKED)
def test_a_model_over_tensors_of_a_backbone_is_saved_and_cloned_dark(name, tmp_path):
    task = dark(task_of(name, 2), **ONE)
    model, batch = holder(task), inputs(14, 5, 9, model=body(task))
    expected = outputs(model, batch)
    loaded = saved_and_loaded(model, tmp_path)
    assert len(dark_layers_of(loaded)) == 2
    np.testing.assert_array_equal(outputs(loaded, batch), expected)

    clone = keras.models.clone_model(model)
    assert len(dark_layers_of(clone)) == 2
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(outputs(clone, batch), expected)
    if "Moe" not in name and name != "Mixtral":  # whose experts take their names from a counter
        assert values(clone).keys() == values(loaded).keys() == values(model).keys()


@pytest.mark.parametrize("name", ASKED)
def test_a_block_and_its_attention_come_back_dark_from_their_configs(name, rng):
    model = dark(task_of(name, 1), **ONE)
    x = rng.standard_normal((2, 6, body(model).hidden_dim)).astype("float32")
    (attention,) = attentions(model)
    two = [x, x] if isinstance(attention, keras.layers.MultiHeadAttention) else [x]
    for layer, call in ((*blocks(model), [x]), (attention, two)):
        config = json.loads(json.dumps(layer.get_config()))
        again = type(layer).from_config(config)
        if not again.built:
            again.build_from_config(layer.get_build_config())
        assert json.loads(json.dumps(again.get_config())) == config
        assert again.autocast is False
        again.set_weights(layer.get_weights())
        found, expected = (keras.tree.flatten(x(*call))[0] for x in (again, layer))
        np.testing.assert_array_equal(to_numpy(found), to_numpy(expected))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_dark_layers_are_registered_by_family(family):
    for role, stock in (("Block", family.block), ("Attention", family.attention)):
        name = f"keras_darkformer>Dark{family.name}{role}"
        cls = keras.saving.get_registered_object(name)
        assert issubclass(cls, stock)
        assert (cls.family, cls.stock_cls, cls.__name__) == (family, stock, stock.__name__)
        assert keras.saving.get_registered_name(cls) == name


@pytest.mark.parametrize("options", OPTIONS if BACKEND == "torch" else OPTIONS[:1], ids=str)
def test_every_option_comes_back(options, tmp_path):
    model = holder(dark(gemma(), num_features=8, **options))
    expected = outputs(model, BATCH)
    for again in (saved_and_loaded(model, tmp_path), copy.deepcopy(model)):
        found, source = ([x.options for x in dark_layers_of(y)] for y in (again, model))
        assert found == source
        assert found
        np.testing.assert_array_equal(outputs(again, BATCH), expected)


def test_a_map_that_calibration_put_in_comes_back(tmp_path):
    task = convert_to_dark(gemma(1), num_features=8)
    model = holder(task)
    calibrate(task, BATCH, method="clusters", refine=False, verbose=False)
    loaded = saved_and_loaded(model, tmp_path)
    assert [x.feature_map.kind for x in dark_layers_of(loaded)] == ["exponential"]
    np.testing.assert_array_equal(outputs(loaded, BATCH), outputs(model, BATCH))


@pytest.mark.parametrize("name", ["Gemma", "GPT2", "Bert"])  # stock Llamas can't be cloned
def test_a_backbone_is_cloned_as_the_stock_one_is(name):
    stock = task_of(name, 1).backbone
    batch = inputs(14, 5, 9, model=stock)
    kind = type(keras.models.clone_model(stock))
    backbone = dark(stock, **ONE)
    clone = keras.models.clone_model(backbone)
    assert type(clone) is kind
    assert len(dark_layers_of(clone)) == 1
    clone.set_weights(backbone.get_weights())
    np.testing.assert_array_equal(outputs(clone, batch), outputs(backbone, batch))


@pytest.mark.parametrize("options", [{}, {"attention_mode": "exact"}], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_stock_model_refuses_weights_of_a_dark_one(name, options, tmp_path):
    path, source = tmp_path / "dark.weights.h5", dark(task_of(name, 1), **ONE, **options)
    for part in (lambda task: task.backbone, holder):
        model, stock = part(source), part(task_of(name, 1))
        model.save_weights(path)
        with pytest.raises(ValueError, match="Layer 'key' expected"):
            stock.load_weights(path)
    twin = holder(convert_to_dark(task_of(name, 1), **ONE, **options))
    twin.load_weights(path)
    batch = inputs(14, 5, 9, model=model)
    np.testing.assert_array_equal(outputs(twin, batch), outputs(model, batch))


def test_a_stock_model_refuses_weights_of_an_exact_memory_alone(tmp_path):
    """Which has no weight that the stock model has not."""
    model = holder(dark(gemma(1), feature_map="none", sliding_window=3))
    model.save_weights(tmp_path / "dark.weights.h5")
    stock = holder(gemma(1))
    assert len(stock.weights) == len(model.weights)
    with pytest.raises(ValueError, match="Layer 'key' expected"):
        stock.load_weights(tmp_path / "dark.weights.h5")


class OfBlocks(keras.Model):
    """A model of the user's own that is made of a backbone's blocks."""

    def __init__(self, backbone):
        super().__init__()
        self.embedding, self.blocks = backbone.token_embedding, backbone.transformer_layers

    def call(self, inputs):
        x = self.embedding(inputs["token_ids"])
        for block in self.blocks:
            x = block(x, padding_mask=inputs["padding_mask"])
        return x


@pytest.mark.parametrize("options", [ONE, {"feature_map": "none", "sliding_window": 3}], ids=str)
def test_stock_blocks_in_a_subclassed_model_refuse_weights_of_dark_ones(options, tmp_path):
    """Keras looks twice for what a list of blocks holds, and forgets the first failure."""
    path, stock = tmp_path / "dark.weights.h5", OfBlocks(gemma(1).backbone)
    source, twin = (OfBlocks(convert_to_dark(gemma(1), **options).backbone) for _ in range(2))
    for model in (stock, source, twin):
        model(BATCH)
    source.save_weights(path)
    with pytest.raises(ValueError, match="could not be loaded"):
        stock.load_weights(path)
    twin.set_weights([0.0 * x for x in twin.get_weights()])
    twin.load_weights(path)
    np.testing.assert_array_equal(outputs(twin, BATCH), outputs(source, BATCH))


def test_weights_say_what_differs_before_any_is_set(tmp_path):
    task, fitted = (convert_to_dark(gemma(1), num_features=8) for _ in range(2))
    calibrate(fitted, BATCH, method="clusters", refine=False, verbose=False)
    before = task.get_weights()
    for part in (
        lambda x: x,
        lambda x: x.backbone,
        lambda x: blocks(x)[0],
        lambda x: attentions(x)[0],
    ):
        with pytest.raises(ValueError, match=r"with `feature_map='dark'`, and received .*clusters"):
            part(task).set_weights([0.0 * x for x in part(fitted).get_weights()])
    for x, y in zip(task.get_weights(), before, strict=True):
        np.testing.assert_array_equal(x, y)
    path = tmp_path / "model.weights.h5"
    holder(fitted).save_weights(path)
    differs = r"(?s)has the weights .*the file has .*'key_bias'.*`feature_map` among them"
    with pytest.raises(ValueError, match=differs):
        holder(task).load_weights(path)
    missing = r"no weights for 'feature_map', of `feature_map='dark'`.*`feature_map` among them"
    fitted.save_weights(path)
    with pytest.raises(ValueError, match=missing):
        task.load_weights(path)
    holder(gemma(1)).save_weights(path)
    with pytest.raises(ValueError, match=rf"{missing}.*Weights of a softmax model are loaded into"):
        holder(task).load_weights(path)


def test_a_layer_that_can_not_say_what_it_was_made_with_is_not_saved():
    model = convert_to_dark(row("Qwen3", num_layers=1), **ONE)
    (block,) = blocks(model)
    del block.head_dim
    with pytest.raises(
        ValueError, match=r"does not keep the `head_dim` .* Save the KerasHub model"
    ):
        holder(model).get_config()


class Towers(keras.Model):
    """Two converted backbones of one kind, one where KerasHub's tasks have theirs."""

    def __init__(self):
        super().__init__()
        self.backbone = convert_to_dark(gemma(2).backbone, num_features=8)
        self.others = [convert_to_dark(gemma(1), num_features=8)]
        self.top = keras.layers.Dense(3)

    def call(self, batch):
        batch = {"token_ids": batch["ids"], "padding_mask": batch["mask"]}
        return self.top(self.backbone(batch)) + self.top(self.others[0].backbone(batch))


def around(backbone):
    """A functional model that holds a backbone whole."""
    tensors = {name: keras.Input((None,), dtype="int32", name=name) for name in BATCH}
    return keras.Model(tensors, keras.layers.Dense(3)(backbone(tensors)))


HOLDERS = {
    "over its tensors": lambda: (holder(convert_to_dark(gemma(), num_features=8)), BATCH),
    "around it": lambda: (around(convert_to_dark(gemma(), num_features=8).backbone), BATCH),
    "towers": lambda: (Towers(), {"ids": BATCH["token_ids"], "mask": BATCH["padding_mask"]}),
}
NAMES = ["decoder_block_0/attention", "decoder_block_1/attention"]


@pytest.mark.parametrize("which", HOLDERS)
def test_dark_layers_are_found_wherever_they_are_held(which):
    model, batch = HOLDERS[which]()
    names = NAMES + ([f"{NAMES[0]}#2"] if which == "towers" else [])
    report = approximation_report(model, batch)
    assert [layer["name"] for layer in report["layers"]] == names
    before = values_of(model)
    calibrate(model, batch, method="spectral", refine=False, verbose=False)
    fitted = values_of(model)
    assert len(fitted) == len(names)
    assert all((x != y).any() for x, y in zip(before, fitted, strict=True))
    redraw = RedrawProjections(every=1)
    redraw.set_model(model)
    redraw.on_train_batch_end(0)
    assert all((x != y).any() for x, y in zip(fitted, values_of(model), strict=True))


def values_of(model):
    """The projections of the dark layers, by which one sees that they were fitted or drawn."""
    return [to_numpy(x.feature_map.projection.value) for x in dark_layers_of(model)]


def test_layers_are_calibrated_as_in_the_backbone_itself():
    """Layers come in the order they run: their draws hang on it."""
    task = convert_to_dark(gemma(), num_features=8)
    twin = convert_to_dark(gemma(), num_features=8)
    calibrate(task, BATCH, refine=False, verbose=False)
    calibrate(around(twin.backbone), BATCH, refine=False, verbose=False)
    expected, found = values(task), values(twin)
    for path in filter(lambda x: "/feature_map/" in x, expected):
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-5)


def stepped(model, optimizer=None):
    """The model compiled, and fitted without moving anything, and what it predicted."""
    model.compile(optimizer or keras.optimizers.SGD(0.0, momentum=0.9), "mse")
    return fitted_and_predicted(model)


def fitted_and_predicted(model):
    model.fit(BATCH, np.zeros((*BATCH["token_ids"].shape, 3)), batch_size=3, verbose=0)
    return model.predict(BATCH, verbose=0)


@pytest.mark.parametrize("how", ["over its tensors", *further("around it")])
def test_a_model_that_was_fitted_before_goes_on_with_what_it_holds_as_that_is_now(how):
    """Without features there is no new variable that a backend could see the change by."""
    options = {"num_features": 8} if how == "over its tensors" else OPTIONS[3]
    backbone = gemma(1).backbone
    build = around if how == "around it" else (lambda x: on_top_of(x.output, x.input))
    model, beside = build(backbone), on_top_of(backbone.token_embedding.output, backbone.input)
    stock, optimizer = stepped(model), model.optimizer
    stepped(beside)
    others = beside.optimizer
    convert_to_dark(backbone, copy=True, **options)
    assert model.optimizer is optimizer
    convert_to_dark(backbone, **options)
    expected = outputs(model, BATCH)
    assert np.abs(expected - stock).max() > 0.1
    predicted = fitted_and_predicted(model)
    np.testing.assert_allclose(predicted, expected, rtol=1e-3, atol=1e-3)
    assert type(model.optimizer) is type(optimizer)
    assert beside.optimizer is others  # holds nothing that has changed


def test_a_model_fitted_before_its_inner_one_is_calibrated_goes_on_with_the_new_maps():
    backbone = dark(gemma(1)).backbone
    model = around(backbone)
    before = stepped(model)
    calibrate(backbone, BATCH, method="clusters", refine=False, verbose=False)
    expected = outputs(model, BATCH)
    assert np.abs(expected - before).max() > 0.01
    predicted = fitted_and_predicted(model)
    np.testing.assert_allclose(predicted, expected, rtol=1e-3, atol=1e-3)


def test_another_task_of_a_backbone_is_compiled_anew():
    task = gemma(1)
    other = type(task)(task.backbone)
    stock = other.predict(BATCH, verbose=0)
    convert_to_dark(task, num_features=8)
    predicted = other.predict(BATCH, verbose=0)
    np.testing.assert_allclose(predicted, outputs(other, BATCH), rtol=1e-3, atol=1e-3)
    assert np.abs(predicted - stock).max() > 0.1


class Forgetful(keras.optimizers.SGD):
    """An optimizer whose config forgets an argument."""

    def __init__(self, mine=0.0, **kwargs):
        super().__init__(**{"learning_rate": mine} | kwargs)


def test_a_conversion_is_refused_that_a_model_around_could_not_follow():
    backbone = gemma(1).backbone
    model = around(backbone)
    model.compile(Forgetful(), "mse")
    model.optimizer.build(model.trainable_variables)
    cls, weights = type(backbone), [id(x) for x in backbone.weights]
    with pytest.raises(ValueError, match=rf"{model.name!r} holds .*Forgetful has to be made anew"):
        convert_to_dark(backbone)
    assert (type(backbone), [id(x) for x in backbone.weights]) == (cls, weights)
    model.compile("sgd", "mse")
    convert_to_dark(backbone)


def test_a_dark_layer_that_is_held_and_not_called_is_named():
    class Part(keras.Model):
        def __init__(self):
            super().__init__()
            self.backbone = convert_to_dark(gemma(), num_features=8).backbone

        def call(self, token_ids):
            return self.backbone.transformer_layers[0](self.backbone.token_embedding(token_ids))

    model, token_ids = Part(), BATCH["token_ids"]
    with pytest.raises(ValueError, match=rf"^{NAMES[1]} can't be calibrated\..* does not call it"):
        calibrate(model, token_ids, verbose=False)
    with pytest.raises(ValueError, match=f"saw no token of `data`: {NAMES[1]}. Pass the part"):
        approximation_report(model, token_ids)


SESSION = """
    import json, sys
    import keras, numpy as np

    folder, *names = sys.argv[1:]
    missing, found = {}, {}
    for name in names:
        try:
            missing[name] = f"loaded {type(keras.saving.load_model(f'{folder}/{name}.keras'))}"
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    import keras_darkformer.hub

    for name in names:
        model = keras.saving.load_model(f"{folder}/{name}.keras")
        batch = dict(np.load(f"{folder}/{name}.npz"))
        found[name] = keras.ops.convert_to_numpy(model(batch)).tolist()
    print(json.dumps([missing, found]))
"""


@on_one_backend
@pytest.mark.slow
def test_a_fresh_process_loads_it_dark_or_says_which_class_is_missing(tmp_path):
    tasks = {name: dark(task_of(name, 2), **ONE) for name in KINDS}
    tasks["exact"] = dark(gemma(1), num_features=8, attention_mode="exact")
    models = {name: holder(task) for name, task in tasks.items()}
    backbone = tasks["Gemma"].backbone
    models["between"] = on_top_of(backbone.transformer_layers[0].output, backbone.input)
    models["task"] = keras.Model(tasks["Bert"].input, tasks["Bert"].output)
    batches = {name: inputs(14, 5, 9, model=model) for name, model in models.items()}
    for name, model in models.items():
        model.save(tmp_path / f"{name}.keras")
        np.savez(tmp_path / f"{name}.npz", **batches[name])
    missing, found = json.loads(run_python(SESSION, tmp_path, *models).splitlines()[-1])
    for name, model in models.items():
        family = {"exact": "Gemma", "between": "Gemma", "task": "Bert"}.get(name, name)
        assert "Could not locate class" in missing[name]
        assert "'module': 'keras_darkformer.hub'" in missing[name]
        assert f"keras_darkformer>Dark{family}" in missing[name]
        np.testing.assert_allclose(found[name], outputs(model, batches[name]), rtol=1e-4, atol=1e-4)
