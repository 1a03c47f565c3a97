"""The probe that finds the layers worth leaving exact."""

import numpy as np
import pytest
from backends import on_one_backend, to_numpy
from keras import ops

from keras_darkformer import choose_layers, convert_to_dark
from keras_darkformer.training import calibrate

from .models import LENGTH, gemma, inputs, outputs, row, values

OPTIONS = {"num_features": 8, "sliding_window": 2, "num_sinks": 1, "cache_size": 2}
SIZES = {"length": LENGTH, "repeat": 3, "max_tokens": 4 * LENGTH, "verbose": False}
DATA = inputs(LENGTH, LENGTH, 5)


@pytest.fixture(scope="module")
def found():
    model = gemma()
    before = values(model)
    choice = choose_layers(model, DATA, keep_exact=1, **SIZES, **OPTIONS)
    assert type(model).__name__ == "GemmaCausalLM"
    assert all((values(model)[path] == value).all() for path, value in before.items())
    return model, choice


def loss(model, token_ids, first):
    """In float64, from the logits of the whole."""
    batch = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    logits = outputs(model, batch).astype("float64")[:, first - 1 : -1]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logits, token_ids[:, first:, None], -1).mean()


@on_one_backend
def test_costs_are_those_of_a_model_with_one_layer_converted(found):
    model, choice = found
    text = DATA["token_ids"][:2]
    np.testing.assert_allclose(choice["before"]["text"], loss(model, text, 1), rtol=1e-5)
    dark = convert_to_dark(model, copy=True, layers="all", **OPTIONS)
    batch = {"token_ids": text, "padding_mask": np.ones_like(text)}
    calibrate(dark, [batch], refine=False, verbose=False)
    for layer in choice["layers"]:
        index = layer["index"]
        one = convert_to_dark(model, copy=True, layers=[index], **OPTIONS)
        source = dark.backbone.dark_layers[index].feature_map
        one.backbone.dark_layers[index].feature_map.set_weights(source.get_weights())
        expected = loss(one, text, 1) - choice["before"]["text"]
        np.testing.assert_allclose(layer["text"], expected, atol=1e-5)
    assert max(abs(layer["text"]) for layer in choice["layers"]) > 1e-4


@on_one_backend
def test_the_layers_of_the_largest_costs_are_left_exact(found):
    _, choice = found
    costs = [layer["text"] + layer["lookups"] for layer in choice["layers"]]
    assert choice["exact"] == [int(np.argmax(costs))]
    assert sorted(choice["exact"] + choice.indices) == list(range(len(costs)))
    assert choice.indices == choice["indices"]


def test_layers_without_features_are_chosen_too():
    options = {"feature_map": "none", "sliding_window": 2, "num_sinks": 1}
    choice = choose_layers(gemma(), DATA, keep_exact=1, **SIZES, **options)
    one = convert_to_dark(gemma(), layers=[0], **options)
    expected = loss(one, DATA["token_ids"][:2], 1) - choice["before"]["text"]
    np.testing.assert_allclose(choice["layers"][0]["text"], expected, atol=1e-5)


@on_one_backend
def test_it_prints_as_a_table_and_draws_a_figure(found, tmp_path):
    _, choice = found
    text = str(choice)
    assert "lookups" in text
    assert text.count("exact") == 1
    choice.plot(tmp_path / "choice.png")
    assert (tmp_path / "choice.png").stat().st_size > 1000


def test_a_copy_keeps_tied_embeddings():
    model = row("Llama", num_layers=1)
    backbone = type(model.backbone)
    config = model.backbone.get_config() | {"tie_word_embeddings": True}
    tied = type(model)(backbone.from_config(config))
    for _ in range(2):  # of the stock model, and of a dark one from its config
        dark = convert_to_dark(tied, copy=True, attention_mode="exact", geometry_scale=1.0)
        twin = type(dark.backbone).from_config(dark.backbone.get_config())
        assert len(twin.weights) == len(dark.backbone.weights)
        assert twin.get_config() == dark.backbone.get_config()
    token_ids = ops.convert_to_tensor(DATA["token_ids"])
    batch = {"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids)}
    np.testing.assert_allclose(to_numpy(dark(batch)), to_numpy(tied(batch)), atol=1e-4)


@pytest.mark.parametrize(("window", "length"), [(61, 256), (397, 800)])
def test_rows_are_longer_than_what_the_memory_holds(window, length):
    options = SIZES | OPTIONS | {"sliding_window": window, "length": None}
    with pytest.raises(ValueError, match=f"rows of at least `length={length}`"):
        choose_layers(gemma(), DATA, keep_exact=1, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_exact": 3}, ValueError, "`keep_exact` must be less than the 2 layers"),
        ({"keep_exact": 0}, ValueError, "`keep_exact` must be a positive integer"),
        ({"repeat": 9}, ValueError, "`length` must be at least three times `repeat`"),
        ({"length": 99}, ValueError, "rows of at least `length=99`"),
        ({"sliding_window": LENGTH - 3}, ValueError, f"more than the {LENGTH} tokens"),
        ({"num_feature": 8}, TypeError, "Did you mean `num_features`"),
        ({"layers": [0]}, TypeError, "layers"),
    ],
)
def test_arguments_that_can_not_be_are_refused(options, error, message):
    arguments = {"keep_exact": 1} | SIZES | OPTIONS | options
    with pytest.raises(error, match=message):
        choose_layers(gemma(), DATA, **arguments)
