"""`transfer_attention` brings feature maps closer to softmax and touches nothing else."""

import itertools

import keras
import numpy as np
import pytest
from backends import run, to_numpy
from hub.models import LENGTH, attentions, feature_maps, gemma, inputs, values
from keras import ops

from keras_darkformer import calibrate, transfer_attention
from keras_darkformer.layers.feature_maps import BY_KIND
from keras_darkformer.layers.heads import Heads
from keras_darkformer.training.transfer import transfer_loss

from .models import dark_gemma, plain, tokens
from .reference import (
    divergence,
    feature_scores,
    softmax,
    softmax_scores,
    visible_pairs,
)
from .stock import stock_heads

pytestmark = pytest.mark.filterwarnings("ignore:Converting")

DATA = [inputs(14, 9, 5), inputs(7, 14, 12)]
HELD_OUT = {"token_ids": tokens(seed=9), "padding_mask": np.ones((3, LENGTH), "int32")}


def one_layer():
    return gemma(num_layers=1)


def expected_loss(feature_map, heads):
    """In float64, from arrays."""
    query, key, _, mask = heads
    visible = visible_pairs(mask, query.shape[1])
    exact = softmax(softmax_scores(query, key), visible)
    ours = softmax(feature_scores(feature_map, query, key), visible)
    counts = np.broadcast_to(visible.any(-1), exact.shape[:3])
    if mask is not None:
        counts = counts & mask[:, None]
    return divergence(exact, ours)[counts].mean()


def held_out_loss(stock, model):
    parts = zip(feature_maps(model), stock_heads(stock, HELD_OUT), strict=True)
    return sum(expected_loss(feature_map, heads) for feature_map, heads in parts)


