"""`calibrate` fits every layer to the queries and keys that the stock model has there."""

import json
import sys

import keras
import numpy as np
import pytest
from backends import further, on_one_backend, to_numpy
from hub.models import (
    FAMILIES,
    LENGTH,
    attentions,
    feature_maps,
    gemma,
    gemma3,
    inputs,
    outputs,
    values,
)
from hub.searches import greedy_search
from keras import ops
from threadpoolctl import threadpool_info, threadpool_limits

from keras_darkformer import (
    DarkFeatureMap,
    approximation_report,
    calibrate,
    convert_to_dark,
    transfer_attention,
)

from .models import dark_gemma, feature_weights, plain, tokens
from .reference import behind, feature_scores, softmax, softmax_scores, visible_pairs
from .stock import concatenated, positions, stock_heads

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

BATCHES = [inputs(14, 9, 5), inputs(7, 14, 12)]
HELD_OUT = {"token_ids": tokens(seed=9), "padding_mask": np.ones((3, LENGTH), "int32")}


def quietly(model, data, **options):
    return calibrate(model, data, verbose=False, **options)


def refitted(feature_map, heads, number, seed=0, **options):
    """A map of the same config, fitted to arrays by its own `calibrate`."""
    fresh = type(feature_map).from_config(feature_map.get_config() | {"sliding_window": None})
    of_layer = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    masks = {"query_mask": heads.mask, "key_mask": heads.mask}
    fresh.calibrate(
        heads.query, heads.key, causal=True, max_tokens=4096, seed=of_layer, **masks, **options
    )
    return fresh


def assert_same_weights(feature_map, expected, tolerance=2e-3):
    names = {w.name for w in expected.weights}
    assert names == {w.name for w in feature_map.weights} - {"far_offset"}
    for name in names:
        actual, wanted = (to_numpy(getattr(x, name).value) for x in (feature_map, expected))
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(
            actual, wanted, rtol=tolerance, atol=tolerance * scale, err_msg=name
        )


def seen_by_layer(stock, batches):
    return [concatenated(x) for x in zip(*(stock_heads(stock, x) for x in batches), strict=True)]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma", {"method": "spectral"}),
        ("gemma", {"method": "clusters", "seed": 3}),
        pytest.param(
            "gemma2",
            {"method": "spectral", "refine": False, "center": False},
            marks=pytest.mark.slow,
        ),
        pytest.param("gemma3", {"method": "whitening", "refine": False}, marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else x["method"],
)
def test_maps_are_fitted_to_what_the_stock_layers_attend_with(family, options):
    stock, model = dark_gemma(FAMILIES[family], layers="all")
    # A k-means starts from vectors by their number, and the sample is shuffled.
    data = [inputs(40, total=40)] if options["method"] == "clusters" else BATCHES
    quietly(model, data, **options)
    layers = seen_by_layer(stock, data)
    for number, (feature_map, heads) in enumerate(zip(feature_maps(model), layers, strict=True)):
        assert_same_weights(feature_map, refitted(feature_map, heads, number, **options))


def test_a_plain_model_is_fitted_to_what_its_weights_say_in_float64():
    """The same on every backend: queries and keys are computed in NumPy here."""
    model, ids = plain(), tokens()
    block = model.layers[2]
    quietly(model, ids)
    normed = to_numpy(model.layers[1].embeddings.value).astype("float64")[ids]
    normed -= normed.mean(-1, keepdims=True)
    normed /= np.sqrt((normed**2).mean(-1, keepdims=True) + 1e-5)

    def rotated(dense):
        x = np.einsum("btd,dnh->btnh", normed, to_numpy(dense.kernel.value).astype("float64"))
        turns = np.exp(1j * np.arange(LENGTH)[:, None, None] * 10_000.0 ** (-np.arange(2) / 2))
        pairs = (x[..., :2] + 1j * x[..., 2:]) * turns
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    attention = next(x for x in block._flatten_layers() if hasattr(x, "feature_map"))
    fresh = DarkFeatureMap.from_config(attention.feature_map.get_config())
    seed = int(np.random.SeedSequence([0, 0]).generate_state(1)[0])
    query, key = rotated(attention.query_dense), rotated(attention.key_dense)
    fresh.calibrate(query, key, causal=True, max_tokens=4096, seed=seed)
    assert_same_weights(attention.feature_map, fresh)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return len(BATCHES)

    def __getitem__(self, index):
        return BATCHES[index], np.zeros(3)


