"""Families other than Gemma: the same call, the same promises."""

import json
import re

import keras
import keras_hub
import numpy as np
import pytest
from backends import DEFAULT_JIT, compiled, to_numpy
from fresh_process import run_python
from keras import ops

from keras_darkformer import (
    approximation_report,
    calibrate,
    conversion_report,
    convert_to_dark,
    distil,
    hub,
    transfer_attention,
)
from keras_darkformer.ops.reference import dark_attention_reference

from .models import (
    CAUSAL,
    ENCODERS,
    LENGTH,
    ROWS,
    VOCABULARY,
    WINDOW,
    attentions,
    dark,
    feature_maps,
    inputs,
    outputs,
    real,
    row,
    values,
)
from .searches import greedy_search

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

EXACT = {"attention_mode": "exact", "geometry_scale": 1.0, "layers": "all"}
# One layer stays exact, with a key/value cache.
MIXED = {"layers": [0, 2]}
# Where a test compiles much and families differ little: one of each kind. What all of them do is
# tried by benchmarks/compatibility.py too.
KINDS = ("Llama", "Mixtral", "Qwen3", "Phi3", "GPT2", "Bert")
TASKS = [(name, task) for name in ENCODERS for task in ("MaskedLM", "TextClassifier")]


def assert_close(actual, expected, tolerance=1e-4):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(scope="module", params=ROWS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def stock(family):
    return row(family)


@pytest.fixture(scope="module")
def mixed(stock):
    """A model of two dark layers and an exact one between them."""
    return dark(stock, copy=True, **MIXED)


@pytest.mark.parametrize("lengths", [(LENGTH,) * 3, (LENGTH, 5, 9)], ids=["full", "ragged"])
def test_exact_mode_at_scale_one_is_the_source(stock, lengths):
    batch = inputs(*lengths, model=stock)
    converted = convert_to_dark(stock, copy=True, **EXACT)
    expected = outputs(stock, batch)
    assert_close(outputs(converted, batch), expected, tolerance=1e-5)
    flatter = convert_to_dark(stock, copy=True, **EXACT | {"geometry_scale": 0.5})
    assert np.abs(outputs(flatter, batch) - expected).max() > 0.01 * np.abs(expected).max()


def named(layer, name):
    return getattr(layer, name, None) or getattr(layer, f"_{name}")


def projected(attention, x):
    """Query, key and value as the stock layer makes them."""
    query, key, value = (named(attention, f"{y}_dense")(x) for y in ("query", "key", "value"))
    if hasattr(attention, "_query_dense_layer_norm"):
        query = attention._query_dense_layer_norm(query)
        key = attention._key_dense_layer_norm(key)
    if hasattr(attention, "rotary_embedding_layer"):
        query, key = map(attention.rotary_embedding_layer, (query, key))
    return query, key, value


@pytest.mark.parametrize("padded", [False, True])
def test_a_converted_layer_is_the_reference_between_its_own_projections(family, mixed, padded, rng):
    attention = attentions(mixed)[-1]
    x = ops.convert_to_tensor(rng.standard_normal((3, LENGTH, 32)), "float32")
    mask = real(LENGTH, 9, 5) if padded else None
    expected, _ = dark_attention_reference(
        *to_numpy(projected(attention, x)),
        to_numpy(attention.feature_map.geometry.value),
        to_numpy(attention.feature_map.projection.value),
        causal=family in CAUSAL,
        key_mask=mask,
    )
    dense = named(attention, "output_dense")
    expected = np.einsum("btnh,nhd->btd", expected, to_numpy(dense.kernel))
    if dense.bias is not None:
        expected += to_numpy(dense.bias)
    given = None if mask is None else ops.cast(mask, "int32")
    takes_two = isinstance(attention, keras.layers.MultiHeadAttention)
    actual = attention(*[x, x] if takes_two else [x], attention_mask=given)
    assert_close(to_numpy(actual), expected)


@pytest.mark.parametrize("family", [x for x in KINDS if x in CAUSAL], scope="module")
def test_recurrent_logits_equal_those_of_the_full_forward(family, mixed):
    batch = inputs(LENGTH, LENGTH, LENGTH)
    step = compiled(mixed.call_with_cache) if DEFAULT_JIT else mixed.call_with_cache
    cache, logits = mixed.get_initial_cache(3, LENGTH), []
    for start in range(LENGTH):
        token_ids = ops.convert_to_tensor(batch["token_ids"][:, start : start + 1])
        part, _, cache = step(token_ids, cache, start)
        logits.append(to_numpy(part))
    assert_close(np.concatenate(logits, axis=1), outputs(mixed, batch), tolerance=1e-3)


@pytest.mark.parametrize("family", CAUSAL, scope="module")
def test_greedy_generation_of_a_ragged_batch_equals_an_argmax_loop(family, mixed):
    prompt = inputs(8, 2, 5)
    expected = greedy_search(mixed, prompt)
    assert len(set(expected[1, 2:])) > 2  # not one token over and over
    mixed.compile(sampler="greedy")
    found = mixed.generate(dict(prompt), stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, expected)


def test_stock_weights_stay_under_their_paths_and_only_feature_maps_are_new(stock, mixed):
    # Some blocks of experts have a name from a counter.
    before, after = (
        {re.sub(r"moe_block_\d+", "moe_block", path): value for path, value in values(x).items()}
        for x in (stock, mixed)
    )
    assert before.keys() <= after.keys()
    new = {path.rsplit("/", 2)[1] for path in after.keys() - before.keys()}
    assert new == {"feature_map"}
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


def test_a_report_names_the_layers(family, mixed):
    report = conversion_report(mixed)
    assert (report["converted"], report["left"]) == ([0, 2], [1])
    kind = "local" if family == "Mistral" else "global"
    assert {layer["kind"] for layer in report["layers"]} == {kind}


@pytest.mark.parametrize("family", KINDS, scope="module")
def test_calibration_transfer_and_report(family, stock):
    options = {"sliding_window": WINDOW - 1 if family in CAUSAL else None, "tie_geometry": False}
    model = convert_to_dark(stock, num_features=16, copy=True, layers="all", **options)
    batch = inputs(LENGTH, 5, 9, model=stock)
    calibrate(model, batch, refine=False, verbose=False)
    assert {feature_map.form for feature_map in feature_maps(model)} == {"centered"}
    history = transfer_attention(
        model, batch, steps=6, validate_every=1, learning_rate=3e-2, verbose=0
    )
    losses = history.history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    report = approximation_report(model, batch).summary()
    assert np.isfinite(list(report["relative_error"].values())).all()
    # Summed over the layers, and from before the last step.
    np.testing.assert_allclose(3 * report["kl"]["dark"], losses[-1], rtol=0.5)


SAVE_AND_LOAD = """
    import json, sys
    import keras, numpy as np
    import keras_darkformer

    folder, names = sys.argv[1], json.loads(sys.argv[2])
    results = {}
    for name in names:
        model = keras.saving.load_model(f"{folder}/{name}.keras")
        batch = dict(np.load(f"{folder}/{name}_batch.npz"))
        output = model(batch)
        if isinstance(output, dict):
            output = output["sequence_output"]
        np.save(f"{folder}/{name}_loaded.npy", keras.ops.convert_to_numpy(output))
        results[name] = type(model).__name__
    print(json.dumps(results))
"""


@pytest.mark.slow
def test_a_saved_model_of_any_family_is_the_same_in_a_fresh_process(tmp_path):
    expected = {}
    for name in ROWS:
        model = dark(row(name), **MIXED)
        batch = inputs(LENGTH, 5, 9, model=model)
        model.save(tmp_path / f"{name}.keras")
        np.savez(tmp_path / f"{name}_batch.npz", **batch)
        expected[name] = type(model).__name__, outputs(model, batch)
    classes = json.loads(run_python(SAVE_AND_LOAD, tmp_path, json.dumps(list(ROWS))))
    for name, (class_name, output) in expected.items():
        assert classes[name] == class_name
        assert_close(np.load(tmp_path / f"{name}_loaded.npy"), output, tolerance=1e-5)


def test_presets_load_through_the_stock_backbone_class(family, mixed, tmp_path):
    backbone = getattr(mixed, "backbone", mixed)
    backbone.save_to_preset(tmp_path)
    loaded = getattr(keras_hub.models, f"{family}Backbone").from_preset(str(tmp_path))
    assert type(loaded) is type(backbone) is getattr(hub, f"Dark{family}Backbone")
    batch = inputs(LENGTH, 5, 9, model=backbone)
    np.testing.assert_array_equal(outputs(loaded, batch), outputs(backbone, batch))


def test_stock_presets_load_as_dark_models(family, stock, tmp_path):
    backbone = getattr(stock, "backbone", stock)
    backbone.save_to_preset(tmp_path)
    loaded = getattr(hub, f"Dark{family}Backbone").from_preset(str(tmp_path), num_features=12)
    assert conversion_report(loaded)["num_features"] == 12


@pytest.mark.parametrize("family", KINDS, scope="module")
def test_fit_moves_every_geometry_and_no_projection(family, stock):
    model = dark(stock, copy=True, **MIXED)
    batch = inputs(LENGTH, 5, 9, model=stock)
    before = values(model)
    if family in CAUSAL:
        target, loss = batch["token_ids"], keras.losses.SparseCategoricalCrossentropy(True)
    else:
        target = model(batch)
        target = keras.tree.map_structure(lambda x: 0 * to_numpy(x) + 1, target)
        loss = "mse"
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss, jit_compile=False)
    keras.Model.fit(model, batch, target, batch_size=3, verbose=0)
    after = values(model)
    still = {path for path in after if np.array_equal(before[path], after[path])}
    assert {path for path in after if path.endswith("projection")} <= still
    assert not {path for path in after if path.endswith("geometry")} & still


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_encoder_tasks_are_converted_trained_and_saved_as_presets(name, task, tmp_path):
    task_class = getattr(keras_hub.models, f"{name}{task}")
    options = {"num_classes": 3} if task == "TextClassifier" else {}
    model = task_class(backbone=row(name, num_layers=1), preprocessor=None, **options)
    model = dark(model)
    assert type(model) is getattr(hub, f"Dark{name}{task}")
    batch = inputs(LENGTH, 5, 9, model=model.backbone)
    if task == "MaskedLM":
        batch["mask_positions"] = np.array([[0, 3], [1, 4], [2, 8]], "int32")
        labels = np.ones((3, 2), "int32")
    else:
        labels = np.ones(3, "int32")
    assert outputs(model, batch).shape == (3, *((2, VOCABULARY) if task == "MaskedLM" else (3,)))
    before = values(model)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    keras.Model.fit(model, batch, labels, batch_size=3, verbose=0)
    geometry = next(path for path in before if path.endswith("geometry"))
    assert not np.array_equal(before[geometry], values(model)[geometry])
    calibrate(model, batch, refine=False, verbose=False)
    model.save_to_preset(tmp_path)
    loaded = task_class.from_preset(str(tmp_path), preprocessor=None)
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(outputs(loaded, batch), outputs(model, batch))


