"""`approximation_report`: figures as float64 has them, a dict, a table and a plot."""

import json

import keras
import numpy as np
import pytest
from backends import BACKEND, to_numpy
from hub.models import LENGTH, feature_maps, gemma, inputs
from keras import ops

from keras_darkformer import DarkTransformerBlock, approximation_report, calibrate
from keras_darkformer.layers.heads import Heads
from keras_darkformer.memory import Memory
from keras_darkformer.ops import draw_projection

from .models import dark_gemma, plain, tokens
from .reference import (
    attended,
    behind,
    divergence,
    feature_scores,
    softmax,
    softmax_scores,
    visible_pairs,
)
from .stock import stock_heads

BATCH = inputs(14, 9, 5)


class Performer:
    """As much of a feature map as `feature_scores` reads."""

    memory = Memory()

    def __init__(self, num_heads, head_dim, num_features, seed):
        self.num_features = num_features
        projection = draw_projection(num_features, head_dim, seed=seed)
        self.arrays = {
            "geometry": np.stack([np.eye(head_dim)] * num_heads),
            "projection": np.stack([projection] * num_heads),
        }

    @property
    def weights(self):
        return [Array(name, value) for name, value in self.arrays.items()]


class Array:
    def __init__(self, name, value):
        self.name, self.value = name, ops.convert_to_tensor(value)