def joined():
    return {name: np.concatenate([x[name] for x in BATCHES]) for name in BATCHES[0]}


def tensorflow_dataset():
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(joined()).batch(3)


KINDS = {
    "batches": lambda: BATCHES,
    "arrays": joined,
    "tuple": lambda: (joined(), np.zeros(6)),
    "PyDataset": Batches,
    "generator": lambda: ((x, x["token_ids"]) for x in BATCHES),
    "tf.data": tensorflow_dataset,
}


@pytest.fixture(scope="module")
def fitted():
    """A model, and its feature maps fitted to batches, without refinement."""
    model = dark_gemma()[1]
    quietly(model, BATCHES, refine=False)
    return model, feature_weights(feature_maps(model))


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_any_kind_gives_the_same_maps(fitted, kind):
    model, expected = fitted
    quietly(model, KINDS[kind](), batch_size=3, refine=False)
    for path, value in feature_weights(feature_maps(model)).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["list", "tuple", "array", "tf.data"])
def test_text_is_preprocessed_by_the_task(preprocessor, texts, kind):
    model = convert_to_dark(gemma(preprocessor=preprocessor), num_features=16)
    text = texts[:3]
    x, _, _ = preprocessor(text)
    quietly(model, to_numpy(x), refine=False)
    expected = feature_weights(feature_maps(model))
    if kind == "tf.data":
        text = pytest.importorskip("tensorflow").data.Dataset.from_tensors(text)
    else:
        text = {"list": list, "tuple": tuple, "array": np.array}[kind](text)
    quietly(model, text, refine=False)
    for path, value in feature_weights(feature_maps(model)).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("one", "one string"),
        ([], "no batches"),
        (["text"], "needs a model with a preprocessor"),
        (7, "must be strings, arrays"),
        ({"token_ids": np.ones((2, 5)), "padding_mask": np.ones((3, 5))}, "same number of rows"),
    ],
)
def test_data_that_can_not_be_used_is_refused(fitted, data, message):
    with pytest.raises(ValueError, match=message):
        quietly(fitted[0], data)


def test_a_model_without_dark_layers_is_refused():
    with pytest.raises(ValueError, match="must have dark attention layers"):
        quietly(gemma(), BATCHES)


@pytest.mark.parametrize("method", ["auto", *further("scale", "spectral", "clusters")])
def test_what_is_fitted_attends_more_like_softmax_on_held_out_data(method):
    model = dark_gemma(num_features=32, geometry_scale=1.0)[1]
    data = {"token_ids": tokens(9), "padding_mask": np.ones((9, LENGTH), "int32")}
    before = approximation_report(model, HELD_OUT).summary()["kl"]
    quietly(model, data, method=method, batch_size=3)
    after = approximation_report(model, HELD_OUT).summary()["kl"]
    assert after["dark"] < 0.7 * before["dark"]
    assert after["dark"] < 0.7 * after["performer"]
    assert after["uniform"] == pytest.approx(before["uniform"])


def test_what_stands_in_padding_changes_nothing(fitted):
    model, expected = fitted
    scribbled = [x | {"token_ids": np.where(x["padding_mask"], x["token_ids"], 7)} for x in BATCHES]
    quietly(model, scribbled, refine=False)
    for path, value in feature_weights(feature_maps(model)).items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-4, err_msg=path)


def test_maps_are_fitted_at_the_positions_that_were_asked_for():
    stock, model = dark_gemma(lambda: gemma(num_layers=1))
    quietly(model, BATCHES[:1], position_offset=(40, 40), refine=False)
    (feature_map,) = feature_maps(model)
    (heads,), (elsewhere,) = (stock_heads(stock, BATCHES[0], offset) for offset in (40, 0))
    assert_same_weights(feature_map, refitted(feature_map, heads, 0, refine=False))
    with pytest.raises(AssertionError):
        assert_same_weights(feature_map, refitted(feature_map, elsewhere, 0, refine=False))
    assert attentions(model)[0].position_offset is None


