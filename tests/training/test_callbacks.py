"""Callbacks for training with dark attention."""

import sys

import keras
import numpy as np
import pytest
from backends import BACKEND, to_numpy

from keras_darkformer import (
    ApproximationLogger,
    LossSpikeCounter,
    RedrawProjections,
    approximation_report,
)
from keras_darkformer.training.data import dark_layers

from .models import plain, tokens


def compiled(learning_rate=0.0, **options):
    model = plain(**options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(learning_rate), loss=loss)
    return model


def projections(model):
    return [to_numpy(x.feature_map.projection.value) for x in dark_layers(model).values()]


class Watch(keras.callbacks.Callback):
    """Projections after every step, and each step's own loss."""

    def __init__(self):
        super().__init__()
        self.projections, self.losses = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.projections.append(projections(self.model)[0])
        self.losses.append(logs["loss"] * (batch + 1) - sum(self.losses))


def fit(model, callbacks, steps=6):
    """The same batch again and again."""
    ids = tokens()
    data = one_by_one([(ids, np.roll(ids, -1, axis=1))] * steps)
    return model.fit(data, steps_per_epoch=steps, callbacks=callbacks, verbose=0)


def one_by_one(batches):
    yield from batches


def test_projections_are_drawn_anew_after_every_so_many_steps_and_used():
    """With nothing trained, the loss moves when the draw does, and only then."""
    model, watch = compiled(), Watch()
    start = projections(model)[0]
    fit(model, [RedrawProjections(every=2, seed=3), watch])
    changed = [
        (a != b).any() for a, b in zip([start, *watch.projections], watch.projections, strict=False)
    ]
    assert changed == [False, True] * 3
    losses = np.array(watch.losses)
    pairs = losses.reshape(3, 2)
    np.testing.assert_allclose(pairs[:, 0], pairs[:, 1], rtol=1e-4)
    assert np.abs(np.diff(pairs[:, 0])).min() > 1e-3
    np.testing.assert_array_equal(projections(model)[0], watch.projections[-1])
    first, second = projections(model)
    assert (first != second).any()


@pytest.mark.slow
def test_draws_are_those_of_the_seed_and_training_goes_on_around_them():
    model, runs = compiled(0.05), []
    start = model.get_weights()
    for seed in (3, 3, 4):
        model.set_weights(start)
        before = {w.path: to_numpy(w.value) for w in model.trainable_weights}
        fit(model, [RedrawProjections(every=2, seed=seed)], steps=2)
        runs.append(projections(model))
        trained = {w.path: to_numpy(w.value) for w in model.trainable_weights}
        assert all((trained[path] != before[path]).any() for path in before if "geometry" in path)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0][0] != runs[2][0]).any()


@pytest.mark.usefixtures("few_steps")
def test_a_model_within_the_one_that_is_fitted_is_drawn_anew():
    inner = plain()
    outer = keras.Sequential([keras.Input((14,), dtype="int32"), inner])
    outer.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")
    before = projections(inner)[0]
    outer.fit(
        tokens(), np.zeros((3, 14, 64)), callbacks=[RedrawProjections(1, model=inner)], verbose=0
    )
    assert (projections(inner)[0] != before).any()


def counted(losses, **options):
    """What the counter makes of steps with these losses, given as Keras gives them."""
    counter, mean = LossSpikeCounter(**options), []
    counter.on_epoch_begin(0)
    for loss in losses:
        mean.append(loss)
        counter.on_train_batch_end(len(mean) - 1, {"loss": np.mean(mean)})
    logs = {}
    counter.on_epoch_end(0, logs)
    assert logs == {"loss_spikes": len(counter.spikes)}
    return counter.spikes


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        pytest.param([2.0] * 10 + [2.29, 2.31, 2.0], [11], id="margin"),
        pytest.param([2.0] * 9 + [9.0], [], id="too_few_before"),
        pytest.param([2.0] * 10 + [5.0] * 8, [10, 11, 12, 13, 14, 15], id="until_the_median_moves"),
        pytest.param([1.0, 9.0] * 5 + [5.2, 5.4], [], id="median_of_two_heaps"),
        pytest.param([5.0 - 0.1 * i for i in range(30)], [], id="falling"),
        pytest.param([2.0, np.nan], [1], id="nan"),
        pytest.param([np.inf], [0], id="inf"),
    ],
)
def test_spikes_are_steps_above_the_median_of_ten_by_a_margin(losses, expected):
    assert counted(losses) == expected


