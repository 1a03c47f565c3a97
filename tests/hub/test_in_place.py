"""Conversion in place: the same object and weights, compiled as before, nothing stale."""

import keras
import numpy as np
import pytest
from backends import BACKEND
from keras_hub.models import GemmaCausalLM
from keras_hub.samplers import TopKSampler

from keras_darkformer import convert_to_dark
from keras_darkformer.hub import (
    DarkGemma3Backbone,
    DarkGemma3CausalLM,
    DarkGemmaBackbone,
    DarkGemmaCausalLM,
)

from .models import FAMILIES, SIZES, gemma, gemma3, inputs, outputs

BATCH = inputs(14, 5, 9)
PARTS = {"model": lambda model: model, "backbone": lambda model: model.backbone}


@pytest.fixture(params=PARTS)
def part(request):
    return PARTS[request.param]


@pytest.mark.parametrize(
    ("build", "model_class", "backbone_class"),
    [
        (gemma, DarkGemmaCausalLM, DarkGemmaBackbone),
        (gemma3, DarkGemma3CausalLM, DarkGemma3Backbone),
    ],
)
def test_the_model_passed_is_the_model_returned_and_becomes_dark(
    build, model_class, backbone_class
):
    model = build()
    backbone = model.backbone
    assert convert_to_dark(model) is model
    assert model.backbone is backbone
    assert (type(model), type(backbone)) == (model_class, backbone_class)


def test_a_backbone_is_converted_in_place():
    backbone = gemma().backbone
    assert convert_to_dark(backbone) is backbone
    assert type(backbone) is DarkGemmaBackbone


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_same_objects_and_none_is_added_but_feature_maps(family, part):
    model = part(FAMILIES[family]())
    before = {id(weight) for weight in model.weights}
    convert_to_dark(model)
    added = [weight for weight in model.weights if id(weight) not in before]
    assert before < {id(weight) for weight in model.weights}
    assert all("/feature_map/" in weight.path for weight in added)


def test_what_was_compiled_before_the_conversion_is_compiled_anew(part):
    model = part(gemma())
    stock = model.predict(BATCH, verbose=0)
    convert_to_dark(model, num_features=16)
    predicted = model.predict(BATCH, verbose=0)
    np.testing.assert_allclose(predicted, outputs(model, BATCH), rtol=1e-3, atol=1e-3)
    assert np.abs(predicted - stock).max() > 0.1


def test_the_backbone_of_a_converted_model_predicts_anew_too():
    model = gemma()
    model.backbone.predict(BATCH, verbose=0)
    convert_to_dark(model, num_features=16)
    predicted = model.backbone.predict(BATCH, verbose=0)
    np.testing.assert_allclose(predicted, outputs(model.backbone, BATCH), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_model_that_has_generated_generates_anew():
    model, prompt = gemma(num_layers=1), inputs(6, 3, 5)
    stock = model.generate(dict(prompt), stop_token_ids=None)["token_ids"]
    convert_to_dark(model, num_features=16)
    again = model.generate(dict(prompt), stop_token_ids=None)["token_ids"]
    fresh = convert_to_dark(gemma(num_layers=1), num_features=16)
    expected = fresh.generate(dict(prompt), stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(again, expected)
    assert (again != stock).any()


def test_compiled_settings_survive():
    model = gemma()
    sampler = TopKSampler(k=3)
    model.compile(
        optimizer=keras.optimizers.SGD(0.123, momentum=0.9, clipnorm=2.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=7),
        run_eagerly=True,
        jit_compile=False,
        steps_per_execution=1,
        sampler=sampler,
    )
    optimizer, loss = model.optimizer, model.loss
    convert_to_dark(model)
    assert model.compiled
    assert type(model.optimizer) is type(optimizer)
    assert model.optimizer.get_config() == optimizer.get_config()
    assert model.loss is loss
    assert model.run_eagerly
    assert model.jit_compile is False
    assert model.sampler is sampler


@pytest.mark.parametrize("jit_compile", [True, False])
def test_jit_compile_survives(jit_compile):
    model = gemma()
    model.compile(jit_compile=jit_compile)
    convert_to_dark(model)
    assert model.jit_compile is jit_compile


@pytest.mark.slow
def test_an_optimizer_that_has_stepped_starts_afresh_and_knows_the_geometries():
    model = gemma(num_layers=1)
    model.compile(optimizer=keras.optimizers.SGD(0.01, momentum=0.9))
    tokens = {"x": BATCH, "y": BATCH["token_ids"]}
    model.fit(**tokens, verbose=0)
    convert_to_dark(model)
    assert model.optimizer.iterations == 0
    model.fit(**tokens, verbose=0)
    slots = {v.path for v in model.optimizer.variables if "feature_map" in v.path}
    assert any("geometry" in path for path in slots)


def test_a_model_without_an_optimizer_is_converted():
    model = gemma()
    model.compile(optimizer=None, sampler="greedy")
    convert_to_dark(model)
    assert type(model) is DarkGemmaCausalLM
    assert model.optimizer is None


def test_a_model_never_compiled_stays_so():
    model = GemmaCausalLM(gemma().backbone, compile=False)
    convert_to_dark(model)
    assert not model.compiled
    assert model.count_params() == convert_to_dark(gemma()).count_params()


@pytest.mark.slow
def test_a_dark_backbone_can_be_built_from_scratch_and_put_into_a_task():
    backbone = DarkGemmaBackbone(num_layers=2, **SIZES, num_features=16, layers=[1])
    model = DarkGemmaCausalLM(backbone)
    generated = model.generate(inputs(6, 3, 5), stop_token_ids=None)["token_ids"]
    assert generated.shape == (3, 14)
    assert [hasattr(b.attention, "feature_map") for b in backbone.transformer_layers] == [
        False,
        True,
    ]


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch alone")
def test_torch_knows_the_parameters_of_a_model_around_a_converted_one():
    """Of KerasHub's own models it knows none."""
    backbone = gemma(2).backbone
    model = keras.Model(backbone.input, keras.layers.Dense(2)(backbone.output))
    convert_to_dark(backbone, num_features=4)
    assert {id(x) for x in model.parameters()} == {id(v.value) for v in model.weights}
    assert not list(backbone.parameters())
