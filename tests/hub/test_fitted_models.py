"""Models after calibration and transfer: copied, in half precision, and generated with."""

import json

import keras
import numpy as np
import pytest
from backends import DEFAULT_JIT, compiled, further, on_one_backend, to_numpy
from keras import tree
from keras_hub.samplers import BeamSampler

from .models import feature_maps, forward, gemma, gemma2, gemma3, inputs, outputs
from .saved import BATCH, fitted
from .searches import beam_search, greedy_search

pytestmark = pytest.mark.filterwarnings("ignore:Converting")


@pytest.mark.parametrize(
    "kind", ["spectral", "windowed", *further("clusters", "transferred", "before")]
)
def test_a_copy_from_config_and_weights_is_the_same_model(saved, kind):
    backbone = saved.fitted(kind)[0].backbone
    twin = type(backbone).from_config(json.loads(json.dumps(backbone.get_config())))
    assert [w.path.split("/", 1)[-1] for w in twin.weights] == [
        w.path.split("/", 1)[-1] for w in backbone.weights
    ]
    twin.set_weights(backbone.get_weights())
    np.testing.assert_array_equal(outputs(twin, BATCH), outputs(backbone, BATCH))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_feature_maps_are_fitted_and_kept_in_float32_in_half_precision(dtype):
    model = fitted("spectral", dtype=dtype)
    for feature_map in feature_maps(model):
        assert np.abs(to_numpy(feature_map.query_shift.value)).max() > 0  # centred
        for weight in feature_map.weights:
            value = to_numpy(weight.value)
            assert value.dtype == "float32"
            assert np.isfinite(value).all()
            if weight.name == "projection":  # not what bfloat16 can hold
                assert (value.view("uint32") & 0xFFFF).any()
    assert np.isfinite(outputs(model, BATCH)).all()


GENERATING = {
    "clusters": ("clusters", gemma, {}),
    "windowed": ("windowed", gemma, {}),
    "before-gemma2": ("before", gemma2, {"layers": "all"}),
    "windowed-gemma3": ("windowed", lambda: gemma3(num_layers=2), {"layers": [1]}),
}


ASKED = ("clusters", "windowed", *further("before-gemma2", "windowed-gemma3"))


@pytest.fixture(
    scope="module",
    params=ASKED,
)
def model(request):
    """Prompts of all lengths share what it compiles."""
    kind, build, options = GENERATING[request.param]
    model = fitted(kind, build, **options)
    model.compile(sampler="greedy")
    return model


@pytest.fixture(scope="module")
def call(model):
    return forward(model)


# Shorter than the window, and one longer.
@pytest.mark.parametrize("lengths", [(8, 2, 5), (12, 7, 10)], ids=str)
def test_greedy_generation_equals_an_argmax_loop(model, call, lengths):
    prompt = inputs(*lengths)
    expected = greedy_search(model, prompt, call)
    found = model.generate(dict(prompt), stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected[prompt["padding_mask"] == 0])) > 3


def shapes(cache):
    return [tuple(x.shape) for x in tree.flatten(cache)]


@pytest.mark.parametrize("kind", ["clusters", "windowed", "before"])
def test_the_state_has_a_constant_size(saved, kind):
    model = saved.fitted(kind)[0]
    sizes = shapes(model.get_initial_cache(2, 16))
    assert sizes == shapes(model.get_initial_cache(2, 4096))
    step = compiled(model.call_with_cache) if DEFAULT_JIT else model.call_with_cache
    token_ids = keras.ops.convert_to_tensor(BATCH["token_ids"][:2, :9])
    _, _, cache = step(token_ids, model.get_initial_cache(2, 16), 0)
    assert shapes(cache) == sizes


@on_one_backend
@pytest.mark.slow
def test_beam_search_equals_a_search_over_the_full_forward():
    model, prompt = fitted("windowed"), inputs(7, 7, 7, total=10)
    model.compile(sampler=BeamSampler(num_beams=3))
    found = model.generate(dict(prompt), stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, beam_search(model, prompt, num_beams=3))
