"""The attention layers on their own: configs, paths, registered names."""

import inspect
import json

import keras
import numpy as np
import pytest
from backends import to_numpy
from keras import ops

from keras_darkformer import _lazy_hub, hub
from keras_darkformer.hub import DarkGemma3Attention, DarkGemmaAttention
from keras_darkformer.hub.attention import LAYER_OPTIONS

from .models import attentions, dark, gemma, gemma3, values

# Every argument away from its default.
STOCK = {
    "head_dim": 8,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "kernel_initializer": "he_normal",
    "use_sliding_window_attention": True,
    "sliding_window_size": 3,
    "query_head_dim_normalize": False,
    "dropout": 0.1,
}
DARK = {
    "num_features": 16,
    "attention_mode": "exact",
    "geometry_scale": 0.5,
    "train_geometry": False,
    "train_projection": True,
    "projection": "gaussian",
    "tie_geometry": True,
    "rope_geometry": "planes",
    "feature_form": "centered",
    "sliding_window": 5,
    "window_only": True,
    "chunk_size": 4,
    "remat": True,
    "seed": 3,
}
GEMMA3 = {
    "use_query_key_norm": True,
    "layer_norm_epsilon": 1e-3,
    "rope_wavelength": 1e6,
    "rope_scaling_factor": 2.0,
    "use_bidirectional_attention": True,
}
LAYERS = [(DarkGemmaAttention, STOCK | DARK), (DarkGemma3Attention, STOCK | GEMMA3 | DARK)]
KERNELS = {f"attention/{name}/kernel" for name in ("query", "key", "value", "attention_output")}
FEATURE_MAP = {f"attention/feature_map/{name}" for name in ("geometry", "projection")}
NORMS = {f"attention/{name}_norm/scale" for name in ("query", "key")}


def constructor_arguments(layer_class):
    stock = inspect.signature(layer_class.stock_cls).parameters
    # A soft cap is taken, and dropped: no kernel can hold it.
    return ({*stock} | {*LAYER_OPTIONS, "feature_form"}) - {"kwargs", "logit_soft_cap"}


@pytest.mark.parametrize(("layer_class", "arguments"), LAYERS)
def test_a_config_holds_every_argument_and_rebuilds_the_layer(layer_class, arguments):
    assert set(arguments) == constructor_arguments(layer_class)
    layer = layer_class(**arguments, name="mine", dtype="mixed_bfloat16", trainable=False)
    config = layer.get_config()
    initializer = config.pop("kernel_initializer")
    assert initializer["class_name"] == "HeNormal"
    for name in arguments.keys() - {"kernel_initializer"}:
        assert config[name] == arguments[name], name

    config = json.loads(json.dumps(layer.get_config()))
    again = layer_class.from_config(config)
    assert again.get_config() == config
    assert (again.name, again.trainable) == ("mine", False)
    assert again.dtype_policy.name == "mixed_bfloat16"
    serialized = keras.saving.serialize_keras_object(layer)
    assert type(keras.saving.deserialize_keras_object(serialized)) is layer_class


@pytest.mark.parametrize(
    ("layer_class", "options", "paths"),
    [
        (DarkGemmaAttention, {}, KERNELS | FEATURE_MAP),
        (DarkGemma3Attention, {}, KERNELS | FEATURE_MAP),
        (DarkGemma3Attention, {"use_query_key_norm": True}, KERNELS | FEATURE_MAP | NORMS),
    ],
)
def test_a_layer_built_alone_has_the_paths_of_a_converted_one(layer_class, options, paths):
    layer = layer_class(8, 4, 2, num_features=16, name="attention", **options)
    layer.build((None, None, 16))
    assert {weight.path for weight in layer.weights} == paths
    shapes = {weight.name: tuple(weight.shape) for weight in layer.feature_map.weights}
    assert shapes == {"geometry": (2, 8, 8), "projection": (2, 16, 8)}


@pytest.mark.parametrize("build", [gemma, gemma3])
def test_a_layer_rebuilt_from_a_converted_layers_config_computes_the_same(build, rng):
    converted = attentions(dark(build()))[-1]
    rebuilt = type(converted).from_config(converted.get_config())
    rebuilt.build((None, None, 16))
    weights = {path.partition("attention/")[2]: value for path, value in values(converted).items()}
    for weight in rebuilt.weights:
        weight.assign(weights[weight.path.partition("attention/")[2]])
    x = ops.convert_to_tensor(rng.standard_normal((3, 14, 16)), "float32")
    np.testing.assert_allclose(to_numpy(rebuilt(x)), to_numpy(converted(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", hub.__all__)
def test_every_layer_and_model_is_registered_under_its_name(name):
    exported = getattr(hub, name)
    if inspect.isclass(exported) and issubclass(exported, keras.layers.Layer):
        registered = f"keras_darkformer>{name}"
        assert keras.saving.get_registered_name(exported) == registered
        assert keras.saving.get_registered_object(registered) is exported


def test_every_layer_and_model_is_exported():
    exported = {name for name in hub.__all__ if name.startswith("Dark")}
    assert exported == set(_lazy_hub.HUB_CLASSES)
