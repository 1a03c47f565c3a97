"""Whatever a model is compiled with, it is converted whole or left as it was."""

import warnings

import keras
import numpy as np
import pytest
from backends import BACKEND, DEFAULT_JIT, on_one_backend, to_numpy

from keras_darkformer import calibrate, convert_to_dark, distil, transfer_attention
from keras_darkformer.hub import DarkGemmaCausalLM
from keras_darkformer.hub import attention as hub_attention
from keras_darkformer.hub.attention import DarkHubAttention
from keras_darkformer.layers.feature_maps.far_offset import FarMass

from .models import LENGTH, dark, feature_maps, gemma, gemma2, inputs, outputs, task_of, values

BATCH = inputs(LENGTH, 5, 9)
TOKENS = BATCH["token_ids"]
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Falling(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule without a config, of a class that is not registered."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / (1.0 + keras.ops.cast(step, "float32"))


class Own(keras.optimizers.SGD):
    """An optimizer whose config forgets an argument."""

    def __init__(self, momentum_of_mine=0.5, **kwargs):
        super().__init__(**{"learning_rate": 0.01, "momentum": momentum_of_mine} | kwargs)


class Share(keras.metrics.Mean):
    """A metric without a config."""

    def __init__(self, token):
        super().__init__(name="share")
        self.token = token

    def update_state(self, y_true, y_pred, sample_weight=None):
        found = keras.ops.cast(keras.ops.equal(keras.ops.argmax(y_pred, -1), self.token), "float32")
        return super().update_state(found)


class OwnLoss(keras.losses.Loss):
    """A loss without a config."""

    def __init__(self, weight):
        super().__init__(reduction="sum_over_batch_size")
        self.weight = weight

    def call(self, y_true, y_pred):
        return self.weight * keras.losses.sparse_categorical_crossentropy(y_true, y_pred, True)


# What is put back and what is kept hangs on no backend; elsewhere each fit has to be compiled.

SCHEDULE, METRIC, LOSS = Falling(0.01), Share(3), OwnLoss(0.5)
# What no config can describe.
ARGUMENTS = {
    "schedule": lambda: {"optimizer": keras.optimizers.SGD(SCHEDULE, momentum=0.9)},
    "lambda": lambda: {"optimizer": keras.optimizers.Adam(lambda: 0.01)},
    "metric": lambda: {"weighted_metrics": [Share(3)]},
    "loss": lambda: {"loss": OwnLoss(0.5)},
    "function": lambda: {"loss": lambda y, z: CROSSENTROPY(y, z), "metrics": [lambda y, z: z[0]]},
    "scaled": lambda: {
        "optimizer": keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(SCHEDULE))
    },
    "all": lambda: {
        "optimizer": keras.optimizers.SGD(SCHEDULE, momentum=0.9),
        "loss": OwnLoss(0.5),
        "weighted_metrics": [Share(3)],
    },
}


def compiled(model, **arguments):
    defaults = {"optimizer": "sgd", "loss": CROSSENTROPY, "weighted_metrics": None}
    model.compile(**defaults | arguments, jit_compile=DEFAULT_JIT)
    return model


def fit(model):
    return keras.Model.fit(model, BATCH, TOKENS, batch_size=3, verbose=0).history["loss"][0]


def state(model):
    """All that surgery could have left behind in a model and its layers."""
    return [
        (
            id(layer),
            type(layer),
            {name: repr(value) for name, value in vars(layer).items() if not name.startswith("_")},
            [id(x) for x in layer._layers],
            [(id(v), v.path, to_numpy(v.value).tolist()) for v in layer.variables],
            layer._tracker.locked,
            getattr(layer, "_lora_enabled_layers", None),
        )
        for layer in model._flatten_layers()
    ]


def rate_of(optimizer):
    return getattr(optimizer, "inner_optimizer", optimizer)._learning_rate