@pytest.mark.parametrize(("asked", "low", "high"), [(90, 0, 90), ((50, 60), 50, 60)])
def test_every_batch_starts_at_a_random_position_within_the_bounds(fitted, asked, low, high):
    seen = []
    for seed in (0, 0, 1):
        with positions(fitted[0]) as starts:
            quietly(fitted[0], BATCHES * 2, position_offset=asked, seed=seed, refine=False)
        assert all(low <= start <= high for start in starts)
        assert len(set(starts)) > 2
        seen.append(starts)
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("wrong", [-1, (5, 2), (-3, 4), 1.5, (1, 2.5), (1, 2, 3), "all"])
def test_positions_that_do_not_exist_are_refused(fitted, wrong):
    with pytest.raises(ValueError, match="position_offset"):
        quietly(fitted[0], BATCHES, position_offset=wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "magic"}, "method"),
        ({"proposal": "magic"}, "proposal"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"method": "clusters", "proposal": "spectral"}, "proposal"),
    ],
)
def test_arguments_out_of_range_are_refused(fitted, wrong, message):
    with pytest.raises(ValueError, match=message):
        quietly(fitted[0], BATCHES, **wrong)


def poison(model):
    dense = attentions(model)[1].key_dense
    dense.kernel.assign(np.full(dense.kernel.shape, np.nan))


def sharpen(model):
    dense = attentions(model)[1].query_dense
    dense.kernel.assign(30 * to_numpy(dense.kernel.value))


def flatten(model):
    for dense in (attentions(model)[0].query_dense, attentions(model)[0].key_dense):
        dense.kernel.assign(0.1 * to_numpy(dense.kernel.value))


@pytest.mark.parametrize(
    ("break_it", "options", "message"),
    [
        (poison, {}, "finite"),
        (sharpen, {"method": "identity", "proposal": "variance_optimal"}, "layer_1 can't be"),
    ],
    ids=["nan", "proposal"],
)
def test_an_error_in_one_layer_leaves_all_layers_as_they_were(break_it, options, message):
    model = dark_gemma()[1]
    flatten(model)
    break_it(model)
    before = values(model)
    with pytest.raises(ValueError, match=message):
        quietly(model, BATCHES, **options)
    after = values(model)
    assert after.keys() == before.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    assert all(x.kind == "dark" for x in feature_maps(model))
    assert all(x.observer is None and x.position_offset is None for x in attentions(model))