def test_window_and_margin_of_spikes_are_arguments():
    assert counted([1.0, 1.0, 1.0, 1.15], margin=0.1, window=3) == [3]
    with pytest.raises(ValueError, match="window"):
        LossSpikeCounter(window=0)


def test_a_loss_that_is_not_finite_does_not_count_beyond_its_epoch():
    counter = LossSpikeCounter(window=2)
    for epoch, losses in enumerate([[2.0, np.nan], [2.0, 2.0]]):
        counter.on_epoch_begin(epoch)
        for step in range(2):
            counter.on_train_batch_end(step, {"loss": np.mean(losses[: step + 1])})
    assert counter.spikes == [1]


def test_spikes_in_fit_are_in_its_history():
    model = keras.Sequential([keras.Input((14,), dtype="int32"), keras.layers.Embedding(64, 4)])
    counter = LossSpikeCounter(window=2)
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=Label())
    data = one_by_one([(tokens(), np.full((3, 1), loss)) for loss in (1.0, 1.0, 50.0, 1.0)])
    history = model.fit(data, steps_per_epoch=4, callbacks=[counter], verbose=0).history
    assert counter.spikes == [2]
    assert history["loss_spikes"] == [1]


def spikes_of(losses, sizes, steps_per_execution=1, **options):
    """What the counter finds in a fit whose batches have these losses and sizes."""
    model = keras.Sequential([keras.Input((14,), dtype="int32"), keras.layers.Embedding(64, 4)])
    counter = LossSpikeCounter(**options)
    model.compile(keras.optimizers.SGD(0.0), loss=Label(), steps_per_execution=steps_per_execution)
    data = [(tokens(rows=n), np.full((n, 1), x)) for n, x in zip(sizes, losses, strict=True)]
    model.fit(one_by_one(data), steps_per_epoch=len(data), callbacks=[counter], verbose=0)
    return counter


def test_batches_of_any_size_have_their_own_losses():
    counter = spikes_of([1.0, 1.2, 1.0, 1.1, 1.6, 1.0], [8, 1, 7, 1, 2, 8], window=3)
    assert list(counter.recent) == pytest.approx([1.1, 1.6, 1.0], abs=1e-4)
    assert counter.spikes == [4]


def stepped(model, callbacks, data, epochs=2, says_begin=True):
    """A loop of one's own over `train_on_batch` that numbers the batches of each epoch."""
    for callback in callbacks:
        callback.set_model(model)
    for epoch in range(epochs):
        for callback in callbacks if says_begin else ():
            callback.on_epoch_begin(epoch)
        for batch, arrays in enumerate(data):
            logs = model.train_on_batch(*arrays, return_dict=True)
            for callback in callbacks:
                callback.on_train_batch_end(batch, logs)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("says_begin", [True, False])
def test_steps_of_a_loop_over_train_on_batch_have_their_own_losses(says_begin):
    model = keras.Sequential([keras.Input((14,), dtype="int32"), keras.layers.Embedding(64, 4)])
    model.compile(keras.optimizers.SGD(0.0), loss=Label())
    losses, rows = [1.0, 1.2, 5.0, 1.1], [2, 2, 2, 1]
    data = [(tokens(rows=n), np.full((n, 1), x)) for n, x in zip(rows, losses, strict=True)]
    counter = LossSpikeCounter(window=4)
    stepped(model, [counter], data, says_begin=says_begin)
    assert counter.steps == 8
    assert counter.spikes == [6]
    assert list(counter.recent) == pytest.approx(losses, abs=1e-4)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
