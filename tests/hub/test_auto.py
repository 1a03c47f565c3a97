"""`attention_mode="auto"` of converted models: they read as exact ones and write as linear ones."""

import keras
import numpy as np
import pytest
from backends import on_one_backend, to_numpy
from keras import ops

from keras_darkformer import conversion_report, convert_to_dark, distil
from keras_darkformer.layers.core import FeatureAttention

from .models import LENGTH, attentions, dark, gemma, inputs, outputs, task_of

pytestmark = [on_one_backend, pytest.mark.filterwarnings("ignore:Converting")]
AUTO = {"attention_mode": "auto", "exact_below": LENGTH + 1}
BATCH = inputs(LENGTH, 9, 5)


@pytest.fixture(scope="module")
def models():
    return {
        "auto": dark(gemma(), **AUTO),
        "exact": dark(gemma(), attention_mode="exact"),
        "linear": dark(gemma()),
    }


def test_it_reads_as_the_exact_model(models):
    real = BATCH["padding_mask"].astype(bool)
    found, expected, linear = (outputs(models[x], BATCH)[real] for x in models)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert np.abs(linear - expected).max() > 0.1 * np.abs(expected).max()


def test_it_goes_on_from_a_state_as_the_linear_model(models):
    def logits(model):
        cache = model.get_initial_cache(3, LENGTH)
        token_ids = ops.convert_to_tensor(BATCH["token_ids"])
        return to_numpy(model.call_with_cache(token_ids, cache, 0)[0])

    np.testing.assert_allclose(logits(models["auto"]), logits(models["linear"]), atol=1e-5)


def test_it_generates_what_the_linear_model_does(models):
    prompt = inputs(5, 3)
    found, expected = (
        models[x].generate(dict(prompt), stop_token_ids=None)["token_ids"]
        for x in ("auto", "linear")
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("family", ["Gemma", "Llama", "GPT2", "GPTNeoX", "Bert", "ViT"])
def test_the_pass_reaches_the_layers(family, monkeypatch):
    asked = []

    def note(self, *lengths, causal, training):
        asked.append((causal, bool(training)))
        return False

    monkeypatch.setattr(FeatureAttention, "computes_exactly", note)
    stock = task_of(family)
    model = convert_to_dark(getattr(stock, "backbone", stock), attention_mode="auto")
    causal = family not in ("Bert", "ViT")
    is_vision = family == "ViT"
    given = np.zeros((2, 16, 16, 3)) if is_vision else inputs(LENGTH, LENGTH, model=model)
    for training in (False, True):
        asked.clear()
        model(given, training=training)
        assert set(asked) == {(causal, training)}


def test_keras_own_layers_do_it_too():
    x = np.random.default_rng(0).standard_normal((2, 6, 8)).astype("float32")

    def model(**options):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((None, 8))
        attention = keras.layers.MultiHeadAttention(2, 4)
        made = keras.Model(inputs, attention(inputs, inputs, use_causal_mask=True))
        return convert_to_dark(made, num_features=8, seed=1, **options) if options else made

    found = model(attention_mode="auto", exact_below=7)
    exact, linear = model(attention_mode="exact"), model(attention_mode="linear")
    np.testing.assert_allclose(to_numpy(found(x)), to_numpy(exact(x)), atol=1e-6)
    long = np.concatenate([x, x], axis=1)
    np.testing.assert_allclose(to_numpy(found(long)), to_numpy(linear(long)), atol=1e-6)


def test_distillation_fits_the_features_of_short_rows(monkeypatch):
    found = []
    original = FeatureAttention.computes_exactly

    def note(self, *args, **kwargs):
        found.append(original(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(FeatureAttention, "computes_exactly", note)
    model, batch = dark(gemma(), **AUTO), inputs(LENGTH, LENGTH)
    distil(model, gemma(), [batch], steps=1, verbose=0)
    assert found
    assert not any(found)
    outputs(model, batch)
    assert found[-1]


def test_the_report_says_it():
    model = dark(gemma(), **AUTO)
    assert conversion_report(model)["attention_mode"] == "auto"
    assert all(x.computes_exactly(LENGTH, LENGTH, causal=True) for x in attentions(model))
