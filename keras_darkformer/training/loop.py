"""Fits of a given number of steps, with validation, early stopping and resumption."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_darkformer.checks import positive_integer
from keras_darkformer.layers.core import FeatureAttention
from keras_darkformer.progress import FitProgress
from keras_darkformer.training.callbacks import RedrawProjections
from keras_darkformer.training.data import KnownBatches
from keras_darkformer.training.saved_arrays import load_arrays, save_arrays
from keras_darkformer.types import Config


def fit_steps(
    fitted: Any,
    layers: Sequence[FeatureAttention],
    examples: Iterator[Any],
    held_out: list[Any] | None,
    *,
    steps: int,
    validate_every: int,
    patience: int,
    backup: str | Path | None,
    callbacks: Sequence[keras.callbacks.Callback] | None,
    verbose: Any,
) -> keras.callbacks.History:
    """Fits a compiled model in epochs of `validate_every` steps.

    Args:
        fitted: a Keras model whose output is its loss.
        layers: the dark attention layers in it.
        examples: endless iterator of batches.
        held_out: batches; the weights with the lowest loss on them are kept, and training stops
            after `patience` epochs without a lower one. `None` keeps the last weights.
        steps: int.
        validate_every: int.
        patience: int.
        backup: path of a file that keeps the trained weights and the optimizer, written after every
            epoch. A fit that finds it continues from there.
        callbacks: the caller's callbacks.
        verbose: 0 for nothing, 2 for Keras' line per epoch, else a line of progress.

    Raises:
        ValueError: if an argument is out of range, or the file at `backup` is damaged or from
            another fit.
    """
    steps = positive_integer("steps", steps)
    every = min(positive_integer("validate_every", validate_every), steps)
    epochs = -(-steps // every)
    callbacks = list(callbacks or ())
    best = KeepBest(positive_integer("patience", patience))
    callbacks += [best] if held_out is not None else []
    notes = None
    if backup is not None:
        notes = Backup(Path(backup), fitted, layers, best, {"steps": steps, "every": every})
        callbacks.append(notes)
    done = 0 if notes is None else notes.restore()
    for callback in callbacks:
        if isinstance(callback, RedrawProjections):
            callback.steps += done * every  # each step has its own draw
    if done == epochs or best.is_over:
        assert notes is not None
        best.put_back(fitted)
        return notes.history_so_far()
    if verbose in ("auto", 1):
        verbose, shown = 0, FitProgress(fitted.name, steps, done * every)
        callbacks.append(shown)
    history = fitted.fit(
        (example for example in itertools.islice(examples, done * every, None)),
        shuffle=False,
        initial_epoch=done,
        epochs=epochs,
        steps_per_epoch=every,
        validation_data=None if held_out is None else KnownBatches(held_out),
        callbacks=[*callbacks, _StopAfter(steps - done * every)],
        verbose=verbose,
    )
    if notes is not None:
        history.history = notes.logs
    return history


class _StopAfter(keras.callbacks.Callback):
    """Ends training after a number of steps, which need not fill the last epoch."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch: int, logs: Config | None = None) -> None:
        self.left -= 1
        if not self.left:
            self.model.stop_training = True


class KeepBest(keras.callbacks.Callback):
    """Stops when the held-out loss no longer falls, and restores the best weights.

    Unlike `keras.callbacks.EarlyStopping` it copies the trained weights only.
    """

    def __init__(self, patience: int) -> None:
        super().__init__()
        self.patience = patience
        self.best, self.since_best = float("inf"), 0
        self.kept: list[np.ndarray] = []

    @property
    def is_over(self) -> bool:
        """Whether it has waited long enough."""
        return self.since_best >= self.patience

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        """Compares the held-out loss with the best one so far."""
        assert logs is not None
        loss = float(logs["val_loss"])
        self.since_best += 1
        if loss < self.best:
            self.best, self.since_best = loss, 0
            self.kept = [value_of(v) for v in self.model.trainable_variables]
        if self.is_over:
            self.model.stop_training = True

    def on_train_end(self, logs: Config | None = None) -> None:
        """Puts the best weights back."""
        self.put_back(self.model)

    def put_back(self, fitted: Any) -> None:
        """Restores the best weights, if there was any validation."""
        for variable, value in zip(fitted.trainable_variables, self.kept, strict=bool(self.kept)):
            variable.assign(value)


class Backup(keras.callbacks.Callback):
    """Writes the progress of a fit to a file after every epoch.

    `keras.callbacks.BackupAndRestore` would write every weight of the model, frozen ones too, and
    knows neither the best weights so far nor how far the data were read.

    Args:
        path: the file.
        fitted: the compiled model.
        layers: the dark attention layers in it.
        best: the callback that keeps the best weights.
        plan: facts that identify the fit.
    """

    def __init__(
        self,
        path: Path,
        fitted: Any,
        layers: Sequence[FeatureAttention],
        best: KeepBest,
        plan: Config,
    ) -> None:
        super().__init__()
        self.path, self.best, self.plan = path, best, plan
        fitted.optimizer.build(fitted.trainable_variables)
        # Projections may have been redrawn; the states of seeds determine the next draws.
        seeds = [v for v in fitted.variables if "seed_generator" in v.path]
        maps = [v for layer in layers for v in layer.feature_map.variables]
        chosen = [*fitted.trainable_variables, *maps, *seeds, *fitted.optimizer.variables]
        self.variables = list({id(v): v for v in chosen}.values())
        self.plan |= {"shapes": [list(v.shape) for v in self.variables]}
        self.logs: dict[str, list[float]] = {}

    def restore(self) -> int:
        """Restores the progress in the file, if there is one; returns the epochs that are done."""
        if not self.path.exists():
            return 0
        arrays, facts = load_arrays(self.path)
        if facts["plan"] != self.plan:
            raise ValueError(
                f"`backup` is of another fit: {str(self.path)!r} has {_short(facts['plan'])}, but "
                f"this one has {_short(self.plan)}. Delete it, or name another file."
            )
        for index, variable in enumerate(self.variables):
            variable.assign(arrays[f"variable_{index}"])
        self.logs = facts["logs"]
        self.best.best, self.best.since_best = facts["best"], facts["since_best"]
        self.best.kept = [arrays[f"best_{index}"] for index in range(facts["kept"])]
        return facts["epochs"]

    def history_so_far(self) -> keras.callbacks.History:
        """The history of a fit with nothing left to do."""
        history = keras.callbacks.History()
        history.history = self.logs
        return history

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        """Writes the file."""
        for name, value in (logs or {}).items():
            self.logs.setdefault(name, []).append(float(value))
        arrays = {f"variable_{i}": value_of(v) for i, v in enumerate(self.variables)}
        arrays |= {f"best_{i}": value for i, value in enumerate(self.best.kept)}
        facts = {
            "plan": self.plan,
            "epochs": epoch + 1,
            "logs": self.logs,
            "best": self.best.best,
            "since_best": self.best.since_best,
            "kept": len(self.best.kept),
        }
        save_arrays(self.path, arrays, facts)


def value_of(variable: Any) -> np.ndarray:
    """A variable's value, in a dtype that is NumPy's own."""
    value = variable.value
    if "bfloat16" in str(variable.dtype):
        value = ops.cast(value, "float32")
    return np.array(ops.convert_to_numpy(value))


def _short(plan: Config) -> str:
    shapes = plan["shapes"]
    sizes = sum(int(np.prod(shape)) for shape in shapes)
    return f"steps={plan['steps']}, validate_every={plan['every']} and {sizes} numbers"
