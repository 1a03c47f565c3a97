"""`copy=True`: a second model in whatever state the first one is, which stays as it was."""

import inspect

import keras
import keras_hub
import numpy as np
import pytest
from backends import BACKEND, DEFAULT_JIT, to_numpy
from keras_hub.models import GemmaCausalLM
from keras_hub.samplers import TopKSampler

from keras_darkformer import convert_to_dark
from keras_darkformer.hub.conversion import BY_STOCK_CLASS
from keras_darkformer.hub.families import FAMILIES

from .models import ROWS, SIZES, gemma, inputs, outputs, row, values

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

BATCH = inputs(14, 5, 9)
EXACT = {"attention_mode": "exact", "geometry_scale": 1.0, "num_features": 16}
ARGUMENTS = {"Gemma": SIZES, "Gemma3": {"image_size": 16} | SIZES, **ROWS}
# What a conversion refuses, or what is no plain value.
NOT_TRIED = ("dtype", "use_bidirectional_attention", "is_embedding_model", "kwargs")


def lora(model):
    model.backbone.enable_lora(rank=2)
    rng = np.random.default_rng(3)
    for weight in model.trainable_weights:
        weight.assign(rng.standard_normal(weight.shape))


def freeze(model):
    first, second = model.backbone.transformer_layers
    first.trainable = False
    second.attention.query_dense.trainable = False
    second.attention.value_dense.kernel.trainable = False
    model.backbone.token_embedding.trainable = False


def freeze_all(model):
    model.backbone.trainable = False


def quantize(model):
    model.backbone.transformer_layers[0].attention.query_dense.quantize("int8")


def quantize_with_lora(model):
    quantize(model)
    lora(model)


def rename(model):
    model.name = "mine"
    model.backbone.transformer_layers[1].name = "last"


def fit(model):
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
        jit_compile=DEFAULT_JIT,
    )
    model.fit(BATCH, BATCH["token_ids"], batch_size=3, verbose=0)


STATES = (lora, freeze, quantize_with_lora)
if BACKEND == "torch":  # where nothing has to be compiled
    STATES += (freeze_all, quantize, rename)


def state(model):
    """What a copy has to have alike, the new feature maps left out."""
    layers = [x for x in model._flatten_layers() if "feature_map" not in str(x.path)]
    weights = [x for x in model.weights if "feature_map" not in x.path]
    return {
        "layers": [(x.name, x.trainable, getattr(x, "lora_enabled", None)) for x in layers],
        "weights": [(x.path, x.trainable, x.dtype, to_numpy(x.value).tolist()) for x in weights],
        "lora": getattr(model.backbone, "_lora_rank", None),
    }


@pytest.mark.parametrize("change", STATES)
def test_a_copy_is_in_the_state_of_its_source(change):
    source = gemma()
    change(source)
    before, expected = state(source), outputs(source, BATCH)
    copy = convert_to_dark(source, copy=True, **EXACT)
    assert state(copy) == before
    np.testing.assert_allclose(outputs(copy, BATCH), expected, rtol=1e-4, atol=1e-4)
    assert state(source) == before
    np.testing.assert_array_equal(outputs(source, BATCH), expected)


def test_lora_of_a_copy_is_saved_and_loaded(tmp_path):
    source = gemma(num_layers=1)
    lora(source)
    copy = convert_to_dark(source, copy=True, **EXACT)
    copy.backbone.save_lora_weights(tmp_path / "adapter.lora.h5")
    other = convert_to_dark(gemma(num_layers=1), **EXACT)
    other.backbone.enable_lora(rank=2)
    other.backbone.load_lora_weights(tmp_path / "adapter.lora.h5")
    np.testing.assert_allclose(outputs(other, BATCH), outputs(copy, BATCH), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="the same on all backends; takes long elsewhere")
def test_a_copy_of_a_fitted_model_and_its_source_are_fitted_on():
    source = gemma(num_layers=1)
    fit(source)
    weights, optimizer, metric = values(source), source.optimizer, source.metrics[1]
    copy = convert_to_dark(source, copy=True, num_features=16)
    copy.fit(BATCH, BATCH["token_ids"], batch_size=3, verbose=0)
    for path, value in values(source).items():
        np.testing.assert_array_equal(value, weights[path], err_msg=path)
    assert source.optimizer is optimizer
    assert copy.optimizer.get_config() == optimizer.get_config()
    assert not {id(v) for v in copy.metrics_variables} & {id(v) for v in metric.variables}
    source.fit(BATCH, BATCH["token_ids"], batch_size=3, verbose=0)


def test_copies_of_a_model_with_layers_of_few_bits_are_saved(tmp_path):
    source, path = gemma(num_layers=1), tmp_path / "model.keras"
    source.backbone.transformer_layers[0].attention.query_dense.quantize("int8")
    source.save(path)
    for model in (source, keras.saving.load_model(path, compile=False)):
        copy = convert_to_dark(model, copy=True, **EXACT)
        copy.save(path)
        loaded = keras.saving.load_model(path, compile=False)
        np.testing.assert_array_equal(outputs(loaded, BATCH), outputs(copy, BATCH))