MAPS = {
    "dark": {},
    "two geometries": {"tie_geometry": False},
    "exponential": {"feature_map": "exponential"},
    "window": {"sliding_window": 3, "num_query_heads": 4},
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
def test_the_loss_is_what_float64_says_for_grouped_heads(options, masked, rng):
    of_kind = BY_KIND[options.get("feature_map", "dark")]
    feature_map = of_kind(2, 4, num_features=8, seed=0, **options)
    feature_map.build()
    for weight in feature_map.weights:
        value = to_numpy(weight.value)
        weight.assign(value + 0.3 * rng.standard_normal(value.shape))
    arrays = [rng.standard_normal((2, 7, n, 4)).astype("float32") for n in (4, 2, 2)]
    mask = np.arange(7) < np.array([[4], [7]]) if masked else None

    def loss(query, key, value):
        key_mask = None if mask is None else ops.convert_to_tensor(mask)
        heads = Heads(query, key, value, causal=True, key_mask=key_mask)
        return transfer_loss(feature_map, heads)

    expected = expected_loss(feature_map, (*arrays, mask))
    assert expected > 0.01
    np.testing.assert_allclose(run(loss, *arrays), expected, rtol=2e-4)


class Log(keras.callbacks.Callback):
    """How many steps and epochs there were, and the weights before and after each epoch."""

    def __init__(self, maps):
        super().__init__()
        self.maps, self.steps, self.kept, self.projections = maps, 0, [], []

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1

    def on_epoch_end(self, epoch, logs=None):
        self.projections.append([to_numpy(x.projection.value) for x in self.maps])


class Transferred:
    """A run with validation on a model that is compiled and partly frozen."""

    def __init__(self):
        self.stock, self.model = dark_gemma(tie_geometry=False)
        calibrate(self.model, DATA, method="scale", verbose=False)
        self.model.compile(optimizer=keras.optimizers.SGD(0.25), sampler="greedy")
        attentions(self.model)[0].query_dense.trainable = False
        self.optimizer, self.sampler = self.model.optimizer, self.model.sampler
        self.before, self.trainable = values(self.model), self.flags()
        self.loss_before = held_out_loss(self.stock, self.model)
        self.log = Log(feature_maps(self.model))
        full = np.ones((3, LENGTH), "int32")
        data = [{"token_ids": tokens(seed=i), "padding_mask": full} for i in range(10, 16)]
        self.history = transfer_attention(
            self.model,
            data,
            steps=19,
            validate_every=8,
            validation_data=HELD_OUT,
            learning_rate=0.06,
            callbacks=[self.log],
            verbose=0,
        )
        self.after = values(self.model)

    def flags(self):
        layers = self.model._flatten_layers()
        flags = {f"{i} {layer.name}": layer.trainable for i, layer in enumerate(layers)}
        return flags | {v.path: v.trainable for v in self.model.variables}


@pytest.fixture(scope="module")
def transferred():
    return Transferred()


def test_transfer_lowers_the_held_out_divergence(transferred):
    assert held_out_loss(transferred.stock, transferred.model) < 0.9 * transferred.loss_before


def test_transfer_moves_feature_maps_and_nothing_else(transferred):
    before, after = transferred.before, transferred.after
    assert before.keys() == after.keys()
    moved = {path for path, value in before.items() if (after[path] != value).any()}
    trained = {"geometry", "query_geometry"}
    assert moved == {x for x in before if "/feature_map/" in x and x.split("/")[-1] in trained}
    assert len(moved) == 4


def test_transfer_leaves_flags_and_compile_settings_alone(transferred):
    assert transferred.flags() == transferred.trainable
    assert transferred.model.optimizer is transferred.optimizer
    assert transferred.model.sampler is transferred.sampler
    for attention in attentions(transferred.model):
        assert attention.observer is None
        assert attention.position_offset is None


def test_data_is_gone_through_until_all_steps_are_done(transferred):
    assert transferred.log.steps == 19
    assert len(transferred.log.projections) == 3


def test_the_history_has_each_layer_s_loss(transferred):
    history = transferred.history.history
    for prefix in ("", "val_"):
        total = np.add(history[prefix + "layer_0"], history[prefix + "layer_1"])
        np.testing.assert_allclose(history[prefix + "loss"], total, rtol=1e-3)
    assert len(history["loss"]) == 3


def test_the_weights_kept_are_those_of_the_best_validation(transferred):
    best = min(transferred.history.history["val_loss"])
    found = held_out_loss(transferred.stock, transferred.model)
    np.testing.assert_allclose(found, best, rtol=1e-3)


@pytest.mark.slow
def test_training_that_makes_it_worse_stops_early_and_is_undone():
    stock, model = dark_gemma(one_layer)
    history = transfer_attention(
        model,
        DATA,
        steps=20,
        validate_every=1,
        patience=2,
        validation_data=HELD_OUT,
        optimizer=keras.optimizers.SGD(3.0),
        redraw=False,
        verbose=0,
    ).history["val_loss"]
    assert len(history) == 3 + int(np.argmin(history)) <= 8
    np.testing.assert_allclose(held_out_loss(stock, model), min(history), rtol=1e-3)


@pytest.mark.parametrize("kind", ["generator", "list"])
def test_redrawn_projections_differ_and_leave_the_geometry_to_train(kind):
    _, model = dark_gemma(one_layer)
    before = values(model)
    log = Log(feature_maps(model))
    transfer_attention(
        model,
        iter(DATA) if kind == "generator" else DATA,
        steps=5,
        validate_every=2,
        redraw=True,
        position_offset=(3, 30),
        callbacks=[log],
        verbose=0,
    )
    assert log.steps == 5
    drawn = [x[0] for x in log.projections]
    assert all((a != b).any() for a, b in itertools.pairwise(drawn))
    moved = {x.split("/")[-1] for x, value in values(model).items() if (before[x] != value).any()}
    assert moved == {"geometry", "projection"}


def test_a_layer_with_a_window_trains_in_bfloat16():
    stock, model = dark_gemma(
        lambda: gemma(num_layers=1, dtype="bfloat16"), sliding_window=4, geometry_scale=0.3
    )
    before, loss_before = values(model), held_out_loss(stock, model)
    history = transfer_attention(
        model, DATA, steps=10, learning_rate=0.05, validate_every=10, verbose=0
    ).history
    assert np.isfinite(history["loss"]).all()
    after = values(model)
    moved = {x.split("/")[-1] for x, value in after.items() if (before[x] != value).any()}
    assert moved == {"geometry", "far_offset"}
    assert held_out_loss(stock, model) < 0.9 * loss_before


@pytest.mark.slow
def test_a_plain_model_learns_from_its_own_softmax():
    model = plain(geometry_scale=0.3)
    weights = {w.path: to_numpy(w.value) for w in model.weights}
    history = transfer_attention(
        model, tokens(), steps=16, validate_every=8, learning_rate=0.05, verbose=0
    ).history
    assert history["loss"][1] < history["loss"][0]
    moved = {w.path for w in model.weights if (to_numpy(w.value) != weights[w.path]).any()}
    assert moved == {x for x in weights if x.endswith("/geometry")}


def test_a_model_with_nothing_to_train_is_refused():
    _, model = dark_gemma(one_layer, train_geometry=False)
    with pytest.raises(ValueError, match="No feature map of `model` is trainable"):
        transfer_attention(model, DATA, steps=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"validate_every": 0},
        {"patience": 0},
        {"position_offset": -1},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(wrong, transferred):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        transfer_attention(transferred.model, DATA, **wrong)


def test_layers_without_features_learn_nothing_and_stop_nobody(few_steps):
    _, model = dark_gemma(sliding_window=4, feature_map=["dark", "none"])
    other = dark_gemma(sliding_window=4)[1]
    losses = []
    for each in (model, other):
        history = transfer_attention(each, DATA, steps=2, redraw=True, verbose=0).history
        losses.append(history["layer_0"])
    history = transfer_attention(model, DATA, steps=1, verbose=0).history
    assert "layer_1" not in history
    np.testing.assert_allclose(history["loss"], history["layer_0"], rtol=1e-5)
    np.testing.assert_allclose(*losses, rtol=1e-4)
