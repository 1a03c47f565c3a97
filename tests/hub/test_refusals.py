"""What `convert_to_dark` and `conversion_report` refuse, leaving the model as it was."""

import re

import keras
import keras_hub
import numpy as np
import pytest
from backends import on_one_backend
from keras_hub.models import Gemma3VisionEncoder, GemmaCausalLM

from keras_darkformer import conversion_report, convert_to_dark
from keras_darkformer.hub.families import INEXPRESSIBLE

from .models import dark, gemma, gemma2, gemma3, inputs, outputs, values

pytestmark = on_one_backend
BATCH = inputs(14, 5, 9)


class MyGemma(GemmaCausalLM):
    pass


def refused(model, error, match, **options):
    """Asserts the refusal, and that the model is untouched by it."""
    classes = type(model), type(getattr(model, "backbone", None))
    before, weights = outputs(model, BATCH), values(model)
    with pytest.raises(error, match=match):
        convert_to_dark(model, **options)
    assert classes == (type(model), type(getattr(model, "backbone", None)))
    assert values(model).keys() == weights.keys()
    np.testing.assert_array_equal(outputs(model, BATCH), before)


@pytest.fixture
def stock():
    return gemma2()


@pytest.fixture(scope="module")
def converted():
    return dark(gemma())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_features", 0),
        ("num_features", -8),
        ("num_features", 32.0),
        ("num_features", True),
        ("attention_mode", "quadratic"),
        ("projection", "hadamard"),
        ("geometry_scale", 0.0),
        ("geometry_scale", -1.0),
        ("geometry_scale", float("nan")),
        ("geometry_scale", float("inf")),
        ("layers", "local"),
        ("layers", [0, 2]),
        ("layers", [-3]),
        ("layers", [0.0]),
        ("layers", ["0"]),
        ("layers", []),
        ("layers", 1),
        ("chunk_size", 0),
        ("seed", -1),
    ],
)
def test_a_bad_argument_is_named_and_the_model_stays(stock, name, value):
    refused(stock, ValueError, name, **{name: value})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("num_feature", "num_features"), ("window", "sliding_window"), ("copies", "copy")],
)
def test_an_unknown_argument_is_named_with_the_nearest_known_one(stock, name, nearest):
    message = f"`convert_to_dark` has no argument `{name}`. Did you mean `{nearest}`"
    refused(stock, TypeError, re.escape(message), **{name: 1})


def test_an_argument_like_no_other_is_named_alone(stock):
    refused(stock, TypeError, "no argument `xyzzy`.$", xyzzy=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": [16, 16, 16]}, "one for each of the 2 converted layers"),
        ({"feature_map": ["dark"]}, "one for each of the 2 converted layers"),
        ({"feature_map": "hedgehog"}, "feature_map"),
        ({"num_features": [16, 0]}, "num_features"),
        ({"feature_map": "exponential", "sliding_window": 4}, "sliding_window"),
        ({"rope_geometry": "before", "rank": 4}, "rank"),
    ],
    ids=str,
)
def test_what_layers_can_not_be_is_refused(stock, options, message):
    refused(stock, ValueError, message, layers="all", **options)


@pytest.mark.parametrize("options", [{}, {"copy": True}], ids=["in_place", "copy"])
def test_a_backbone_stays_too(stock, options):
    refused(stock.backbone, ValueError, "layers", layers=[2], **options)


def test_a_dark_model_is_not_converted_twice(converted):
    refused(converted, ValueError, "dark already: DarkGemmaCausalLM")


def test_a_dark_backbone_is_not_converted_twice(converted):
    refused(converted.backbone, ValueError, "dark already: DarkGemmaBackbone")


def test_a_task_around_a_dark_backbone_is_not_converted(converted):
    refused(GemmaCausalLM(converted.backbone), ValueError, "dark already")


def test_a_subclass_is_refused_by_its_name():
    refused(MyGemma(gemma().backbone), ValueError, "subclasses GemmaCausalLM")


def test_a_model_of_another_kind_is_refused_by_its_name():
    inputs = {name: keras.Input((None,), name=name) for name in BATCH}
    model = keras.Model(inputs, inputs["token_ids"] * inputs["padding_mask"])
    refused(model, ValueError, "Functional has no keras.layers.MultiHeadAttention or")


def test_families_that_can_not_be_expressed_are_refused_with_the_reason():
    of_keras_hub = dir(keras_hub.models)
    for family, reason in INEXPRESSIBLE.items():
        assert any(name.startswith(family) for name in of_keras_hub), family
        stand_in = type(f"{family}Backbone", (keras.Model,), {"__module__": "keras_hub.models"})()
        with pytest.raises(ValueError, match=re.escape(reason)):
            convert_to_dark(stand_in)


def test_bloom_is_refused_by_its_biases():
    sizes = {"hidden_dim": 16, "intermediate_dim": 32, "num_heads": 2, "num_layers": 1}
    model = keras_hub.models.BloomBackbone(vocabulary_size=64, **sizes)
    refused(model, ValueError, "linear position biases")


@pytest.mark.parametrize("model", [None, "gemma_2b_en", gemma])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match="can't be converted"):
        convert_to_dark(model)


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.backbone], ids=["model", "backbone"])
def test_bidirectional_gemma3_is_refused_with_the_reason(part):
    model = gemma3(use_bidirectional_attention=True)
    refused(part(model), ValueError, "both directions .`use_bidirectional_attention=True`")


def test_gemma3_with_vision_is_refused_with_the_reason():
    encoder = Gemma3VisionEncoder(
        image_size=16,
        patch_size=4,
        num_heads=1,
        hidden_dim=4,
        num_layers=1,
        intermediate_dim=4,
        output_dim=16,
        pool_size=4,
    )
    model = gemma3(num_layers=1, vision_encoder=encoder)
    weights = [id(v) for v in model.variables]
    for part in (model, model.backbone):
        stock_class = type(part)
        with pytest.raises(ValueError, match="vision encoder: its image tokens attend"):
            convert_to_dark(part, layers="all")
        assert type(part) is stock_class
    assert [id(v) for v in model.variables] == weights


def test_a_stock_model_has_no_report(stock):
    with pytest.raises(ValueError, match="must be a model converted"):
        conversion_report(stock)


def test_a_task_around_a_backbone_of_another_family_is_refused():
    backbone = keras_hub.models.RobertaBackbone(32, 1, 2, 16, 32, max_sequence_length=9)
    task = keras_hub.models.BertTextClassifier(
        keras_hub.models.BertBackbone(32, 1, 2, 16, 32, max_sequence_length=9), num_classes=2
    )
    task.backbone = backbone
    with pytest.raises(ValueError, match=r"must hold a BertBackbone\. Received: one that holds"):
        convert_to_dark(task)