def test_a_compiled_model_is_compiled_again_when_feature_maps_change(capsys):
    model, prompt = dark_gemma(lambda: gemma(num_layers=1))[1], inputs(8, 2, 5)
    model.compile(optimizer=keras.optimizers.SGD(0.25), sampler="greedy")
    model.generate(dict(prompt), stop_token_ids=None)
    model.optimizer.build(model.trainable_variables)
    first = model.optimizer
    calibrate(model, BATCHES, method="clusters", refine=False)
    assert "1 of 1 feature maps are of another class" in " ".join(capsys.readouterr().out.split())
    assert model.optimizer is not first
    assert float(model.optimizer.learning_rate) == 0.25
    found = model.generate(dict(prompt), stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(found, greedy_search(model, prompt))
    labels = np.zeros((3, LENGTH), "int32")
    model.fit(prompt, labels, batch_size=3, verbose=0)  # new weights are the optimizer's, too
    second = model.optimizer
    calibrate(model, BATCHES, method="clusters", refine=False)
    assert "compiled anew" not in capsys.readouterr().out
    assert model.optimizer is second  # the class is the same
    quietly(model, BATCHES)  # and back again
    assert model.optimizer is not second
    assert [x.kind for x in feature_maps(model)] == ["dark"]


def test_blas_has_one_thread_while_layers_are_fitted(monkeypatch):
    def threads():
        return {x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"}

    inside, fit = [], DarkFeatureMap.fit

    def spied(self, *arguments):
        inside.append(threads())
        return fit(self, *arguments)

    monkeypatch.setattr(DarkFeatureMap, "fit", spied)
    with threadpool_limits(2, user_api="blas"):
        quietly(dark_gemma()[1], BATCHES, refine=False)
        assert threads() == {2}
    assert inside
    assert all(x == {1} for x in inside)


def test_how_many_layers_are_fitted_at_a_time_changes_nothing(monkeypatch):
    model, found = dark_gemma(layers="all")[1], []
    for processors in (1, 3):
        monkeypatch.setattr("os.cpu_count", lambda processors=processors: processors)
        quietly(model, BATCHES)
        found.append(feature_weights(feature_maps(model)))
    for path, value in found[0].items():
        np.testing.assert_array_equal(found[1][path], value, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("build", [gemma, lambda: gemma3(num_layers=2)], ids=["gemma", "gemma3"])
def test_a_geometry_before_the_rotation_improves_and_knows_no_position(build):
    model = dark_gemma(build, layers="all", rope_geometry="before", num_features=32)[1]
    data = {"token_ids": tokens(9), "padding_mask": np.ones((9, LENGTH), "int32")}
    maps = feature_maps(model)
    quietly(model, data, batch_size=3, center=False)
    geometries = [to_numpy(x.geometry.value) for x in maps]
    quietly(model, data, batch_size=3, center=False, position_offset=(1000, 1000))
    for feature_map, geometry in zip(maps, geometries, strict=True):
        np.testing.assert_allclose(
            to_numpy(feature_map.geometry.value), geometry, rtol=2e-3, atol=2e-3
        )
    quietly(model, data, batch_size=3)
    kl = approximation_report(model, HELD_OUT).summary()["kl"]
    assert kl["dark"] < 0.8 * kl["performer"]


@pytest.mark.parametrize("build", [gemma, lambda: gemma3(num_layers=2)], ids=["gemma", "gemma3"])
def test_features_go_to_the_planes_of_much_variance(build):
    """Planes 0 and 1 have by far the most, whatever layout the rotation leaves."""
    model = dark_gemma(build, layers="all", rope_geometry="before")[1]
    quietly(model, BATCHES)
    for layer in attentions(model):
        probe = ops.convert_to_tensor(np.tile(np.arange(8.0, dtype="float32"), (1, 1, 2, 1)))
        layout = np.rint(to_numpy(layer.family.rotate(layer, probe, 0))[0, 0, 0]).astype(int)
        proposal = to_numpy(layer.feature_map.proposal.value)
        is_large = np.isin(layout % 4, (0, 1))
        print(layout, proposal)
        assert proposal[:, is_large].min() > proposal[:, ~is_large].max()


def test_queries_and_keys_with_geometries_of_their_own_start_from_the_same():
    stock, model = dark_gemma(tie_geometry=False)
    tied = convert_to_dark(stock, num_features=16)
    for each in (model, tied):
        quietly(each, BATCHES, refine=False)
    for own, both in zip(feature_maps(model), feature_maps(tied), strict=True):
        expected = to_numpy(both.geometry.value)
        for geometry in (own.geometry, own.query_geometry):
            np.testing.assert_allclose(to_numpy(geometry.value), expected, rtol=1e-5)
    np.testing.assert_allclose(
        outputs(model, BATCHES[0]), outputs(tied, BATCHES[0]), rtol=1e-3, atol=1e-3
    )


def far_masses(stock, model, batches, window, every=1):
    """Per layer and head: mean mass behind the window, of the features and of softmax.

    Of one query in so many.
    """
    layers = seen_by_layer(stock, batches)
    far = behind(window, LENGTH)
    for feature_map, heads in zip(feature_maps(model), layers, strict=True):
        visible = visible_pairs(heads.mask, LENGTH)
        counts = (visible & far).any(-1) & heads.mask[:, None] & (np.arange(LENGTH) % every == 0)
        ours = softmax(feature_scores(feature_map, heads.query, heads.key), visible)
        exact = softmax(softmax_scores(heads.query, heads.key), visible)
        yield [
            [(x * far).sum(-1)[:, head][counts[:, 0]].mean() for head in range(x.shape[1])]
            for x in (ours, exact)
        ]


@pytest.mark.parametrize(("queries", "every"), [(LENGTH, 3), *further((1024, 1))])
def test_the_mass_behind_a_window_is_softmax_s(queries, every, monkeypatch):
    monkeypatch.setattr("keras_darkformer.layers.feature_maps.far_offset.QUERIES", queries)
    stock, model = dark_gemma(sliding_window=4)
    maps = feature_maps(model)
    quietly(model, BATCHES)
    masses = far_masses(stock, model, BATCHES, 4, every)
    for feature_map, (ours, exact) in zip(maps, masses, strict=True):
        offset = to_numpy(feature_map.far_offset.value)
        assert offset.shape == (4,)
        assert len(set(offset)) == 4
        np.testing.assert_allclose(ours, exact, rtol=2e-3)
        feature_map.far_offset.assign(np.zeros(4))
    without = far_masses(stock, model, BATCHES, 4, every)
    assert all(np.abs(np.log(np.divide(*both))).max() > 0.05 for both in without)


@pytest.mark.parametrize("padded", [False, True])
def test_sequences_no_longer_than_the_window_are_refused(padded):
    model = dark_gemma(sliding_window=LENGTH)[1]
    batch = inputs(14, 3, 5) if padded else inputs(14, 14, 14)
    before = values(model)
    with pytest.raises(ValueError, match=r"longer than the 14 tokens that are kept.*14 tokens"):
        quietly(model, [batch])
    after = values(model)
    assert all((after[path] == value).all() for path, value in before.items())


def test_short_sequences_beside_long_ones_do_no_harm():
    stock, model = dark_gemma(sliding_window=6)
    short = inputs(6, 3, 5)
    quietly(model, [short, short, BATCHES[0]], max_tokens=84, refine=False)
    for ours, exact in far_masses(stock, model, BATCHES[:1], 6):
        np.testing.assert_allclose(ours, exact, rtol=2e-3)


@on_one_backend
def test_the_mass_is_that_of_the_longest_row_where_one_is_enough(monkeypatch):
    module = sys.modules["keras_darkformer.training.calibrate"]
    monkeypatch.setattr(module, "FAR_TOKENS", LENGTH)
    stock, model = dark_gemma(sliding_window=4)
    batch = inputs(3, LENGTH, 5)
    quietly(model, [batch], refine=False)
    longest = {name: x[1:2] for name, x in batch.items()}
    for ours, exact in far_masses(stock, model, [longest], 4):
        np.testing.assert_allclose(ours, exact, rtol=2e-3)


@pytest.mark.slow
def test_auto_takes_clusters_only_where_they_can_be_had():
    _, model = dark_gemma(sliding_window=4)
    quietly(model, BATCHES, method="auto")
    assert {x.kind for x in feature_maps(model)} == {"dark"}
    with pytest.raises(ValueError, match="does not go with a `sliding_window`"):
        quietly(model, BATCHES, method="clusters")


def test_calibration_shows_in_the_config():
    model = dark_gemma()[1]
    assert model.backbone.get_config()["feature_map"] == "dark"
    quietly(model, BATCHES, method="clusters", refine=False)
    config = json.loads(json.dumps(model.backbone.get_config()))
    assert config["feature_map"] == "exponential"
    assert {x.kind for x in feature_maps(model)} == {"exponential"}
    twin = type(model.backbone).from_config(config)
    twin.set_weights(model.backbone.get_weights())
    np.testing.assert_allclose(
        outputs(twin, BATCHES[0]), outputs(model.backbone, BATCHES[0]), rtol=1e-5, atol=1e-5
    )


def test_layers_without_features_are_passed_by():
    """The others are fitted to what comes to them from exact attention, as without such layers."""
    _, model = dark_gemma(sliding_window=4, feature_map=["none", "dark"])
    _, whole = dark_gemma(sliding_window=4)
    for each in (model, whole):
        quietly(each, BATCHES, method="scale", center=True)
    without, found = feature_maps(model)
    assert not without.weights
    assert to_numpy(found.far_offset.value).any()
    for name in ("geometry", "query_shift", "key_shift"):
        wanted = to_numpy(getattr(feature_maps(whole)[1], name).value)
        np.testing.assert_allclose(to_numpy(getattr(found, name).value), wanted, rtol=1e-5)


@pytest.mark.parametrize("fit", [calibrate, transfer_attention])
def test_a_model_without_features_has_nothing_to_fit(fit):
    _, model = dark_gemma(lambda: gemma(num_layers=1), sliding_window=4, feature_map="none")
    with pytest.raises(ValueError, match='whose layers all have `feature_map="none"`'):
        fit(model, BATCHES)
    with pytest.raises(ValueError, match="nothing to calibrate"):
        feature_maps(model)[0].calibrate(np.ones((1, 9, 4, 8)), np.ones((1, 9, 2, 8)), causal=True)
