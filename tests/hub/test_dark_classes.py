"""The classes of `keras_darkformer.hub`: names, configs, and what they rely on in KerasHub."""

import inspect
import json

import keras
import numpy as np
import pytest
from backends import on_one_backend
from keras import ops
from keras_hub.src.vllm.context import vllm_context_scope

from keras_darkformer import convert_to_dark, hub
from keras_darkformer.hub import DarkGemma3Backbone, DarkGemmaBackbone, private
from keras_darkformer.hub.conversion import BY_STOCK_CLASS, DARK_CLASSES
from keras_darkformer.options import ConversionOptions

from .models import (
    DARK_WEIGHTS,
    POST_NORMS,
    SIZES,
    SLIDING,
    attentions,
    dark,
    feature_maps,
    gemma,
    gemma3,
    inputs,
    outputs,
    row,
    values,
)

BATCH = inputs(14, 5, 9)
# Every option of a conversion away from its default, with what goes with it.
CONFIGS = [
    {"feature_map": "exponential", "seed": 3, "layers": [0, 2], "num_features": [16, 8]},
    {"feature_map": ["exponential", "dark"], "layers": [0, 2], "projection": "gaussian"},
    {"rank": 4, "tie_geometry": False, "sliding_window": 5, "geometry_scale": 0.5, "remat": True},
    {"sliding_window": 5, "num_sinks": 2, "cache_size": 3},
    {"feature_map": ["none", "dark"], "layers": [0, 2], "sliding_window": 5},
    {"rope_geometry": "before", "attention_mode": "exact", "chunk_size": 4},
    {"train_geometry": False, "train_projection": True}
    | {"attention_mode": "auto", "exact_below": 20},
]


def test_all_options_are_tried():
    assert set(ConversionOptions.names()) == set().union(*CONFIGS)
    defaults = ConversionOptions()
    for options in CONFIGS:
        assert all(getattr(defaults, name) != value for name, value in options.items())


@pytest.mark.parametrize("name", hub.__all__)
def test_every_model_is_registered_under_its_name(name):
    exported = getattr(hub, name)
    if inspect.isclass(exported) and issubclass(exported, keras.layers.Layer):
        registered = f"keras_darkformer>{name}"
        assert keras.saving.get_registered_name(exported) == registered
        assert keras.saving.get_registered_object(registered) is exported


def test_every_model_is_exported():
    exported = {name for name in hub.__all__ if name.startswith("Dark")}
    assert exported == set(DARK_CLASSES) == {cls.__name__ for cls in BY_STOCK_CLASS.values()}


@pytest.mark.parametrize(
    ("backbone_class", "sizes"),
    [(DarkGemmaBackbone, SIZES), (DarkGemma3Backbone, {"image_size": 16} | SIZES | POST_NORMS)],
    ids=["gemma", "gemma3"],
)
@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_a_config_holds_every_option_and_rebuilds_the_backbone(backbone_class, sizes, options):
    more = {"name": "mine", "dtype": "mixed_bfloat16", "trainable": False}
    backbone = backbone_class(num_layers=3, **sizes, **options, **more)
    config = json.loads(json.dumps(backbone.get_config()))
    for name, value in (sizes | options).items():
        assert config[name] == value, name
    again = backbone_class.from_config(config)
    assert json.loads(json.dumps(again.get_config())) == config
    assert (again.name, again.trainable) == ("mine", False)
    assert again.dtype_policy.name == "mixed_bfloat16"
    assert [x.options for x in feature_maps(again)] == [x.options for x in feature_maps(backbone)]
    assert backbone.options.by_layer().keys() == backbone.dark_layers.keys()
    serialized = keras.saving.serialize_keras_object(backbone)
    assert type(keras.saving.deserialize_keras_object(serialized)) is backbone_class


