"""Every family KerasHub has, asked the same, and what is peculiar to some.

What all are asked is in family_checks.py, which benchmarks/compatibility.py goes
through too, on three backends and for more than what is tried here.
"""

import keras
import keras_hub
import numpy as np
import pytest
from backends import BACKEND, DEFAULT_JIT, to_numpy

from keras_darkformer import (
    calibrate,
    conversion_report,
    convert_to_dark,
    distil,
    hub,
)
from keras_darkformer.hub.families import FAMILIES

from . import family_checks
from .family_checks import BY_NAME, CHECKS, GENERATES, Case, close
from .models import (
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

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

# Families differ in how they are wired, which is the same on all backends: all of them are asked
# where nothing has to be compiled, and elsewhere one of each kind. Gemma has all the other files.
KINDS = ("Llama", "GPT2", "Bert")
ASKED = tuple(x.name for x in FAMILIES) if BACKEND == "torch" else KINDS
# What is asked of all of them; the others differ little between families.
OF_ALL = (
    "exact mode = source",
    "kernel = reference",
    "paths and report",
    "mixed layers",
    "preset",
    "stock preset",
)
# What is asked of one of each kind, of more kinds where nothing has to be compiled.
OF_KINDS = ("recurrent = parallel", "fit", "LoRA", "memory")
OF_SMOLLM3 = ("recurrent = parallel", "fit", "memory")  # LoRA doesn't find its projections
MORE_KINDS = ("Llama", "Mixtral", "Qwen3", "Phi3", "GPT2", "Bert") if BACKEND == "torch" else KINDS
QUESTIONS = [
    (family, check)
    for family in ASKED
    for check in (*OF_ALL, *(OF_KINDS if family in MORE_KINDS else ()))
    if BY_NAME[family].causal or check not in GENERATES
    # Cached queries of the stock model are all at position 0: layers left exact are wrong there.
    if (family, check) != ("GPTNeoX", "mixed layers")
]
FEW_STEPS = ("LoRA", "memory", "calibrate, transfer, report")  # "fit" is run as users run it
if BACKEND == "torch":
    QUESTIONS += [("SmolLM3", check) for check in OF_SMOLLM3]
    QUESTIONS += [("GPTNeoX", check) for check in ("greedy", "memory")]
    QUESTIONS += [("ESM", check) for check in ("fit", "calibrate, transfer, report")]
    QUESTIONS.insert(0, ("QwenMoe", "fit"))  # its experts ask for a mask while they are trained
TASKS = [(name, task) for name in ENCODERS for task in ("MaskedLM", "TextClassifier")]
if BACKEND != "torch":
    TASKS = TASKS[:2]


@pytest.fixture(scope="module")
def case(request):
    return Case(BY_NAME[request.param])


@pytest.mark.parametrize(("case", "check"), QUESTIONS, indirect=["case"], ids=str)
def test_a_family_does(case, check, request):
    if check in FEW_STEPS:
        request.getfixturevalue("few_steps")
    if check == "memory" and not case.family.causal:  # whose attention has no window
        with pytest.raises(ValueError, match="need causal attention"):
            CHECKS[check](case)
        CHECKS["calibrate, transfer, report"](case)
    else:
        CHECKS[check](case)


def test_what_comes_of_a_check_is_told_apart(monkeypatch):
    """For the table of what works with which family."""

    def refuse(case):
        calibrate(case.dark, [], verbose=False)

    def fail_if_dark(case):
        if case.is_dark:
            raise RuntimeError("it is dark")

    def fail(case):
        raise RuntimeError("by\nitself")

    checks = {"refuse": refuse, "fail if dark": fail_if_dark, "fail": fail, "beam": fail}
    checks["pass"] = lambda case: None
    monkeypatch.setattr(family_checks, "CHECKS", checks)
    case = Case(BY_NAME["Llama"])
    found = {name: family_checks.outcome(case, name) for name in checks}
    assert found == {
        "refuse": ("refused", "ValueError: `data` has no batches."),
        "fail if dark": ("failed", "RuntimeError: it is dark"),
        "fail": ("stock fails", "RuntimeError: by itself"),
        "beam": ("stock fails", "RuntimeError: by itself"),
        "pass": ("passed", ""),
    }
    assert family_checks.outcome(Case(BY_NAME["Bert"]), "beam") == ("-", "an encoder")
    monkeypatch.setattr(family_checks, "OURS", {"fail"})
    assert family_checks.outcome(case, "fail") == ("failed", "RuntimeError: by itself")


@pytest.mark.usefixtures("few_steps")
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
        jit_compile=DEFAULT_JIT,
    )
    keras.Model.fit(model, batch, labels, batch_size=3, verbose=0)
    geometry = next(path for path in before if path.endswith("geometry"))
    assert not np.array_equal(before[geometry], values(model)[geometry])
    calibrate(model, batch, refine=False, verbose=False)
    model.save_to_preset(tmp_path)
    loaded = task_class.from_preset(str(tmp_path), preprocessor=None)
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(outputs(loaded, batch), outputs(model, batch))