def test_a_masked_lm_is_distilled_at_its_masked_positions():
    build = keras_hub.models.BertMaskedLM
    teacher = build(backbone=row("Bert", num_layers=1), preprocessor=None)
    student = convert_to_dark(teacher, num_features=16, copy=True)
    batch = inputs(LENGTH, 5, 9, model=teacher.backbone)
    batch["mask_positions"] = np.array([[0, 3], [1, 4], [2, 8]], "int32")
    history = distil(student, teacher, batch, steps=3, verbose=0)
    assert np.isfinite(history.history["loss"]).all()


def test_a_classifier_is_not_distilled():
    build = keras_hub.models.BertTextClassifier
    teacher = build(backbone=row("Bert", num_layers=1), num_classes=2, preprocessor=None)
    student = convert_to_dark(teacher, num_features=16, copy=True)
    batch = inputs(LENGTH, 5, 9, model=teacher.backbone)
    with pytest.raises(ValueError, match=r"logits of tokens.*shape \(3, 2\)"):
        distil(student, teacher, batch, steps=1, verbose=0)


def test_a_model_whose_every_layer_has_a_window_is_converted_whole_with_a_warning():
    with pytest.warns(UserWarning, match=r"layers \[0, 1, 2\]: sliding window of 4 tokens"):
        model = convert_to_dark(row("Mistral"), num_features=16)
    assert conversion_report(model)["converted"] == [0, 1, 2]