def test_options_of_a_layer_may_differ_from_those_of_another():
    options = {"layers": [0, 2], "num_features": [16, 8], "feature_map": ["dark", "exponential"]}
    model = convert_to_dark(gemma(num_layers=3), **options)
    found = [(x.num_features, x.kind) for x in feature_maps(model)]
    assert found == [(16, "dark"), (8, "exponential")]
    assert list(model.backbone.dark_layers) == [0, 2]
    assert model.backbone.get_config()["num_features"] == [16, 8]
    assert np.isfinite(outputs(model, BATCH)).all()


@pytest.mark.parametrize(
    ("build", "backbone_class", "sizes"),
    [
        (gemma, DarkGemmaBackbone, SIZES),
        (gemma3, DarkGemma3Backbone, {"image_size": 16} | SIZES | SLIDING | POST_NORMS),
        (
            lambda **options: gemma3(use_query_key_norm=False, **options),
            DarkGemma3Backbone,
            {"image_size": 16, "use_query_key_norm": False} | SIZES | SLIDING | POST_NORMS,
        ),
    ],
    ids=["gemma", "gemma3", "gemma3_without_norms"],
)
def test_a_backbone_built_from_scratch_has_the_paths_and_outputs_of_a_converted_one(
    build, backbone_class, sizes
):
    converted = dark(build(num_layers=2), layers=[1]).backbone
    built = backbone_class(num_layers=2, **sizes, layers=[1], num_features=16)
    paths = {weight.path for weight in built.weights}
    assert paths == set(values(converted))
    of_map = {path.rsplit("/", 1)[1] for path in paths if "/feature_map/" in path}
    assert of_map == {*DARK_WEIGHTS}
    norms = {path for path in paths if path.endswith(("query_norm/scale", "key_norm/scale"))}
    has_norms = sizes.get("use_query_key_norm", backbone_class is DarkGemma3Backbone)
    assert len(norms) == (4 if has_norms else 0)
    built.set_weights(converted.get_weights())
    np.testing.assert_array_equal(outputs(built, BATCH), outputs(converted, BATCH))


@pytest.mark.parametrize("build", [gemma, lambda **x: row("Llama", **x)], ids=["gemma", "llama"])
def test_layers_and_blocks_keep_the_names_of_their_stock_classes(build):
    """Files of weights are read by them."""
    stock = build(num_layers=1)
    names = [[type(x).__name__ for x in stock.backbone._flatten_layers()]]
    model = dark(stock)
    names.append([type(x).__name__ for x in model.backbone._flatten_layers()])
    assert names[1][0] == f"Dark{names[0][0]}"
    assert [x for x in names[1][1:] if x != "DarkFeatureMap"] == names[0][1:]
    assert {type(x).__module__ for x in attentions(model)} == {"keras_darkformer.hub"}


@on_one_backend
@pytest.mark.parametrize("mode", ["linear", "exact"])
@pytest.mark.parametrize("name", ["Gemma", "GPT2", "Llama"])
def test_a_model_served_by_vllm_is_refused(name, mode):
    stock = gemma(num_layers=1) if name == "Gemma" else row(name, num_layers=1)
    model = convert_to_dark(stock, num_features=16, attention_mode=mode)
    batch = inputs(1, 1, 1, total=1)  # as vLLM has it, one token a row
    expected = outputs(model, batch)
    with (
        vllm_context_scope(lambda *args, **kwargs: None, ops.zeros(3, "int32")),
        pytest.raises(NotImplementedError, match="dark attention, which KerasHub's vLLM"),
    ):
        outputs(model, batch)
    np.testing.assert_array_equal(outputs(model, batch), expected)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("CachedGemmaAttention", "_apply_rope"),
        ("LlamaAttention", "_compute_attention"),
        ("Phi3Decoder", "_compute_self_attention_mask"),
    ],
)
def test_a_kerashub_without_what_is_overridden_is_named_with_what_it_lacks(
    owner, name, monkeypatch
):
    private._check()
    monkeypatch.setattr(private.importlib.metadata, "version", lambda package: "9.9.9")
    monkeypatch.delattr(getattr(private, owner), name)
    with pytest.raises(ImportError, match=rf"keras-hub 9\.9\.9 lacks {owner}\.{name}\."):
        private._check()