def test_a_copy_with_layers_of_few_bits_computes_in_the_types_of_its_source():
    source = gemma(num_layers=1, dtype="mixed_bfloat16")
    source.backbone.transformer_layers[0].attention.query_dense.quantize("int8")
    copy = convert_to_dark(source, copy=True, **EXACT)
    types = [
        {x.path: x.compute_dtype for x in model._flatten_layers() if x.built and x.path}
        for model in (source.backbone, copy.backbone)
    ]
    assert types[1].items() >= types[0].items()
    assert "bfloat16" in types[0].values()


def test_a_copy_is_compiled_only_if_its_source_is():
    source = GemmaCausalLM(gemma().backbone, compile=False)
    assert not convert_to_dark(source, copy=True).compiled
    source.compile(sampler=TopKSampler(k=3))
    copy = convert_to_dark(source, copy=True)
    assert copy.compiled
    assert copy.sampler is source.sampler
    source.backbone.compile("sgd", "mse")
    assert convert_to_dark(source, copy=True).backbone.compiled


def test_a_copy_shares_a_preprocessor_that_has_layers(preprocessor):
    source = gemma(preprocessor=preprocessor)
    freeze(source)
    copy = convert_to_dark(source, copy=True)
    assert copy.preprocessor is preprocessor
    assert not copy.backbone.transformer_layers[0].trainable
    assert preprocessor.trainable


def test_a_copy_of_an_encoders_task_is_in_its_state():
    build = keras_hub.models.BertTextClassifier
    source = build(backbone=row("Bert", num_layers=1), num_classes=2, preprocessor=None)
    source.backbone.trainable = False
    before = state(source)
    assert state(convert_to_dark(source, copy=True)) == before


def test_weights_that_no_config_describes_are_refused():
    source = gemma(num_layers=1)
    norm = source.backbone.layer_norm
    norm._tracker.unlock()
    norm.add_weight(shape=(3,), name="mine")
    norm._lock_state()
    before = state(source)
    with pytest.raises(ValueError, match="does not describe all of its weights: 12 against 11"):
        convert_to_dark(source, copy=True)
    assert state(source) == before


@pytest.mark.parametrize("name", ["Llama", "Llama3"] if BACKEND == "torch" else ["Llama3"])
def test_tied_embeddings_stay_tied(name, tmp_path):
    source = row(name, num_layers=1, tie_word_embeddings=True)
    copy = convert_to_dark(source, copy=True, **EXACT)
    expected = outputs(source, BATCH)
    np.testing.assert_allclose(outputs(copy, BATCH), expected, rtol=1e-5, atol=1e-5)
    copy.save_to_preset(tmp_path / "preset")
    copy.save(tmp_path / "model.keras")
    loaded = (
        keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset")),
        keras.saving.load_model(tmp_path / "model.keras", compile=False),
        convert_to_dark(source, **EXACT),
    )
    for model in loaded:
        np.testing.assert_array_equal(outputs(model, BATCH), outputs(copy, BATCH))
        assert model.backbone.token_embedding.tie_weights
        assert len(model.weights) == len(copy.weights)


def elsewhere(value):
    """A value that an argument has not by default, or `None` if it is no plain one."""
    kinds = {bool: lambda x: not x, int: lambda x: x + 2, float: lambda x: x / 2 + 0.25}
    return kinds.get(type(value), lambda x: None)(value)


def with_all_arguments(family):
    """A stock backbone all of whose plain arguments differ from their defaults, and these."""
    given = ARGUMENTS[family.name] | {"num_layers": 1}
    arguments = dict(given)
    for name, argument in inspect.signature(family.backbone).parameters.items():
        value = elsewhere(argument.default)
        if name not in given and name not in NOT_TRIED and value is not None:
            arguments[name] = 0.1 if name == "dropout" else value
    return family.backbone(**arguments), arguments


# Which arguments a config has hangs on no backend.
TRIED = FAMILIES if BACKEND == "torch" else [x for x in FAMILIES if x.name in ("Llama", "Mixtral")]


@pytest.mark.parametrize("family", TRIED, ids=lambda family: family.name)
def test_a_dark_config_has_all_that_a_backbone_was_made_with(family):
    stock, arguments = with_all_arguments(family)
    source = BY_STOCK_CLASS[family.backbone]
    for dark in (
        convert_to_dark(stock, layers="all", copy=True),
        convert_to_dark(stock, layers="all"),
    ):
        config = source.from_config(dark.get_config()).get_config()
        assert inspect.signature(family.backbone).parameters.keys() - config.keys() <= {"kwargs"}
        assert {name: config[name] for name in arguments} == arguments