@pytest.mark.parametrize("name", ARGUMENTS if BACKEND == "torch" else ["all"])
def test_a_model_fitted_with_objects_of_ones_own_is_converted_and_fitted_on(name):
    arguments = ARGUMENTS[name]()
    model = compiled(gemma(num_layers=1), **arguments)
    fit(model)
    optimizer, config = model.optimizer, dict(model._compile_config.config)
    rate, is_variable = rate_of(optimizer), isinstance(rate_of(optimizer), keras.Variable)
    copy = convert_to_dark(model, num_features=16, copy=True)
    assert model.optimizer is optimizer
    assert convert_to_dark(model, num_features=16) is model
    for converted in (model, copy):
        assert type(converted) is DarkGemmaCausalLM
        assert converted.optimizer is not optimizer
        assert converted.loss is config["loss"]
        assert is_variable or rate_of(converted.optimizer) is rate
    assert model._compile_config.config["weighted_metrics"] is config["weighted_metrics"]
    before = values(model)
    assert np.isfinite(fit(model))
    after = values(model)
    assert all((before[x] != after[x]).any() for x in before if x.endswith("geometry"))
    if BACKEND == "torch":
        assert np.isfinite(fit(copy))


def test_an_optimizer_that_is_not_built_stays_and_settings_outside_its_config_do():
    optimizer = Own(0.25)
    model = compiled(gemma(num_layers=1), optimizer=optimizer)
    assert convert_to_dark(model).optimizer is optimizer
    adam = keras.optimizers.AdamW()
    adam.exclude_from_weight_decay(var_names=["scale"])
    adam.build([])
    model = convert_to_dark(compiled(gemma(num_layers=1), optimizer=adam))
    assert model.optimizer is not adam
    decays = [model.optimizer._use_weight_decay(x) for x in model.weights]
    assert decays == ["scale" not in x.name for x in model.weights]


@pytest.mark.parametrize("scaled", [True, False])
def test_loss_is_scaled_in_mixed_float16_as_it_was(scaled):
    model = gemma(num_layers=1, dtype="mixed_float16")
    model.compile("sgd", auto_scale_loss=scaled)
    convert_to_dark(model)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) is scaled


@on_one_backend
def test_an_optimizer_whose_config_forgets_an_argument_is_refused_before_anything_changes():
    model = compiled(gemma(num_layers=1), optimizer=Own(0.25))
    fit(model)
    before = state(model)
    message = "Own has to be made anew for new variables, and can't be: its config leaves out"
    for copy in (True, False):
        with pytest.raises(ValueError, match=f"{message} `momentum_of_mine`.*Nothing was changed"):
            convert_to_dark(model, copy=copy)
        assert state(model) == before
    fit(model)
    model.compile("sgd")  # as the message says
    compiled(convert_to_dark(model), optimizer=Own(0.25))
    assert np.isfinite(fit(model))


KINDS = ("Gemma", "Llama", "GPT2", "Bert")
if BACKEND == "torch":
    KINDS += ("Gemma3", "Mixtral", "Qwen3", "Phi3", "SmolLM3")


def computed(model, batch):
    """What the model says, where that takes no time."""
    return outputs(model, batch) if BACKEND == "torch" else np.zeros(1)


@pytest.mark.filterwarnings("ignore:Converting")
@pytest.mark.parametrize("name", KINDS)
def test_a_conversion_that_breaks_off_is_undone(name, monkeypatch):
    error = KeyboardInterrupt if name == "Gemma" else MemoryError
    model = task_of(name)
    batch = inputs(LENGTH, 5, model=model.backbone)
    expected, before = computed(model, batch), state(model)
    build, built = hub_attention.build_at, []

    def fail(*args):
        built.append(build(*args))
        if len(built) == 2:
            raise error("in the second layer")

    with monkeypatch.context() as patch:
        patch.setattr(hub_attention, "build_at", fail)
        with pytest.raises(error, match="in the second layer"):
            convert_to_dark(model, layers="all")
    assert state(model) == before
    np.testing.assert_array_equal(computed(model, batch), expected)
    assert len(feature_maps(convert_to_dark(model, layers="all"))) == 2


@on_one_backend
def test_a_warning_that_is_an_error_leaves_a_fitted_model_with_lora_as_it_was(tmp_path):
    model = gemma2(num_layers=1)
    model.backbone.enable_lora(2)
    fit(compiled(model, optimizer=keras.optimizers.SGD(0.01)))
    optimizer, before = model.optimizer, state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="sliding window"):
            convert_to_dark(model, layers="all")
    assert state(model) == before
    assert model.optimizer is optimizer
    fit(model)
    model.backbone.save_lora_weights(tmp_path / "stock.lora.h5")
    model.backbone.load_lora_weights(tmp_path / "stock.lora.h5")


