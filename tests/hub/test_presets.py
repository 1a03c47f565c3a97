"""Presets of stock models loaded as dark ones, and of dark models."""

import keras
import keras_hub
import numpy as np
import pytest
from keras_hub.models import Gemma3CausalLM, GemmaCausalLM

from keras_darkformer import conversion_report, hub

from .models import feature_maps, gemma2, outputs, values
from .saved import BATCH


@pytest.fixture(params=["Gemma", pytest.param("Gemma3", marks=pytest.mark.slow)])
def family(request):
    return request.param


@pytest.fixture
def stock(saved, family):
    return saved.stock(family)


@pytest.fixture
def dark(saved, family):
    return saved.dark(family)


def test_a_stock_preset_is_loaded_and_converted(stock, family):
    source, preset = stock
    dark_class = getattr(hub, f"Dark{family}CausalLM")
    model = dark_class.from_preset(preset, num_features=32)
    assert type(model) is dark_class
    assert {feature_map.num_features for feature_map in feature_maps(model)} == {32}
    loaded = values(model)
    for path, value in values(source).items():
        np.testing.assert_array_equal(loaded.pop(path), value, err_msg=path)
    assert all("/feature_map/" in path for path in loaded)
    assert isinstance(model.preprocessor, type(source.preprocessor))


def test_a_stock_preset_is_loaded_as_a_dark_backbone(stock, family):
    source, preset = stock
    options = {"layers": [-1], "attention_mode": "exact", "geometry_scale": 1.0}
    backbone = getattr(hub, f"Dark{family}Backbone").from_preset(preset, **options)
    assert conversion_report(backbone)["converted"] == [len(backbone.transformer_layers) - 1]
    expected = outputs(source.backbone, BATCH)
    np.testing.assert_allclose(outputs(backbone, BATCH), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["CausalLM", "Backbone"])
def test_arguments_of_a_conversion_are_refused_for_a_dark_preset(dark, family, part):
    dark_class = getattr(hub, f"Dark{family}{part}")
    with pytest.raises(ValueError, match=r"dark already.*\['layers', 'num_features'\]"):
        dark_class.from_preset(dark[1], num_features=32, layers="all")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dark", "stock"])
def test_a_preset_loaded_in_bfloat16_keeps_its_geometry_in_float32(kind, dark, stock, family):
    source, preset = {"dark": dark, "stock": stock}[kind]
    model = getattr(hub, f"Dark{family}CausalLM").from_preset(preset, dtype="bfloat16")
    before = values(source)
    assert feature_maps(model)
    for weight in model.weights:
        in_float32 = "/feature_map/" in weight.path
        assert weight.dtype == ("float32" if in_float32 else "bfloat16")
        if in_float32 and kind == "dark":
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), before[weight.path])


def test_a_stock_preset_stays_stock_for_stock_classes(stock, family):
    model = getattr(keras_hub.models, f"{family}CausalLM").from_preset(stock[1])
    assert type(model) in (GemmaCausalLM, Gemma3CausalLM)


@pytest.mark.slow
def test_loading_a_stock_preset_warns_of_what_is_dropped(tmp_path):
    gemma2(soft_cap=30.0).save_to_preset(str(tmp_path))
    with pytest.warns(UserWarning, match="soft cap of the attention logits at 30"):
        hub.DarkGemmaCausalLM.from_preset(str(tmp_path), num_features=8)