@pytest.mark.usefixtures("few_steps")
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
    with pytest.raises(ValueError, match=r"logits of tokens.*shape \((3|None), 2\)"):
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
    assert [x.memory.window for x in feature_maps(loaded)] == [3, 3, 3]
    batch = inputs(LENGTH, 5, 9)
    np.testing.assert_array_equal(outputs(loaded, batch), outputs(model.backbone, batch))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Bert", {"sliding_window": 4}, "need causal attention, but Bert"),
        ("GPT2", {"rope_geometry": "before"}, "positions in every layer, which GPT2 does not"),
        ("GPTNeoX", {"rope_geometry": "before"}, "in every layer, which GPTNeoX does not have"),
        ("SmolLM3", {"rope_geometry": "before"}, "in every layer, which SmolLM3 does not have"),
        ("Llama", {"layers": []}, "`layers` is empty"),
        ("Electra", {"sliding_window": 4}, "need causal attention, but Electra"),
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
    with pytest.raises(ValueError, match="padding mask in linear mode, not a mask"):
        attention(x, x, attention_mask=np.ones((2, 5, 5), "bool"))
    with pytest.raises(ValueError, match="would change what this layer computes"):
        attention(x, x, use_causal_mask=True)


def test_masks_that_keras_hands_on_are_padding_masks(rng):
    (attention,) = attentions(convert_to_dark(row("Bert", num_layers=1), num_features=16))
    x, mask = rng.standard_normal((2, 5, 32)).astype("float32"), real(5, 3, total=5)
    expected = to_numpy(attention(x, x, attention_mask=mask))
    for masks in ({"value_mask": mask}, {"key_mask": mask}, {"value_mask": mask, "key_mask": mask}):
        np.testing.assert_allclose(to_numpy(attention(x, x, **masks)), expected, rtol=1e-6)
    others = {"attention_mask": real(5, 4, total=5), "value_mask": mask}
    np.testing.assert_allclose(to_numpy(attention(x, x, **others)), expected, rtol=1e-6)
    assert np.abs(to_numpy(attention(x, x)) - expected).max() > 1e-3


def test_position_offsets_are_refused_without_rotary_positions():
    model = convert_to_dark(row("GPT2", num_layers=1), num_features=16)
    with pytest.raises(ValueError, match="`position_offset` shifts rotary positions"):
        calibrate(model, inputs(LENGTH, 5, 9), position_offset=10, verbose=False)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_exact_mode_has_a_geometry_before_the_rotation_too(name):
    """A scalar is the same before and after a rotation, other geometries are not."""
    options = {"attention_mode": "exact", "num_features": 16, "layers": "all", "copy": True}
    source = row(name, num_layers=1)
    batch = inputs(LENGTH, 5, 9)
    before = convert_to_dark(source, rope_geometry="before", geometry_scale=0.5, **options)
    after = convert_to_dark(source, geometry_scale=0.5, **options)
    close(outputs(before, batch), outputs(after, batch))
    for feature_map in feature_maps(before):
        scale = np.linspace(0.5, 1.5, feature_map.geometry.shape[-1])
        feature_map.geometry.assign(to_numpy(feature_map.geometry.value) * scale)
    assert np.abs(outputs(before, batch) - outputs(after, batch)).max() > 1e-3


@pytest.mark.parametrize("mode", ["linear", "exact"])
def test_layers_of_smollm3_without_positions_stay_without(mode, rng):
    """What a layer says of the last token hangs on the order of those before by positions only."""
    model = dark(row("SmolLM3", num_layers=2), attention_mode=mode)
    x = rng.standard_normal((1, LENGTH, model.backbone.hidden_dim)).astype("float32")
    shuffled = x[:, [*rng.permutation(LENGTH - 1), LENGTH - 1]]
    mask = None if mode == "linear" else np.tri(LENGTH, dtype="bool")[None]
    for attention, has_positions in zip(attentions(model), (True, False), strict=True):
        last, other = (to_numpy(attention(y, attention_mask=mask))[:, -1] for y in (x, shuffled))
        assert attention.is_rotary == has_positions
        assert (np.abs(last - other).max() > 1e-2 * np.abs(last).max()) == has_positions


def test_positions_of_smollm3_are_shifted_where_it_has_them():
    model = convert_to_dark(row("SmolLM3", num_layers=2), num_features=16)
    calibrate(model, inputs(LENGTH, 5, 9), position_offset=10, refine=False, verbose=False)
    model = convert_to_dark(row("SmolLM3", num_layers=2), num_features=16, layers=[1])
    with pytest.raises(ValueError, match="`position_offset` shifts rotary positions"):
        calibrate(model, inputs(LENGTH, 5, 9), position_offset=10, verbose=False)


def test_lora_of_smollm3_is_told_its_projections():
    backbone = dark(row("SmolLM3", num_layers=1, attention_bias=False).backbone)
    backbone.enable_lora(2, ["q_proj", "v_proj"])
    names = {weight.path.rsplit("/", 1)[1] for weight in backbone.trainable_weights}
    assert names == {"geometry", "lora_kernel_a", "lora_kernel_b"}


def test_keras_nlp_is_another_name_for_it():
    keras_nlp = pytest.importorskip("keras_nlp")
    backbone = keras_nlp.models.LlamaBackbone(num_layers=1, **ROWS["Llama"])
    model = convert_to_dark(keras_nlp.models.LlamaCausalLM(backbone), num_features=16)
    assert type(model) is hub.DarkLlamaCausalLM