def test_projections_are_drawn_anew_in_a_loop_that_does_not_say_where_an_epoch_begins():
    model, watch = compiled(), Watch()
    start, ids = projections(model)[0], tokens()
    data = [(ids, np.roll(ids, -1, axis=1))] * 3
    stepped(model, [RedrawProjections(every=2), watch], data, says_begin=False)
    changed = np.diff([x.sum() for x in [start, *watch.projections]]) != 0
    assert changed.tolist() == [False, True] * 3


executions = pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution there")


@executions
def test_executions_of_several_steps_are_counted_as_these_steps():
    losses = [1.0, 2.0, 3.0, 2.0, 2.0, 2.0, 8.0, 2.0, 2.0]
    counter = spikes_of(losses, [1, 1, 2, 2, 2, 2, 1, 1, 2], 3, window=5)
    assert counter.spikes == [6]
    assert counter.steps == 9
    assert list(counter.recent) == pytest.approx([2.0] * 2 + [3.5] * 3, abs=1e-4)


@executions
@pytest.mark.slow
def test_projections_are_drawn_anew_behind_the_execution_that_completes_the_steps():
    model, watch = compiled(), Watch()
    model.compile(keras.optimizers.SGD(0.0), loss=model.loss, steps_per_execution=2)
    start = projections(model)[0]
    fit(model, [RedrawProjections(every=3), watch], steps=8)
    changed = np.diff([x.sum() for x in [start, *watch.projections]]) != 0
    assert changed.tolist() == [False, True, True, False]  # after steps 4 and 6


class Label(keras.losses.Loss):
    """The label, whatever was predicted."""

    def call(self, y_true, y_pred):
        return y_true[:, 0] + 0.0 * keras.ops.mean(y_pred, axis=(1, 2))


def test_the_logger_writes_what_the_report_says(tmp_path):
    pytest.importorskip("tensorboard")
    model = compiled(geometry_scale=0.5)
    held_out = tokens(seed=8)
    expected = approximation_report(model, held_out, seed=2)
    logger = ApproximationLogger(held_out, tmp_path, every=2, seed=2)
    ids = tokens()
    history = model.fit(
        ids, np.roll(ids, -1, axis=1), epochs=4, callbacks=[logger], verbose=0
    ).history
    means = expected.summary()
    assert history["approximation_error"] == pytest.approx(
        [means["relative_error"]["dark"]] * 2, rel=1e-3
    )
    assert history["approximation_kl"] == pytest.approx([means["kl"]["dark"]] * 2, rel=1e-3)
    events = read_events(tmp_path)
    for layer in expected["layers"]:
        for key in ("relative_error", "kl"):
            value = np.mean([head[key]["dark"] for head in layer["heads"]])
            written = events[f"approximation/{key}/{layer['name']}"]
            assert [step for step, _ in written] == [1, 3]
            assert [x for _, x in written] == pytest.approx([value] * 2, rel=1e-3)


def read_events(directory):
    """`(step, value)` by tag."""
    import tensorflow as tf

    found = {}
    for path in sorted(directory.glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                number = float(tf.make_ndarray(value.tensor))
                found.setdefault(value.tag, []).append((event.step, number))
    return found


def test_the_logger_says_at_once_that_tensorboard_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorflow tensorboard"):
        ApproximationLogger(tokens(), tmp_path)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.slow
def test_the_logger_sees_the_weights_of_its_epoch():
    model, held_out = compiled(0.5), tokens(seed=8)
    logger = ApproximationLogger(held_out)
    ids = tokens()
    history = model.fit(
        ids, np.roll(ids, -1, axis=1), epochs=2, callbacks=[logger], verbose=0
    ).history
    now = approximation_report(model, held_out).summary()["kl"]["dark"]
    assert history["approximation_kl"][1] == pytest.approx(now, rel=1e-3)
    assert history["approximation_kl"][0] != pytest.approx(now, rel=1e-3)


@pytest.mark.parametrize(
    "callback", [RedrawProjections, lambda n: ApproximationLogger([], every=n)]
)
def test_never_is_no_interval(callback):
    with pytest.raises(ValueError, match="every"):
        callback(0)