def test_a_window_of_ours_beside_one_of_the_family(tmp_path):
    model = convert_to_dark(row("Mistral"), num_features=16, sliding_window=3)
    config = model.backbone.get_config()
    assert (config["sliding_window"], config["dark_sliding_window"]) == (WINDOW, 3)
    model.backbone.save_to_preset(tmp_path)
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path))
    assert [x.sliding_window for x in feature_maps(loaded)] == [3, 3, 3]
    batch = inputs(LENGTH, 5, 9)
    np.testing.assert_array_equal(outputs(loaded, batch), outputs(model.backbone, batch))


@pytest.mark.parametrize("family", KINDS, scope="module")
def test_lora_leaves_geometries_trainable(family):
    def trainable(model):
        backbone = getattr(model, "backbone", model)
        backbone.enable_lora(2)
        return {weight.path.rsplit("/", 1)[1] for weight in model.trainable_weights}

    expected = trainable(row(family, num_layers=1)) | {"geometry"}
    assert trainable(convert_to_dark(row(family, num_layers=1), num_features=16)) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Bert", {"sliding_window": 4}, "`sliding_window` needs causal attention; Bert's"),
        ("GPT2", {"rope_geometry": "planes"}, "needs rotary positions, which GPT2 does not have"),
        ("Llama", {"layers": []}, "`layers` is empty"),
    ],
)
def test_what_a_family_can_not_do_is_refused(name, options, message):
    model = row(name, num_layers=1)
    stock_class = type(model)
    with pytest.raises(ValueError, match=message):
        convert_to_dark(model, **options)
    assert type(model) is stock_class
    assert not feature_maps(model)


