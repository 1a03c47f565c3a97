"""Keras callbacks for models with dark attention."""

import math
import statistics
from collections import deque
from typing import Any

import keras
import numpy as np

from keras_darkformer.checks import positive_integer
from keras_darkformer.training.data import dark_layers
from keras_darkformer.training.report import approximation_report
from keras_darkformer.types import Config, Data, Model


class _CountsSteps(keras.callbacks.Callback):
    """Counts training steps, of which Keras may take several in one execution.

    They are counted as Keras numbers them: an execution that the end of the data cuts short counts
    in full.

    Attributes:
        steps: steps taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self._in_epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Config | None = None) -> None:
        """Starts numbering the batches again."""
        self._in_epoch = 0

    def count(self, batch: int) -> int:
        """Counts the steps up to and including `batch` of the epoch; returns how many are new."""
        if batch < self._in_epoch:  # a custom loop that does not mark epochs
            self.on_epoch_begin(0)
        new = batch + 1 - self._in_epoch
        self._in_epoch += new
        self.steps += new
        return new


class RedrawProjections(_CountsSteps):
    """Redraws the projections of all dark layers during training.

    With fixed draws the model learns around their errors, and its features become learned features.
    New draws keep it true to the kernel.

    Args:
        every: int. Training steps between draws. With `steps_per_execution`, the draw follows the
            execution that completes these steps.
        seed: int. Seed of the draws.
        model: the model with dark layers, if `fit` is called on another model that holds it; `None`
            for the fitted model.

    Raises:
        ValueError: if `every` is not a positive integer; at a draw, if a feature map was fitted to
            data and has nothing to draw.

    Example:

        model.fit(data, callbacks=[RedrawProjections(every=100)])

    References:
        - [Rethinking Attention with Performers](https://arxiv.org/abs/2009.14794), section 4.2
    """

    def __init__(self, every: int, *, seed: int = 0, model: Model = None) -> None:
        super().__init__()
        self.every = positive_integer("every", every)
        self.seed = seed
        self.holder = model

    def on_train_batch_end(self, batch: int, logs: Config | None = None) -> None:
        """Draws after every `every`-th step."""
        if self.count(batch) <= self.steps % self.every:
            return
        if hasattr(self.model, "jax_state_sync"):  # else JAX trains on from its own copy
            self.model.jax_state_sync()
        layers = dark_layers(_trained(self.model) if self.holder is None else self.holder)
        for index, layer in enumerate(layers.values()):
            sequence = np.random.SeedSequence([self.seed, self.steps, index])
            layer.feature_map.redraw(int(sequence.generate_state(1)[0]))


class LossSpikeCounter(_CountsSteps):
    """Counts steps whose loss is not finite, or above the median of the last ones by a margin.

    The count so far is `"loss_spikes"` in the history of `fit` and in the `logs` of later
    callbacks.

    Keras reports the mean loss of an epoch so far, weighted by rows; the loss of a step is computed
    from its change. With `steps_per_execution` only the mean over an execution is visible: it
    stands for each of its steps, and a jump counts for the first of them. `train_on_batch` restarts
    the mean, so the loss of its step is what it returned.

    Args:
        margin: float. How far above the median a spike is, in nats.
        window: int. Number of steps that the median is taken over.

    Attributes:
        spikes: list of int, indices of the steps with a spike.

    Raises:
        ValueError: if `window` is not a positive integer.
    """

    def __init__(self, margin: float = 0.3, window: int = 10) -> None:
        super().__init__()
        self.margin = margin
        self.recent: deque[float] = deque(maxlen=positive_integer("window", window))
        self.spikes: list[int] = []
        self._seen = (0.0, 0.0)
        self._begins_anew = False

    def on_train_begin(self, logs: Config | None = None) -> None:
        """Expects means over an epoch, as `fit` reports them."""
        self._begins_anew = False

    def on_epoch_begin(self, epoch: int, logs: Config | None = None) -> None:
        """Restarts the mean, as Keras does."""
        super().on_epoch_begin(epoch)
        self._seen = (0.0, 0.0)

    def on_train_batch_end(self, batch: int, logs: Config | None = None) -> None:
        """Computes the step's own loss from the running mean."""
        new = self.count(batch)
        total, weight = self._total(logs or {})
        self._begins_anew |= weight <= self._seen[1]
        before = (0.0, 0.0) if self._begins_anew else self._seen
        loss = (total - before[0]) / max(weight - before[1], 1e-30)
        if math.isfinite(loss):
            self._seen = total, weight
        full = len(self.recent) == self.recent.maxlen
        spike = not math.isfinite(loss)
        if full and not spike:
            spike = loss > statistics.median(self.recent) + self.margin
        if spike:
            self.spikes.append(self.steps - new)
        if math.isfinite(loss):
            self.recent.extend([loss] * new)

    def _total(self, logs: Config) -> tuple[float, float]:
        """The weighted sum of the epoch's losses so far, and the sum of the weights."""
        metrics = getattr(self.model, "metrics", ())
        tracker = next((metric for metric in metrics if metric.name == "loss"), None)
        if not isinstance(tracker, keras.metrics.Mean):  # a custom `train_step`
            return float(logs["loss"]) * self._in_epoch, float(self._in_epoch)
        if hasattr(self.model, "jax_state_sync"):  # else JAX keeps the metrics to itself
            self.model.jax_state_sync()
        return float(tracker.total), float(tracker.count)

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        """Writes the count into the history."""
        if logs is not None:
            logs["loss_spikes"] = len(self.spikes)


class ApproximationLogger(keras.callbacks.Callback):
    """Logs to TensorBoard how far dark layers are from exact softmax, epoch by epoch.

    The scalars are `approximation/relative_error/<layer>` and `approximation/kl/<layer>`, means
    over the heads. The history of `fit` gains means over the layers, `"approximation_error"` and
    `"approximation_kl"`. Logging to TensorBoard needs TensorFlow and TensorBoard with any backend.

    Args:
        data: held-out data, as for `approximation_report`.
        log_dir: path of the directory that TensorBoard reads; `None` for the history only.
        every: int. Epochs between measurements.
        **options: further arguments of `approximation_report`.

    Raises:
        ValueError: if `every` is not a positive integer.
        ImportError: if there is a `log_dir`, but TensorFlow or TensorBoard is not installed.

    Example:

        model.fit(data, epochs=5, callbacks=[ApproximationLogger(held_out, "logs")])
    """

    def __init__(self, data: Data, log_dir: Any = None, *, every: int = 1, **options: Any) -> None:
        super().__init__()
        self.data = data
        self.every = positive_integer("every", every)
        self.options = options
        self._writer = None
        if log_dir is not None:
            try:
                import tensorboard  # noqa: F401  TensorFlow misses it only when it writes
                import tensorflow as tf
            except ImportError as error:
                raise ImportError(
                    "`ApproximationLogger` writes TensorBoard summaries with TensorFlow: "
                    "pip install tensorflow tensorboard, or pass `log_dir=None`."
                ) from error
            self._summary = tf.summary
            self._writer = tf.summary.create_file_writer(str(log_dir))

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        """Measures and logs."""
        if (epoch + 1) % self.every:
            return
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        report = approximation_report(_trained(self.model), self.data, **self.options)
        means = report.summary()
        if logs is not None:
            logs["approximation_error"] = means["relative_error"]["dark"]
            logs["approximation_kl"] = means["kl"]["dark"]
        if self._writer is None:
            return
        with self._writer.as_default(step=epoch):
            for layer in report["layers"]:
                for key in ("relative_error", "kl"):
                    value = float(np.mean([head[key]["dark"] for head in layer["heads"]]))
                    self._summary.scalar(f"approximation/{key}/{layer['name']}", value)
        self._writer.flush()


def _trained(model: Any) -> Any:
    """The model that is trained, also if `fit` is called on a `Distillation`."""
    return getattr(model, "student", model)
