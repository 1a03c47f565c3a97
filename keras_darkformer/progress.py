"""Progress lines of long calls.

`keras.utils.Progbar` writes carriage returns into files, shows "1/Unknown" without a known total
and, after a slow first step that compiles, predicts hours.
"""

import shutil
import sys
import time

import keras

from keras_darkformer.types import Config

SECONDS = 30.0  # between lines of a file
TERMINAL_SECONDS = 0.1


class Progress:
    """One line, rewritten in place in a terminal or notebook; in a file, a new one now and then.

    Args:
        what: text that begins the line.
        unit: what is counted, in the plural.
        total: int, or `None` if it is not known.
        start: int. What was done before, which is left out of the speed.
        verbose: bool. Whether anything is shown.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        *,
        start: int = 0,
        verbose: bool = True,
    ) -> None:
        self.what, self.unit, self.total, self.verbose = what, unit, total, verbose
        self.written_over = sys.stdout.isatty() or "ipykernel" in sys.modules
        self.count = self.first = start
        self.began = self.shown = time.monotonic()
        # When the first step ended. It may include compilation, so the estimate leaves it out.
        self.first_done: float | None = None
        self.more, self.width = "", 0

    def update(self, count: int, more: str = "") -> None:
        """Sets how many are done; `more`, if given, ends the line from now on."""
        now, self.count, self.more = time.monotonic(), count, more or self.more
        if self.first_done is None and count > self.first:
            self.first_done, self.first = now, count
        if now - self.shown >= (TERMINAL_SECONDS if self.written_over else SECONDS):
            self.shown = now
            self._show(self._left(now))

    def finish(self) -> None:
        """Shows the last line and ends it."""
        self._show("", end="\n")

    def _left(self, now: float) -> str:
        """The time left; an empty string until a step after the first is done."""
        done = self.count - self.first
        if self.total is None or self.first_done is None or done < 1:
            return ""
        return f", {_told((now - self.first_done) / done * (self.total - self.count))} left"

    def _show(self, left: str, end: str = "") -> None:
        if not self.verbose:
            return
        of = "" if self.total is None else f" of {self.total}"
        more = f": {self.more}" if self.more else ""
        passed = _told(time.monotonic() - self.began)
        line = f"{self.what}: {self.count}{of} {self.unit} in {passed}{left}{more}"
        if self.written_over:
            if sys.stdout.isatty():  # a line that wraps can't be rewritten
                line = line[: shutil.get_terminal_size().columns - 1]
            padding = " " * max(0, self.width - len(line))
            self.width = len(line)
            print(f"\r{line}{padding}", end=end, flush=True)
        else:
            print(line, flush=True)


class FitProgress(keras.callbacks.Callback):
    """Shows the progress of a fit, with the losses of its last epoch.

    Args:
        what: text that begins the line.
        steps: int. Steps of all epochs together.
        done: int. Steps taken before.
    """

    def __init__(self, what: str, steps: int, done: int = 0) -> None:
        super().__init__()
        self.progress = Progress(what, "steps", steps, start=done)

    def on_train_batch_end(self, batch: int, logs: Config | None = None) -> None:
        """Counts one more step."""
        self.progress.update(self.progress.count + 1)

    def on_epoch_end(self, epoch: int, logs: Config | None = None) -> None:
        """Shows an epoch's losses until the next one ends."""
        losses = {name: (logs or {})[name] for name in ("loss", "val_loss") if name in (logs or {})}
        told = ", ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
        self.progress.update(self.progress.count, told)

    def on_train_end(self, logs: Config | None = None) -> None:
        """Shows the last line."""
        self.progress.finish()


def _told(seconds: float) -> str:
    """A time as `m:ss` or `h:mm:ss`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