# Calibration puts maps of another class into the layers: what was compiled does not know them.


def maps(model):
    return [
        (id(x), x.kind, [v.tolist() for v in map(to_numpy, x.weights)]) for x in feature_maps(model)
    ]


def calibrated(model, **options):
    options = {"method": "clusters", "refine": False, "verbose": False} | options
    return calibrate(model, BATCH, **options)


@on_one_backend
def test_calibration_compiles_a_model_again_with_objects_of_ones_own():
    class Mine(keras.Model):
        """With arguments of its own at `compile`."""

        def __init__(self, model):
            super().__init__()
            self.inner = model

        def call(self, x):
            return self.inner(x)

        def compile(self, mine, **kwargs):
            super().compile(**kwargs)
            self.mine = mine

    model = Mine(dark(gemma(num_layers=1)))
    optimizer = keras.optimizers.SGD(SCHEDULE)
    model.compile("mine", optimizer=optimizer, loss=OwnLoss(0.5), metrics=[Share(3)])
    model.jit_compile = DEFAULT_JIT
    fit(model)
    loss = model.loss
    calibrated(model)
    assert feature_maps(model.inner)[0].kind == "exponential"
    assert model.optimizer is not optimizer
    assert (model.optimizer._learning_rate, model.loss, model.mine) == (SCHEDULE, loss, "mine")
    assert np.isfinite(fit(model))


@on_one_backend
def test_calibration_is_refused_before_the_pass_where_it_could_not_compile_again():
    model = compiled(dark(gemma(num_layers=1)), optimizer=Own(0.25))
    fit(model)
    before = maps(model)
    data = iter([BATCH])
    with pytest.raises(ValueError, match="Own has to be made anew"):
        calibrate(model, data, method="clusters", verbose=False)
    assert list(data) == [BATCH]  # no pass was made
    assert maps(model) == before
    calibrated(model, method="scale")  # puts in no other map
    assert np.isfinite(fit(model))


@on_one_backend
@pytest.mark.parametrize("method", ["clusters", "spectral"])
def test_calibration_that_breaks_off_is_undone(method, monkeypatch):
    options = {} if method == "clusters" else {"sliding_window": 4}
    model = compiled(dark(gemma(num_layers=2), **options))
    optimizer, before, expected = model.optimizer, maps(model), outputs(model, BATCH)

    def fail(*args):
        raise MemoryError("at the end")

    if method == "clusters":
        last = feature_maps(model)[1]
        swap = DarkHubAttention.swap_feature_map

        def swap_first(layer, kind):
            return fail() if layer.feature_map is last else swap(layer, kind)

        monkeypatch.setattr(DarkHubAttention, "swap_feature_map", swap_first)
    else:
        monkeypatch.setattr(FarMass, "offset", fail)
    with pytest.raises(MemoryError, match="at the end"):
        calibrated(model, method=method)
    assert maps(model) == before
    assert model.optimizer is optimizer
    np.testing.assert_array_equal(outputs(model, BATCH), expected)


@on_one_backend
def test_fits_leave_what_a_model_is_compiled_with_alone():
    optimizer = keras.optimizers.SGD(SCHEDULE)
    model = compiled(dark(gemma(num_layers=1)), optimizer=optimizer, loss=LOSS, metrics=[METRIC])
    options = {"steps": 1, "optimizer": optimizer, "verbose": 0}
    transfer_attention(model, BATCH, **options)
    distil(model, gemma(num_layers=1), BATCH, **options)
    assert not optimizer.built
    assert (model.optimizer, model.loss) == (optimizer, LOSS)
    assert np.isfinite(fit(model))
    transfer_attention(model, BATCH, **options)  # one that is built


@pytest.mark.parametrize("run", [transfer_attention, distil])
def test_fits_refuse_an_optimizer_that_can_not_be_made_anew(run):
    model = compiled(dark(gemma(num_layers=1)), optimizer=Own(0.25))
    before, trainable = state(model), [v.trainable for v in model.variables]
    teacher = () if run is transfer_attention else (gemma(num_layers=1),)
    with pytest.raises(ValueError, match="Own has to be made anew"):
        run(model, *teacher, BATCH, steps=1, optimizer=model.optimizer, verbose=0)
    assert state(model) == before
    assert [v.trainable for v in model.variables] == trainable
