"""Models after calibration and transfer: saved, loaded, copied, and generated with."""

import json

import keras
import numpy as np
import pytest
from backends import to_numpy
from fresh_process import run_python
from keras import tree
from keras_hub.models import GemmaCausalLMPreprocessor, GemmaTokenizer
from keras_hub.samplers import BeamSampler

from keras_darkformer import calibrate, convert_to_dark, transfer_attention

from .models import LENGTH, feature_maps, gemma, gemma2, gemma3, inputs, outputs, values
from .searches import beam_search, greedy_search

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

BATCH = inputs(14, 5, 9)
DATA = [inputs(14, 9, 5), inputs(7, 14, 12)]
PROMPTS = ["the left", "a"]
WINDOW = 6
# Options of the conversion, of calibration, and whether to train afterwards.
KINDS = {
    "spectral": ({}, {"method": "spectral"}, False),
    "clusters": ({}, {"method": "clusters", "refine": False}, False),
    "windowed": ({"sliding_window": WINDOW}, {"refine": False}, False),
    "transferred": ({"tie_geometry": False}, {"refine": False}, True),
    "planes": ({"rope_geometry": "planes"}, {}, False),
}
DTYPES = {"planes": "mixed_bfloat16", "clusters": "bfloat16"}
LOAD = """
    import json, sys
    import keras, keras_hub, numpy as np
    import keras_darkformer

    folder, (names, prompts, options) = sys.argv[1], map(json.loads, sys.argv[2:])
    batch = dict(np.load(folder + "/batch.npz"))
    arrays, facts = {}, {}
    for name in names:
        path = f"{folder}/{name}"
        model = (
            keras.saving.load_model(path)
            if name.endswith(".keras")
            # Stock presets in mixed precision don't load without saying so either.
            else keras_hub.models.CausalLM.from_preset(path, **options.get(name, {}))
        )
        arrays[name] = keras.ops.convert_to_numpy(keras.ops.cast(model(batch), "float32"))
        facts[name] = {
            "class": type(model).__name__,
            "dtypes": sorted({w.dtype for w in model.weights if "/feature_map/" in w.path}),
        }
        if name == "windowed":
            facts[name]["text"] = model.generate(prompts, max_length=16)
    np.savez(folder + "/outputs.npz", **arrays)
    print(json.dumps(facts))
"""


def fitted(kind, build=gemma, preprocessor=None, dtype=None, **more):
    options, how, train = KINDS[kind]
    options = {"num_features": 16, "seed": 5} | options | more
    stock = {} if dtype is None else {"dtype": dtype}
    if preprocessor is not None:
        stock["preprocessor"] = preprocessor
    model = convert_to_dark(build(**stock), **options)
    calibrate(model, DATA, verbose=False, seed=2, **how)
    if train:
        transfer_attention(model, DATA, steps=2, verbose=0)
    return model


@pytest.fixture(scope="module")
def saved(sentencepiece_proto, tmp_path_factory):
    """Models by the names they were saved under, and the folder."""
    folder, models = tmp_path_factory.mktemp("fitted"), {}
    for kind in KINDS:
        tokenizer = GemmaTokenizer(proto=sentencepiece_proto)
        preprocessor = GemmaCausalLMPreprocessor(tokenizer, sequence_length=16)
        model = models[kind] = fitted(kind, preprocessor=preprocessor, dtype=DTYPES.get(kind))
        model.save_to_preset(folder / kind)
    for kind in ("clusters", "windowed"):
        models[f"{kind}.keras"] = models[kind]
        models[kind].save(folder / f"{kind}.keras")
    np.savez(folder / "batch.npz", **BATCH)
    return models, folder


@pytest.fixture(scope="module")
def fresh(saved):
    """What a fresh process makes of the files."""
    models, folder = saved
    options = {kind: {"dtype": dtype} for kind, dtype in DTYPES.items()}
    arguments = (list(models), PROMPTS, options)
    facts = run_python(LOAD, folder, *(json.dumps(x) for x in arguments))
    return dict(np.load(folder / "outputs.npz")), json.loads(facts.splitlines()[-1])