def expected_figures(feature_map, heads, seed=0):
    """Per head: relative errors, divergences, far masses and spectrum."""
    query, key, value, mask = heads
    visible = visible_pairs(mask, LENGTH)
    exact = softmax(softmax_scores(query, key), visible)
    performer = Performer(2, 8, feature_map.num_features, seed)
    arms = {
        "dark": feature_scores(feature_map, query, key),
        "performer": feature_scores(performer, query, key),
        "uniform": np.zeros_like(exact),
    }
    target = attended(exact, value.astype("float64"))
    size = np.linalg.norm(target, axis=-1)
    for head in range(4):
        figures = {"relative_error": {}, "kl": {}}
        for arm, scores in arms.items():
            own = softmax(scores, visible)
            error = np.linalg.norm(attended(own, value) - target, axis=-1) / size
            figures["relative_error"][arm] = np.median(error[:, head][mask])
            figures["kl"][arm] = divergence(exact, own)[:, head][mask].mean()
        if feature_map.memory:
            ours, far = softmax(arms["dark"], visible), behind(feature_map.memory.window, LENGTH)
            parts = {"sinks": far & ~far, "kept": far & ~far, "window": ~far, "far": far}
            for name, of in (("mass", ours), ("exact_mass", exact)):
                figures[name] = {
                    part: (of * where).sum(-1)[:, head][mask].mean()
                    for part, where in parts.items()
                }
            exact_far, our_far = (softmax(np.log(x + 1e-300), visible & far) for x in (exact, ours))
            share = (exact * far).sum(-1)
            figures["far_kl"] = (share * divergence(exact_far, our_far))[:, head][mask].mean()
        group = slice(head // 2 * 2, head // 2 * 2 + 2)
        both = (query[:, :, group][mask].reshape(-1, 8), key[:, :, head // 2][mask])
        total = sum(np.cov(x.T.astype("float64"), bias=True) for x in both) / np.sqrt(8)
        figures["spectrum"] = np.linalg.eigvalsh(total)[::-1]
        yield figures


@pytest.fixture(scope="module", params=[{}, {"sliding_window": 4}], ids=["far", "window"])
def reported(request):
    stock, model = dark_gemma(geometry_scale=0.5, **request.param)
    for feature_map in feature_maps(model):
        if request.param:
            feature_map.far_offset.assign(np.array([0.5, -0.5, 1.0, 0.0]))
    return stock, model, approximation_report(model, BATCH, seed=4)


def assert_near(figures, wanted):
    if not isinstance(wanted, dict):
        figures, wanted = {"": figures}, {"": wanted}
    assert figures.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(figures[name], value, rtol=2e-3, atol=1e-4)


def test_its_figures_are_those_of_float64(reported):
    stock, model, report = reported
    layers = zip(report["layers"], feature_maps(model), stock_heads(stock, BATCH), strict=True)
    for layer, feature_map, heads in layers:
        expected = expected_figures(feature_map, heads, seed=4)
        for figures, wanted in zip(layer["heads"], expected, strict=True):
            for key in ("relative_error", "kl"):
                for arm, value in wanted[key].items():
                    np.testing.assert_allclose(figures[key][arm], value, rtol=5e-3, atol=1e-4)
            for key in ("mass", "exact_mass", "far_kl"):
                if not feature_map.memory:
                    assert figures[key] is None
                else:
                    assert_near(figures[key], wanted[key])
            np.testing.assert_allclose(
                figures["spectrum"], wanted["spectrum"], rtol=1e-3, atol=1e-4
            )
            spectrum = wanted["spectrum"]
            dims = spectrum.sum() ** 2 / (spectrum**2).sum()
            assert figures["effective_dims"] == pytest.approx(dims, rel=1e-3)


def test_it_survives_json_and_counts_real_tokens(reported):
    report = reported[2]
    assert json.loads(json.dumps(report)) == report
    assert report["tokens"] == 14 + 9 + 5
    assert [layer["name"] for layer in report["layers"]] == ["layer_0", "layer_1"]
    assert [len(layer["heads"]) for layer in report["layers"]] == [4, 4]


def test_its_summary_is_the_mean_over_heads_and_layers(reported):
    report = reported[2]
    heads = [head for layer in report["layers"] for head in layer["heads"]]
    means = report.summary()
    for key in ("relative_error", "kl"):
        for arm, value in means[key].items():
            assert value == pytest.approx(np.mean([head[key][arm] for head in heads]))
    if heads[0]["mass"] is None:
        assert means["mass"] is means["far_kl"] is None
    else:
        far = np.mean([head["mass"]["far"] for head in heads])
        assert means["mass"]["far"] == pytest.approx(far)


def test_it_prints_a_table(reported):
    report, text = reported[2], str(reported[2])
    rows = [line for line in text.splitlines() if "layer_" in line]
    assert len(rows) == 8
    assert f"{report['layers'][1]['heads'][2]['kl']['dark']:.2f}" in rows[6]
    assert "mean" in text
    assert ("sinks" in text) is (report["layers"][0]["sliding_window"] is not None)


def test_it_draws_a_picture(reported, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.png"
    figure = reported[2].plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [axis.get_xlabel() for axis in figure.axes] == ["layer", "layer", "direction"]


def test_a_window_over_everything_is_exact():
    _, model = dark_gemma(sliding_window=LENGTH)
    means = approximation_report(model, BATCH).summary()
    assert means["relative_error"]["dark"] < 1e-5
    assert abs(means["kl"]["dark"]) < 1e-5
    assert means["mass"]["far"] == means["exact_mass"]["far"] == 0
    assert means["exact_mass"]["window"] == pytest.approx(1)
    assert means["relative_error"]["uniform"] > 0.1


def test_each_part_of_a_memory_has_its_share():
    memory = {"sliding_window": 3, "num_sinks": 1, "cache_size": 2}
    _, model = dark_gemma(**memory, feature_map=["dark", "none"])
    report = approximation_report(model, BATCH)
    with_features, without = (layer["heads"] for layer in report["layers"])
    for head in (*with_features, *without):
        assert sum(head["mass"].values()) == pytest.approx(1)
        assert sum(head["exact_mass"].values()) == pytest.approx(1)
        assert min(head["exact_mass"].values()) > 0.01
    for head in without:
        assert head["mass"]["far"] == 0
        assert head["relative_error"]["performer"] is head["far_kl"] is None
        assert head["kl"]["dark"] == np.inf
    # Without a cache what is kept is far.
    fewer = dark_gemma(**memory | {"cache_size": 0}, feature_map=["dark", "none"])[1]
    for head, other in zip(
        with_features, approximation_report(fewer, BATCH)["layers"][0]["heads"], strict=True
    ):
        parts, others = head["exact_mass"], other["exact_mass"]
        assert others["kept"] == 0
        assert others["far"] == pytest.approx(parts["far"] + parts["kept"])
        assert others["sinks"] == pytest.approx(parts["sinks"])
    of_none = [x for x in str(report).splitlines() if "layer_1" in x]
    assert all(x.split("│")[6].strip() == x.split("│")[-2].strip() == "-" for x in of_none)
    report.plot()
    # A far part that is left out has nothing to be judged by.
    for layer in feature_maps(model)[:1]:
        layer.far_offset.assign(np.full(4, -1e30))
    head = approximation_report(model, BATCH)["layers"][0]["heads"][0]
    assert head["far_kl"] is None
    assert head["mass"]["far"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bool", "int32"])
def test_a_plain_model_with_padding_is_reported_on_its_real_tokens(dtype):
    """Masks may be of any dtype, and nothing behind them counts."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    mask = keras.Input((None,), dtype=dtype, name="mask")
    x = keras.layers.Embedding(64, 16)(ids)
    x = DarkTransformerBlock(16, 2, num_features=8, seed=0)(x, padding_mask=mask)
    model = keras.Model({"ids": ids, "mask": mask}, x)
    keep = np.arange(LENGTH) < np.array([[6], [9]])
    token_ids = tokens(rows=2)
    reports = []
    for filler in (0, 5):
        data = {"ids": np.where(keep, token_ids, filler), "mask": keep.astype(dtype)}
        calibrate(model, data, method="scale", verbose=False)
        reports.append(approximation_report(model, data))
    assert reports[0]["tokens"] == 15
    first, second = (report.summary() for report in reports)
    assert first["kl"]["dark"] == pytest.approx(second["kl"]["dark"], rel=1e-3)


def test_only_so_many_batches_are_looked_at():
    model = plain()
    report = approximation_report(model, (tokens() for _ in range(9)), max_batches=2)
    assert report["tokens"] == 2 * 3 * LENGTH
    names = [layer["name"] for layer in report["layers"]]
    assert len(set(names)) == 2
    with pytest.raises(ValueError, match="max_batches"):
        approximation_report(model, tokens(), max_batches=0)


def test_offsets_move_what_features_see_but_not_softmax():
    _, model = dark_gemma(lambda: gemma(num_layers=1), geometry_scale=0.5)
    near = approximation_report(model, BATCH).summary()
    far = approximation_report(model, BATCH, position_offset=(500, 500)).summary()
    assert near["kl"]["uniform"] == pytest.approx(far["kl"]["uniform"], rel=1e-2)
    assert near["kl"]["dark"] != pytest.approx(far["kl"]["dark"], rel=1e-2)
    assert to_numpy(feature_maps(model)[0].geometry.value).shape == (2, 8, 8)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch alone notes down what is not asked for")
@pytest.mark.parametrize("routine", [calibrate, approximation_report])
def test_looking_leaves_nothing_for_gradients(routine, monkeypatch):
    import torch

    _, model = dark_gemma(lambda: gemma(num_layers=1))
    noted = []
    exact = Heads.exact_output

    def watched(heads):
        noted.append(torch.is_grad_enabled() or heads.query.requires_grad)
        return exact(heads)

    monkeypatch.setattr(Heads, "exact_output", watched)
    routine(model, [inputs(14, 9)])
    assert noted
    assert not any(noted)
