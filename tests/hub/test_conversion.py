"""What `convert_to_dark` leaves as it was, and what it adds."""

import warnings

import keras
import numpy as np
import pytest
from keras_hub.samplers import TopKSampler

from keras_darkformer import conversion_report, convert_to_dark

from .models import (
    DARK_WEIGHTS,
    FAMILIES,
    LENGTH,
    WINDOW,
    gemma,
    gemma2,
    gemma3,
    inputs,
    outputs,
    values,
)

EXACT = {"attention_mode": "exact", "geometry_scale": 1.0}
FULL, RAGGED = inputs(LENGTH, LENGTH, LENGTH), inputs(LENGTH, 5, 9)


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request):
    return FAMILIES[request.param]()


def assert_equal_to_rounding(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def differ(first, second):
    return np.abs(first - second).max() > 0.01 * np.abs(second).max()


@pytest.mark.parametrize("layers", ["all", "global"])
@pytest.mark.parametrize("batch", [FULL, RAGGED], ids=["full", "ragged"])
def test_exact_mode_at_scale_one_gives_the_logits_of_the_source(stock, layers, batch):
    assert LENGTH > WINDOW
    converted = convert_to_dark(stock, **EXACT, layers=layers, copy=True)
    assert_equal_to_rounding(outputs(converted, batch), outputs(stock, batch))


def test_exact_mode_applies_the_geometry(stock):
    flatter = convert_to_dark(stock, attention_mode="exact", geometry_scale=0.5, copy=True)
    assert differ(outputs(flatter, FULL), outputs(stock, FULL))


def test_exact_mode_on_a_backbone_gives_its_hidden_states(stock):
    converted = convert_to_dark(stock.backbone, **EXACT, layers="all", copy=True)
    assert_equal_to_rounding(outputs(converted, RAGGED), outputs(stock.backbone, RAGGED))


def test_a_soft_cap_is_dropped_with_a_warning_that_names_it():
    source = gemma2(soft_cap=2.0)
    with pytest.warns(UserWarning, match="soft cap of the attention logits at 2.0"):
        converted = convert_to_dark(source, **EXACT, layers="all", copy=True)
    (drop,) = conversion_report(converted)["dropped"]
    assert "soft cap" in drop["what"]
    assert drop["layers"] == [0, 1]
    assert differ(outputs(converted, FULL), outputs(source, FULL))
    assert_equal_to_rounding(outputs(converted, FULL), outputs(gemma2(soft_cap=None), FULL))


def test_layers_left_keep_their_soft_cap():
    source = gemma2(soft_cap=2.0)
    with pytest.warns(UserWarning, match=r"from layers \[1\]: soft cap"):
        converted = convert_to_dark(source, **EXACT, copy=True)
    first, second = (block.attention for block in converted.backbone.transformer_layers)
    assert (first.logit_soft_cap, second.logit_soft_cap) == (2.0, None)


def test_linear_layers_drop_their_sliding_window_with_a_warning():
    with pytest.warns(UserWarning, match=r"from layers \[0\]: sliding window of 4 tokens"):
        convert_to_dark(gemma2(), layers="all")


def test_linear_layers_drop_attention_dropout_with_a_warning():
    with pytest.warns(UserWarning, match=r"from layers \[0, 1\]: dropout of single attention"):
        convert_to_dark(gemma(dropout=0.1))


def test_nothing_dropped_nothing_warned(stock):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert_to_dark(stock, copy=True)
        convert_to_dark(stock, **EXACT, layers="all", copy=True)


@pytest.mark.filterwarnings("ignore:Converting")
@pytest.mark.parametrize("layers", ["global", "all"])
def test_stock_weights_stay_under_their_paths_and_only_feature_maps_are_new(stock, layers):
    converted = convert_to_dark(stock, layers=layers, copy=True)
    before, after = values(stock), values(converted)
    new = {
        f"decoder_block_{index}/attention/feature_map/{name}"
        for index in conversion_report(converted)["converted"]
        for name in DARK_WEIGHTS
    }
    assert after.keys() == before.keys() | new
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


@pytest.mark.parametrize(
    "dtype", ["mixed_bfloat16", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def test_geometry_and_projection_are_float32_in_a_model_of_any_dtype(dtype):
    source = gemma(dtype=dtype)
    dtypes = {weight.path: weight.dtype for weight in source.weights}
    for weight in convert_to_dark(source).weights:
        assert weight.dtype == dtypes.get(weight.path, "float32")


@pytest.mark.filterwarnings("ignore:Converting")
@pytest.mark.parametrize(
    ("build", "num_layers", "layers", "expected"),
    [
        (gemma, 3, "global", [0, 1, 2]),
        (gemma2, 4, "global", [1, 3]),
        (gemma3, 12, "global", [5, 11]),
        (gemma2, 3, "all", [0, 1, 2]),
        (gemma3, 7, "all", [0, 1, 2, 3, 4, 5, 6]),
        (gemma2, 4, [2, 0], [0, 2]),
        (gemma2, 4, (-1,), [3]),
        (gemma2, 4, [3, -1, 0], [0, 3]),
        (gemma, 4, range(1, 3), [1, 2]),
    ],
)
def test_layers_are_chosen_by_name_or_index(build, num_layers, layers, expected):
    converted = convert_to_dark(build(num_layers=num_layers).backbone, layers=layers)
    report = conversion_report(converted)
    assert report["converted"] == expected
    assert report["left"] == [i for i in range(num_layers) if i not in expected]
    assert [
        i for i, block in enumerate(converted.transformer_layers) if _is_dark(block)
    ] == expected


def test_layers_differ_in_their_projections_and_seeds_decide_on_them(stock):
    def projections(seed):
        options = {"layers": "all", "attention_mode": "exact"}  # exact: no warning
        converted = convert_to_dark(stock, **options, seed=seed, copy=True)
        return [v for path, v in values(converted).items() if path.endswith("/projection")]

    first, second = projections(seed=0), projections(seed=0)
    np.testing.assert_array_equal(first, second)
    different = [*first, *projections(seed=1)]
    assert len({p.tobytes() for p in different}) == len(different)


def test_the_geometry_starts_at_its_scale_times_the_identity():
    converted = convert_to_dark(gemma(num_layers=1), geometry_scale=0.25)
    (geometry,) = (v for path, v in values(converted).items() if path.endswith("/geometry"))
    np.testing.assert_array_equal(geometry, [0.25 * np.eye(8)] * 2)


def test_a_copy_leaves_the_source_as_it_was(stock):
    before, weights = outputs(stock, RAGGED), values(stock)
    copy = convert_to_dark(stock, copy=True)
    assert copy is not stock
    assert type(stock).__module__.startswith("keras_hub")
    assert type(stock.backbone).__module__.startswith("keras_hub")
    assert not {id(v) for v in copy.variables} & {id(v) for v in stock.variables}
    assert values(stock).keys() == weights.keys()
    np.testing.assert_array_equal(outputs(stock, RAGGED), before)


def test_a_copy_keeps_name_and_preprocessor():
    source = gemma(preprocessor=keras.layers.Identity())
    copy = convert_to_dark(source, copy=True)
    assert copy.name == source.name
    assert copy.preprocessor is source.preprocessor


def test_a_copy_is_compiled_as_its_source():
    source, sampler = gemma(), TopKSampler(k=3)
    optimizer = keras.optimizers.SGD(0.123, momentum=0.9)
    source.compile(optimizer=optimizer, sampler=sampler, run_eagerly=True)
    copy = convert_to_dark(source, copy=True)
    assert type(copy.sampler) is TopKSampler
    assert copy.run_eagerly
    assert copy.optimizer is not optimizer
    assert copy.optimizer.get_config() == optimizer.get_config()


def _is_dark(block):
    return hasattr(block.attention, "feature_map")
