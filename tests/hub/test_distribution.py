"""Models over several devices: same results as on one, and every weight where it belongs."""

import json
import re

import numpy as np
import pytest
from backends import BACKEND
from fresh_process import EIGHT_DEVICES, run_python
from keras.distribution import DeviceMesh

from keras_darkformer import hub
from keras_darkformer.hub.families import FAMILIES

from . import models

MAP, HEADS = "get_layout_map", "num_key_value_heads"
SHARDED = ("Gemma", "Llama", "Llama3", "Qwen", "QwenMoe", "Qwen3Moe")
MAPS = {
    "two geometries": {"tie_geometry": False, "sliding_window": 3},
    "window": {"sliding_window": 3},
    "exponential": {"feature_map": "exponential"},
    "before": {"rope_geometry": "before"},
}


def mesh(*shape):
    devices = [f"cpu:{i}" for i in range(np.prod(shape))]
    return DeviceMesh(shape, ("batch", "model"), devices)


def model_of(name, **options):
    return models.gemma(**options) if name == "Gemma" else models.row(name, **options)


def layouts(layout_map, weights):
    """Axes by path, only of those that are split."""
    found = {weight.path: layout_map[weight.path] for weight in weights}
    return {path: tuple(x.axes) for path, x in found.items() if x is not None}


def test_a_dark_backbone_has_a_layout_map_where_its_stock_class_has_one():
    has = {f.name for f in FAMILIES if hasattr(getattr(hub, f"Dark{f.name}Backbone"), MAP)}
    assert has == {f.name for f in FAMILIES if hasattr(f.backbone, MAP)} == set(SHARDED)


@pytest.mark.parametrize("name", SHARDED)
def test_stock_weights_keep_their_layouts_and_feature_maps_are_split_by_heads(name):
    model = model_of(name)
    stock = layouts(type(model.backbone).get_layout_map(mesh(2, 2)), model.weights)
    assert len(stock) > 10
    dark = models.dark(model)
    ours = layouts(type(dark.backbone).get_layout_map(mesh(2, 2)), dark.weights)
    maps = {w.path for attention in models.feature_maps(dark) for w in attention.weights}
    assert {path: ours.pop(path) for path in maps} == dict.fromkeys(maps, ("model",))
    assert ours == stock


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
def test_every_weight_of_every_feature_map_matches_one_pattern(options):
    dark = models.convert_to_dark(models.gemma(), num_features=16, **options)
    layout_map = type(dark.backbone).get_layout_map(mesh(2, 2))
    for feature_map in models.feature_maps(dark):
        assert len(feature_map.weights) >= 2
        for weight in feature_map.weights:
            assert tuple(layout_map[weight.path].axes) == ("model",)
            assert weight.shape[0] in (2, 4)  # heads of keys; of queries


@pytest.mark.parametrize("name", SHARDED)
def test_heads_that_cannot_be_split_are_kept_whole(name):
    dark = models.dark(model_of(name, num_key_value_heads=1))
    cls = type(dark.backbone)
    split = layouts(cls.get_layout_map(mesh(2, 2)), dark.weights)
    whole = layouts(cls.get_layout_map(mesh(2, 2), num_key_value_heads=1), dark.weights)
    weights = {weight.path: weight for weight in dark.weights}
    changed = {path for path in split if split[path] != whole[path]}
    indivisible = r".*/feature_map/.*|.*attention/(key|value)/kernel"
    assert changed == {path for path in split if re.fullmatch(indivisible, path)}
    for path in changed:  # nothing is asked of an axis of size 1
        for size, axis in zip(weights[path].shape, whole[path], strict=False):
            assert size != 1 or axis is None
    weights_of_maps = sum(len(x.weights) for x in models.feature_maps(dark))
    assert len(changed) == weights_of_maps + 2 * len(models.feature_maps(dark))


def test_heads_that_can_be_split_are():
    maps = [hub.DarkGemmaBackbone.get_layout_map(mesh(2, 2), **x) for x in ({}, {HEADS: 4})]
    first, second = ({pattern: x.axes for pattern, x in found.items()} for found in maps)
    assert first == second


CODE = """
    import contextlib, json, sys

    sys.path.insert(0, "tests")
    import keras
    import numpy as np
    from hub import models
    from keras.distribution import DataParallel, DeviceMesh, ModelParallel, list_devices

    from keras_darkformer import calibrate, hub

    batch = models.inputs(*[models.LENGTH] * 4, 9, 6, 14, 3)
    targets = np.random.default_rng(0).integers(0, models.VOCABULARY, (8, models.LENGTH))
    prompts = models.inputs(*[5] * 4, 3, 4, 6, 7, total=10)

    def run(distribution=contextlib.nullcontext, heads=2):
        with distribution():
            model = models.gemma(heads, num_key_value_heads=heads)
            model = models.dark(model, sliding_window=3)
            if heads == 2:  # as many layers; to have it quick, one of them is not calibrated
                calibrate(model, batch, method="spectral", refine=False, verbose=0)
            feature_map = models.feature_maps(model)[0]
            feature_map.redraw(3)
            placed = {}  # the size of a shard by heads, and how many devices hold one
            for weight in feature_map.weights:
                shards = weight.value.addressable_shards
                placed[weight.name] = [shards[0].data.shape[0], len(shards)]
            model.compile(
                keras.optimizers.SGD(0.1),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                sampler="greedy",
            )
            generated = model.generate(prompts, stop_token_ids=None)["token_ids"]
            history = keras.Model.fit(model, batch, targets, batch_size=8, verbose=0)
            weights = {path: value.tolist() for path, value in models.values(model).items()}
        return {
            "generated": np.asarray(generated).tolist(),
            "loss": history.history["loss"][0],
            "weights": weights,
            "placed": placed,
        }

    def sharded(heads):
        mesh = DeviceMesh((4, 2), ("batch", "model"), list_devices())
        layout_map = hub.DarkGemmaBackbone.get_layout_map(mesh, num_key_value_heads=heads)
        return ModelParallel(layout_map=layout_map, batch_dim_name="batch").scope

    results = {
        "one": run(),
        "model": run(sharded(2)),
        "single one": run(heads=1),
        "single": run(sharded(1), heads=1),
        "data": run(DataParallel().scope, heads=1),
    }
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if BACKEND != "jax":
        pytest.skip(f"keras.distribution is JAX's; {BACKEND} has its own ways to distribute")
    path = tmp_path_factory.mktemp("distribution") / "results.json"
    run_python(CODE, path, env=EIGHT_DEVICES)
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("many", "one"),
    [("data", "single one"), ("model", "one"), ("single", "single one")],
)
def test_eight_devices_compute_what_one_does(many, one, results):
    many, one = results[many], results[one]
    # The loss comes from the weights before the step, the generated text too.
    assert many["generated"] == one["generated"]
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=1e-5)
    assert many["weights"].keys() == one["weights"].keys()
    for path, value in one["weights"].items():
        np.testing.assert_allclose(many["weights"][path], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_feature_maps_lie_on_all_devices_split_by_heads_where_they_can_be(results):
    def heads(name):
        found = results[name]["placed"]
        assert {devices for _, devices in found.values()} == {8}
        assert {found[x][0] for x in found if x != "far_offset"} == {found["geometry"][0]}
        return found["geometry"][0], found["far_offset"][0]  # of keys, of queries

    names = {"geometry", "projection", "far_offset", "proposal", "log_weight"}
    assert results["model"]["placed"].keys() == names | {"query_shift", "key_shift"}
    assert heads("data") == (1, 4)
    assert heads("model") == (1, 2)
    assert heads("single") == (1, 4)