@pytest.mark.parametrize("name", [*KINDS, "clusters.keras", "windowed.keras"])
def test_a_fresh_process_loads_the_same_fitted_model(saved, fresh, name):
    arrays, facts = fresh
    assert facts[name]["class"] == "DarkGemmaCausalLM"
    assert facts[name]["dtypes"] == ["float32"]
    expected = outputs(saved[0][name], BATCH)
    np.testing.assert_allclose(arrays[name], expected, rtol=1e-4, atol=1e-4)


def test_a_fresh_process_generates_the_same_text_with_a_window(saved, fresh):
    texts = saved[0]["windowed"].generate(PROMPTS, max_length=16)
    assert fresh[1]["windowed"]["text"] == texts
    assert all(len(text) > len(prompt) for text, prompt in zip(texts, PROMPTS, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_from_config_and_weights_is_the_same_model(saved, kind):
    backbone = saved[0][kind].backbone
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
        assert feature_map.form == "centered"
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
    "window_only": ("windowed", gemma, {"window_only": True}),
    "planes-gemma2": ("planes", gemma2, {"layers": "all"}),
    "windowed-gemma3": ("windowed", lambda: gemma3(num_layers=2), {"layers": [1]}),
}


SLOW = ("window_only", "planes-gemma2", "windowed-gemma3")


@pytest.fixture(
    scope="module",
    params=[pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in GENERATING],
)
def model(request):
    kind, build, options = GENERATING[request.param]
    return fitted(kind, build, **options)


# Shorter than the window, and one longer.
@pytest.mark.parametrize("lengths", [(8, 2, 5), (12, 7, 10)], ids=str)
def test_greedy_generation_equals_an_argmax_loop(model, lengths):
    prompt = inputs(*lengths)
    model.compile(sampler="greedy")
    expected = greedy_search(model, prompt)
    found = model.generate(dict(prompt), stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected[prompt["padding_mask"] == 0])) > 3


def shapes(cache):
    return [tuple(x.shape) for x in tree.flatten(cache)]


@pytest.mark.parametrize("kind", ["clusters", "windowed", "planes"])
def test_the_state_has_a_constant_size(saved, kind):
    model = saved[0][kind]
    sizes = shapes(model.get_initial_cache(2, 16))
    assert sizes == shapes(model.get_initial_cache(2, 4096))
    _, _, cache = model.call_with_cache(
        keras.ops.convert_to_tensor(BATCH["token_ids"][:2, :9]), model.get_initial_cache(2, 16), 0
    )
    assert shapes(cache) == sizes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clusters", "windowed"])
def test_beam_search_equals_a_search_over_the_full_forward(kind):
    model, prompt = fitted(kind), inputs(7, 7, 7, total=10)
    model.compile(sampler=BeamSampler(num_beams=3))
    found = model.generate(dict(prompt), stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, beam_search(model, prompt, num_beams=3))


def test_features_can_be_left_out_of_a_fitted_window_at_any_time(saved):
    """Then only what is within reach of the windows counts."""
    model = saved[0]["windowed"]
    before = values(model)
    batch = inputs(LENGTH, LENGTH, LENGTH)
    with_features = outputs(model, batch)
    for feature_map in feature_maps(model):
        feature_map.window_only = True
    alone = outputs(model, batch)
    near = slice(0, WINDOW)
    np.testing.assert_allclose(alone[:, near], with_features[:, near], rtol=1e-3, atol=1e-3)
    assert np.abs(alone[:, -1] - with_features[:, -1]).max() > 1e-2
    for feature_map in feature_maps(model):
        feature_map.window_only = False
    np.testing.assert_allclose(outputs(model, batch), with_features, rtol=1e-5, atol=1e-5)
    assert all((values(model)[path] == value).all() for path, value in before.items())