def test_attention_scores_and_masks_of_pairs_are_refused():
    (attention,) = attentions(convert_to_dark(row("Bert", num_layers=1), num_features=16))
    x = np.ones((2, 5, 32), "float32")
    with pytest.raises(ValueError, match="forms no scores"):
        attention(x, x, return_attention_scores=True)
    with pytest.raises(ValueError, match="padding mask, not one of pairs"):
        attention(x, x, attention_mask=np.ones((2, 5, 5), "bool"))


def test_position_offsets_are_refused_without_rotary_positions():
    model = convert_to_dark(row("GPT2", num_layers=1), num_features=16)
    with pytest.raises(ValueError, match="`position_offset` shifts rotary positions"):
        calibrate(model, inputs(LENGTH, 5, 9), position_offset=10, verbose=False)


@pytest.mark.parametrize(("name", "geometry"), [("Llama", "planes"), ("Qwen3", "before")])
def test_exact_mode_has_a_geometry_before_the_rotation_too(name, geometry):
    """A scalar is the same before and after a rotation, other geometries are not."""
    options = {"attention_mode": "exact", "num_features": 16, "layers": "all", "copy": True}
    source = row(name, num_layers=1)
    batch = inputs(LENGTH, 5, 9)
    before = convert_to_dark(source, rope_geometry=geometry, geometry_scale=0.5, **options)
    after = convert_to_dark(source, geometry_scale=0.5, **options)
    assert_close(outputs(before, batch), outputs(after, batch))
    for feature_map in feature_maps(before):
        scale = np.linspace(0.5, 1.5, feature_map.geometry.shape[-1])
        feature_map.geometry.assign(to_numpy(feature_map.geometry.value) * scale)
    assert np.abs(outputs(before, batch) - outputs(after, batch)).max() > 1e-3


def test_keras_nlp_is_another_name_for_it():
    keras_nlp = pytest.importorskip("keras_nlp")
    backbone = keras_nlp.models.LlamaBackbone(num_layers=1, **ROWS["Llama"])
    model = convert_to_dark(keras_nlp.models.LlamaCausalLM(backbone), num_features=16)
    assert type(model) is hub.DarkLlamaCausalLM
