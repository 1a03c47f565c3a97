"""Options are spelled once: every layer takes, shows, keeps and writes them the same way."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
from layers.helpers import ATTENTION_OPTIONS, FEATURE_OPTIONS, HEADS

from keras_darkformer import (
    AttentionOptions,
    ConversionOptions,
    DarkAttention,
    DarkFeatureMap,
    DarkTransformerBlock,
    FeatureOptions,
    convert_to_dark,
)
from keras_darkformer.layers import ExponentialFeatureMap

# Every function that takes options, how it is called, and the options that it takes.
MAP = {"num_heads": 2, "head_dim": 6}
OWNERS = {
    "DarkFeatureMap": (DarkFeatureMap, MAP, FeatureOptions),
    "ExponentialFeatureMap": (ExponentialFeatureMap, MAP, FeatureOptions),
    "DarkAttention": (DarkAttention, HEADS, AttentionOptions),
    "DarkTransformerBlock": (
        DarkTransformerBlock,
        {"intermediate_dim": 8, "num_heads": 2},
        AttentionOptions,
    ),
    "convert_to_dark": (convert_to_dark, {"model": None}, ConversionOptions),
}
LAYERS = [name for name in OWNERS if name != "convert_to_dark"]
owners = pytest.mark.parametrize("owner", OWNERS)
CONVERSION_OPTIONS = ATTENTION_OPTIONS | {"layers": (0, 2), "num_features": (4, 8), "seed": 3}


def refusal(owner, name):
    function, arguments, _ = OWNERS[owner]
    with pytest.raises(TypeError) as caught:
        function(**arguments, **{name: 3})
    return str(caught.value)


@owners
def test_unknown_names_are_refused_with_the_known_one_that_is_nearest(owner):
    _, _, options = OWNERS[owner]
    for name in options.names():
        if name == "feature_map" and owner in ("DarkFeatureMap", "ExponentialFeatureMap"):
            continue  # the class says it
        for wrong in (f"{name}_", f"x{name}"):
            expected = f"`{owner}` has no argument `{wrong}`. Did you mean `{name}`?"
            assert refusal(owner, wrong) == expected
    assert refusal(owner, "xyzzy") == f"`{owner}` has no argument `xyzzy`."


@pytest.mark.parametrize(
    ("owner", "wrong", "right"),
    [
        ("DarkAttention", "num_featuers", "num_features"),
        ("DarkAttention", "feature_form", "feature_map"),
        ("DarkAttention", "slide_window", "sliding_window"),
        ("DarkAttention", "rope_wavelength", "rope_max_wavelength"),  # its own argument
        ("DarkAttention", "trainabel", "trainable"),  # Keras' argument
        ("DarkTransformerBlock", "key_value_heads", "num_key_value_heads"),
        ("DarkFeatureMap", "num_queryheads", "num_query_heads"),
        ("convert_to_dark", "copies", "copy"),
        ("convert_to_dark", "layer", "layers"),
    ],
)
def test_names_that_were_meant(owner, wrong, right):
    assert f"Did you mean `{right}`?" in refusal(owner, wrong)


@owners
def test_the_signature_shows_every_option_with_its_default(owner):
    function, _, options = OWNERS[owner]
    shown = inspect.signature(function).parameters
    expected = {field.name: field for field in dataclasses.fields(options)}
    if owner in ("DarkFeatureMap", "ExponentialFeatureMap"):
        del expected["feature_map"]  # the class says it
        assert "feature_map" not in shown
    for name, field in expected.items():
        assert shown[name].default == field.default, name
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[name].annotation == field.type
    assert list(shown)[-1] == "kwargs"


@pytest.mark.parametrize("owner", LAYERS)
def test_a_layer_keeps_its_options_and_writes_them_flat(owner):
    cls, arguments, options = OWNERS[owner]
    given = {name: ATTENTION_OPTIONS[name] for name in options.names()}
    if owner == "ExponentialFeatureMap":
        given |= {
            "feature_map": "exponential",
            "sliding_window": None,
            "num_sinks": 0,
            "cache_size": 0,
        }
    layer = cls(**arguments | given)
    assert layer.options == options(**given)
    assert type(layer.options) is options
    config = layer.get_config()
    assert {name: config[name] for name in options.names()} == given
    assert not any(isinstance(config[name], dict | list | tuple) for name in given)
    restored = cls.from_config(json.loads(json.dumps(config)))
    assert restored.options == layer.options
    assert restored.get_config() == config
    # By default, too: but for the seed, which a map draws.
    fresh = cls(**arguments).get_config()
    assert set(options.names()) <= set(fresh)
    assert cls.from_config(fresh).get_config() == fresh


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (FeatureOptions, FEATURE_OPTIONS),
        (AttentionOptions, ATTENTION_OPTIONS),
        (ConversionOptions, CONVERSION_OPTIONS),
    ],
)
def test_options_come_back_from_their_config(kind, values):
    options = kind(**values)
    assert kind.names() == [field.name for field in dataclasses.fields(kind)]
    assert set(values) == set(kind.names())
    for given in (options, kind()):
        config = given.get_config()
        assert list(config) == kind.names()
        assert kind(**json.loads(json.dumps(config))) == given
    for name in set(values) - {"feature_map", "rope_geometry"}:
        assert getattr(options, name) == values[name] != getattr(kind(), name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.rank = 2
    with pytest.raises(TypeError):
        kind(3)


def test_a_part_of_the_options_is_taken_with_changes():
    options = AttentionOptions(**ATTENTION_OPTIONS)
    assert options.of(FeatureOptions) == FeatureOptions(**FEATURE_OPTIONS)
    changed = options.of(FeatureOptions, seed=7)
    assert changed == FeatureOptions(**FEATURE_OPTIONS | {"seed": 7})
    assert options.seed == FEATURE_OPTIONS["seed"]
    with pytest.raises(ValueError, match="`rank` must be"):
        options.of(FeatureOptions, rank=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_features", 0),
        ("num_features", (8, 0)),
        ("num_features", None),
        ("feature_map", "magic"),
        ("rank", 2.0),
        ("projection", "sobol"),
        ("geometry_scale", -1.0),
        ("geometry_scale", float("inf")),
        ("geometry_scale", float("nan")),
        ("rope_geometry", "beside"),
        ("sliding_window", 0),
        ("seed", -1),
        ("seed", 0.5),
        ("seed", True),
        ("attention_mode", "cosine"),
        ("chunk_size", 0),
        ("layers", "some"),
        ("layers", (0, "one")),
        ("layers", None),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=rf"(?s)`{name}` must.*Received: .*"):
        ConversionOptions(**{name: value})


def test_integers_of_numpy_become_ints():
    options = AttentionOptions(
        num_features=np.int64(8), rank=np.int32(2), seed=np.uint32(5), chunk_size=np.int64(4)
    )
    assert options == AttentionOptions(num_features=8, rank=2, seed=5, chunk_size=4)
    json.dumps(options.get_config())


def test_a_layer_without_features_does_not_set_the_scale_of_the_others():
    options = {"sliding_window": 4, "layers": (0, 1), "feature_map": ("none", "dark")}
    mixed = ConversionOptions(num_features=(1, 64), **options).resolve([False] * 2, 8)
    alone = ConversionOptions(num_features=64, layers=(1,)).resolve([False] * 2, 8)
    assert mixed.geometry_scale == alone.geometry_scale
