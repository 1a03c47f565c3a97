"""Dark models saved here and loaded in a fresh process; stock presets loaded as dark models."""

import json

import keras
import keras_hub
import numpy as np
import pytest
from fresh_process import run_python
from keras_hub.models import (
    Gemma3CausalLM,
    Gemma3CausalLMPreprocessor,
    Gemma3Tokenizer,
    GemmaCausalLM,
    GemmaCausalLMPreprocessor,
    GemmaTokenizer,
)

from keras_darkformer import conversion_report, hub

from .models import dark, feature_maps, gemma, gemma2, gemma3, inputs, outputs, values

BATCH = inputs(14, 5, 9)
PROMPTS = ["the left", "a"]

# Ways to load what `saved` holds; "{family}" is Gemma or Gemma3.
TASKS = {
    "DarkCausalLM": "hub.Dark{family}CausalLM.from_preset(preset)",
    "StockCausalLM": "keras_hub.models.{family}CausalLM.from_preset(preset)",
    "CausalLM": "keras_hub.models.CausalLM.from_preset(preset)",
    "load_model": "keras.saving.load_model(preset + '.keras')",
}
BACKBONES = {
    "DarkBackbone": "hub.Dark{family}Backbone.from_preset(preset)",
    "StockBackbone": "keras_hub.models.{family}Backbone.from_preset(preset)",
    "Backbone": "keras_hub.models.Backbone.from_preset(preset)",
    "load_backbone": "keras.saving.load_model(preset + '_backbone.keras')",
}
LOADERS = TASKS | BACKBONES
LOAD_ALL = """
    import json, sys
    import keras, keras_hub, numpy as np
    from keras_darkformer import hub

    preset, loaders, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    batch = dict(np.load(preset + "_batch.npz"))
    arrays, facts = {}, {}
    for name, expression in loaders.items():
        model = eval(expression)
        arrays[name] = keras.ops.convert_to_numpy(model(batch))
        facts[name] = {"class": type(model).__name__, "report": hub.conversion_report(model)}
        if name == "DarkCausalLM":
            facts[name]["text"] = model.generate(prompts, max_length=16)
    np.savez(preset + "_outputs.npz", **arrays)
    print(json.dumps(facts))
"""
LOAD_WITHOUT_PACKAGE = """
    import json, sys
    import keras, keras_hub

    preset, loaders = sys.argv[1], json.loads(sys.argv[2])
    errors = {}
    for name, expression in loaders.items():
        try:
            errors[name] = f"loaded {type(eval(expression)).__name__}"
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    assert "keras_darkformer" not in sys.modules
    print(json.dumps(errors))
"""


@pytest.fixture(scope="session")
def stock_models(sentencepiece_proto):
    """Builders of Gemmas with a real tokenizer."""

    def with_gemma_tokenizer():
        tokenizer = GemmaTokenizer(proto=sentencepiece_proto)
        return gemma(preprocessor=GemmaCausalLMPreprocessor(tokenizer, sequence_length=16))

    def with_gemma3_tokenizer():
        tokenizer = Gemma3Tokenizer(proto=sentencepiece_proto, has_vision_tokens=False)
        preprocessor = Gemma3CausalLMPreprocessor(tokenizer, sequence_length=16)
        return gemma3(preprocessor=preprocessor)

    return {"Gemma": with_gemma_tokenizer, "Gemma3": with_gemma3_tokenizer}


@pytest.fixture(scope="module", params=["Gemma", pytest.param("Gemma3", marks=pytest.mark.slow)])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def stock(family, stock_models, tmp_path_factory):
    """A stock model and the preset it was saved to."""
    model, preset = stock_models[family](), tmp_path_factory.mktemp(family) / "stock"
    model.save_to_preset(preset)
    return model, str(preset)


@pytest.fixture(scope="module")
def saved(family, stock_models, tmp_path_factory):
    """A dark model with geometries away from their initial value, and where it was saved."""
    model = dark(stock_models[family](), num_features=24, geometry_scale=0.5, seed=7)
    preset = str(tmp_path_factory.mktemp(family) / "dark")
    model.save_to_preset(preset)
    model.save(preset + ".keras")
    model.backbone.save(preset + "_backbone.keras")
    np.savez(preset + "_batch.npz", **BATCH)
    return model, preset


@pytest.fixture(scope="module")
def fresh(family, saved):
    """What a fresh process makes of the files: outputs, and facts, by loader."""
    loaders = {name: code.format(family=family) for name, code in LOADERS.items()}
    preset = saved[1]
    facts = run_python(LOAD_ALL, preset, json.dumps(loaders), json.dumps(PROMPTS))
    return dict(np.load(preset + "_outputs.npz")), json.loads(facts.splitlines()[-1])


@pytest.mark.parametrize("loader", LOADERS)
def test_a_fresh_process_loads_the_same_dark_model(saved, fresh, loader):
    model = saved[0] if loader in TASKS else saved[0].backbone
    arrays, facts = fresh
    assert facts[loader]["class"] == type(model).__name__
    assert facts[loader]["report"] == conversion_report(model)
    np.testing.assert_allclose(arrays[loader], outputs(model, BATCH), rtol=1e-4, atol=1e-4)


def test_a_fresh_process_generates_the_same_text(saved, fresh):
    texts = saved[0].generate(PROMPTS, max_length=16)
    assert fresh[1]["DarkCausalLM"]["text"] == texts
    for text, prompt in zip(texts, PROMPTS, strict=True):
        assert text.startswith(prompt)
        assert len(text) > len(prompt)


def test_without_the_package_loading_fails_and_says_what_is_missing(saved, family):
    loaders = {n: code.format(family=family) for n, code in LOADERS.items() if "hub.D" not in code}
    errors = json.loads(run_python(LOAD_WITHOUT_PACKAGE, saved[1], json.dumps(loaders)))
    for name, error in errors.items():
        assert not error.startswith("loaded"), name
        assert "keras_darkformer" in error, name


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
def test_arguments_of_a_conversion_are_refused_for_a_dark_preset(saved, family, part):
    dark_class = getattr(hub, f"Dark{family}{part}")
    with pytest.raises(ValueError, match=r"dark already.*\['layers', 'num_features'\]"):
        dark_class.from_preset(saved[1], num_features=32, layers="all")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["saved", "stock"])
def test_a_preset_loaded_in_bfloat16_keeps_its_geometry_in_float32(kind, saved, stock, family):
    source, preset = {"saved": saved, "stock": stock}[kind]
    model = getattr(hub, f"Dark{family}CausalLM").from_preset(preset, dtype="bfloat16")
    before = values(source)
    assert feature_maps(model)
    for weight in model.weights:
        in_float32 = "/feature_map/" in weight.path
        assert weight.dtype == ("float32" if in_float32 else "bfloat16")
        if in_float32 and kind == "saved":
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), before[weight.path])


def test_a_stock_preset_stays_stock_for_stock_classes(stock, family):
    model = getattr(keras_hub.models, f"{family}CausalLM").from_preset(stock[1])
    assert type(model) in (GemmaCausalLM, Gemma3CausalLM)


@pytest.mark.slow
def test_loading_a_stock_preset_warns_of_what_is_dropped(tmp_path):
    gemma2(soft_cap=30.0).save_to_preset(str(tmp_path))
    with pytest.warns(UserWarning, match="soft cap of the attention logits at 30"):
        hub.DarkGemmaCausalLM.from_preset(str(tmp_path), num_features=8)
