"""`conversion_report`: a dict for code, a table for people."""

import json
import re

import pytest

from keras_darkformer import conversion_report, convert_to_dark

from .models import WINDOW, gemma2, gemma3

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

KEYS = {
    "model",
    "num_features",
    "attention_mode",
    "projection",
    "geometry_scale",
    "sliding_window",
    "num_sinks",
    "cache_size",
    "layers",
    "converted",
    "left",
    "dropped",
    "new_parameters",
    "parameters",
}
# Two key/value heads, heads of 8.
GEOMETRY, PROJECTION = 2 * 8 * 8, 2 * 16 * 8
# What calibration sets beside them: proposal and two shifts, and a weight for each feature.
CALIBRATED = 2 * 3 * 8 + 2 * 16


@pytest.fixture(scope="module", params=["model", "backbone"])
def part(request):
    model = gemma2(soft_cap=5.0, num_layers=4)
    return model if request.param == "model" else model.backbone


@pytest.fixture(scope="module")
def counted(part):
    before = part.count_params()
    return before, convert_to_dark(part, num_features=16, layers=[1, 2])


@pytest.fixture(scope="module")
def report(counted):
    return conversion_report(counted[1])


def test_it_has_its_keys_and_survives_json(report):
    assert report.keys() == KEYS
    assert json.loads(json.dumps(report)) == report


def test_it_says_what_was_converted(report, part):
    assert report["model"] == type(part).__name__
    assert (report["attention_mode"], report["projection"]) == ("linear", "orthogonal")
    assert (report["converted"], report["left"]) == ([1, 2], [0, 3])
    assert [layer["converted"] for layer in report["layers"]] == [False, True, True, False]
    assert [layer["kind"] for layer in report["layers"]] == ["local", "global"] * 2
    assert [layer["num_features"] for layer in report["layers"]] == [None, 16, 16, None]


def test_it_says_what_was_dropped_and_why(report):
    cap, window = report["dropped"]
    assert "soft cap" in cap["what"]
    assert cap["layers"] == [1, 2]
    assert "sliding window of 4 tokens" in window["what"]
    assert window["layers"] == [2]
    assert cap["why"]
    assert window["why"]


def test_its_counts_add_up(report, counted):
    before, converted = counted
    new = report["new_parameters"]
    assert new == {"trainable": 2 * GEOMETRY, "non_trainable": 2 * (PROJECTION + CALIBRATED)}
    assert sum(layer["new_parameters"] for layer in report["layers"]) == sum(new.values())
    assert report["parameters"] == before + sum(new.values()) == converted.count_params()


def test_trained_projections_count_as_trainable():
    options = {"num_features": 16, "train_geometry": False, "train_projection": True}
    new = conversion_report(convert_to_dark(gemma3(), **options))["new_parameters"]
    assert new == {"trainable": PROJECTION, "non_trainable": GEOMETRY + CALIBRATED}


def test_it_prints_as_a_table(report):
    text = str(report)
    for part in ("2 of 4 layers", "dark (linear)", "left as it was", "soft cap", "sliding window"):
        assert part in " ".join(text.split())
    rows = [line for line in text.splitlines() if " dark (linear) " in line]
    assert len(rows) == 2
    assert f"{GEOMETRY + PROJECTION + CALIBRATED:,}" in rows[0]


def test_it_says_what_is_kept_exactly():
    options = {"sliding_window": 4, "num_sinks": 2, "layers": [0, 1]}
    report = conversion_report(convert_to_dark(gemma2(), feature_map=["none", "dark"], **options))
    assert (report["sliding_window"], report["num_sinks"], report["cache_size"]) == (4, 2, 0)
    assert [layer["num_features"] for layer in report["layers"]] == [0, 256]
    assert report["layers"][0]["new_parameters"] == 0
    assert "kept exactly: sliding_window=4, num_sinks=2" in str(report)
    assert "geometry starts at" in str(report)
    without = conversion_report(convert_to_dark(gemma2(), feature_map="none", **options))
    assert "geometry" not in str(without)
    assert "kept exactly" not in str(conversion_report(convert_to_dark(gemma2())))


def test_a_local_window_that_is_kept_as_it_was_is_not_dropped():
    """The local layers of the model have a window of `WINDOW` tokens."""
    local = {"layers": [0], "sliding_window": WINDOW}
    for options, expected in (
        ({"feature_map": "none"}, []),
        (
            {"feature_map": "none", "num_sinks": 1},
            ["These layers now see a memory of their own"],
        ),
        ({}, ["Features sum over all the past"]),
    ):
        dropped = conversion_report(convert_to_dark(gemma2(), **local, **options))["dropped"]
        assert [re.split("[:;]", drop["why"])[0] for drop in dropped] == expected
