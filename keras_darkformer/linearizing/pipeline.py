"""The stages of a run of `linearize`."""

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_darkformer.choosing import choose_layers, probe_length
from keras_darkformer.hub.conversion import convert_to_dark
from keras_darkformer.hub.record import FACTS, versions
from keras_darkformer.layers.core import exactly, fitted
from keras_darkformer.linearizing.budget import Budget
from keras_darkformer.linearizing.notebook import Notebook, values_of
from keras_darkformer.linearizing.report import LinearizationReport
from keras_darkformer.linearizing.texts import TOP_K, Decoder, Figures, Kind, Rows
from keras_darkformer.options import ConversionOptions
from keras_darkformer.progress import Progress
from keras_darkformer.training.calibrate import calibrate
from keras_darkformer.training.data import dark_layers, look
from keras_darkformer.training.distil import (
    TeacherTargets,
    distil,
    teacher_targets,
)
from keras_darkformer.training.transfer import transfer_attention
from keras_darkformer.types import Config, Model

CALIBRATION_TOKENS = 4096
VALIDATE_EVERY = 20  # steps
VALIDATED_ROWS = 4  # each time: they cost as much as equally many steps
TARGETS_IN_A_FILE = 32  # batches


class Pipeline:
    """One run of `linearize`: the model, the texts, and the notebook.

    Args:
        model: the model, converted in place.
        kind: how the model is fed and judged.
        training: rows to fit to.
        held_out: rows to judge by.
        budget: what may be spent.
        notebook: the notebook of this run.
        batch_size: int. Rows per step.
        on_stage_end: function of a stage's name and the model, or `None`.
        verbose: bool. Whether to show progress.
    """

    def __init__(
        self,
        model: Model,
        kind: Kind,
        training: Rows,
        held_out: Rows,
        budget: Budget,
        notebook: Notebook,
        batch_size: int,
        on_stage_end: Callable[[str, Model], None] | None,
        verbose: bool,
    ) -> None:
        self.model, self.kind = model, kind
        self.training, self.held_out = training, held_out
        self.budget, self.notebook = budget, notebook
        self.batch_size, self.verbose = batch_size, verbose
        self.on_stage_end = on_stage_end or (lambda name, model: None)
        self.source = type(model).__name__

    def look(self) -> None:
        """Judges the source, and times a forward pass."""
        self.kind.look(self.model, self.held_out)
        facts = self.notebook.facts
        if "exact" not in facts:
            facts["exact"] = self.kind.judge(self.model)
            facts["seconds_per_token"] = self._forward_seconds()
            self.notebook.write()
        self._say(f"exact: {_told(facts['exact'])}")
        self.on_stage_end("exact", self.model)

    def choose(self, keep_exact: int, options: Config) -> list[int]:
        """Chooses the layers to convert."""
        facts = self.notebook.facts
        if "choice" not in facts:
            some = first(self.training, CALIBRATION_TOKENS // self.kind.length)
            choice = choose_layers(
                self.model,
                [some],
                keep_exact=keep_exact,
                length=min(probe_length(ConversionOptions(**options).memory), self.kind.length),
                repeat=min(32, self.kind.length // 3),
                verbose=self.verbose,
                **options,
            )
            facts["choice"] = choice.indices
            self.notebook.write()
        return facts["choice"]

    def convert(self, options: Config) -> None:
        """Makes the model dark."""
        convert_to_dark(self.model, **options)
        self.layers = dark_layers(self.model)
        self.has_features = any(x.feature_map.num_features for x in self.layers.values())
        self.maps = [v for x in self.layers.values() for v in x.feature_map.variables]
        self.stage("converted", [], lambda: 0)

    def stage(self, name: str, variables: list[Any], work: Callable[[], int]) -> None:
        """Runs one stage, or restores its result if it was run before.

        Args:
            name: what the model is afterwards.
            variables: what the stage may change besides the feature maps.
            work: runs the stage, and returns how many tokens it took.
        """
        variables = list({id(v): v for v in (*self.maps, *variables)}.values())
        stages = self.notebook.facts["stages"]
        done = next((x for x in stages if x["name"] == name), None)
        if done is not None:
            if name != "converted" and done["kept"]:
                self.notebook.load(name, variables)
            self.budget.spend(done["seconds"])
            self._say(f"{name} before: {_told(_figures(done))}")
            return
        before, started = values_of(variables), time.time()
        with fitted(self.layers.values()):
            tokens = work()
            seconds = time.time() - started
            self.budget.spend(seconds)
            found = self.kind.judge(self.model)
        kept = not stages or self.kind.cost(found) <= self.kind.cost(self._reached())
        if kept and name != "converted":
            self.notebook.save(name, variables)
        if not kept:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)
        entry = {"name": name, "seconds": seconds, "tokens": tokens, "kept": kept, **found}
        stages.append(entry)
        self.notebook.write()
        undone = "" if kept else ", no gain: undone"
        left = self.budget.told()
        self._say(f"{name} in {seconds:.0f} s: {_told(found)}{undone}{left}")
        self.on_stage_end(name, self.model)

    def calibrate(self) -> int:
        """Fits the feature maps."""
        some = first(self.training, CALIBRATION_TOKENS // self.kind.length)
        calibrate(self.model, [some], verbose=self.verbose)
        return some["token_ids"].size

    def transfer(self) -> int:
        """Trains each layer on its own softmax."""
        share = 0.25 if self.kind.distils else 1.0
        steps = self._steps("transfer", share, cost=3.0)
        history = transfer_attention(
            self.model,
            self._drawn(steps, seed=1),
            steps=steps,
            validate_every=VALIDATE_EVERY,
            validation_data=first(self.held_out, VALIDATED_ROWS),
            batch_size=self.batch_size,
            backup=self.notebook.path("transfer.backup.npz"),
            verbose=self._fit_verbose,
        )
        self.notebook.drop("transfer.backup.npz")
        return self._tokens(history, steps)

    def distil(self, train: str) -> int:
        """Trains the whole model on its own exact logits."""
        steps = self._steps("distil", 0.75 if self.has_features else 1.0, cost=6.0)
        assert isinstance(self.kind, Decoder)
        rows = self._drawn(steps, seed=2)
        targets = self._targets(rows)
        history = distil(
            self.model,
            targets,
            rows,
            steps=steps,
            train=train,
            validate_every=VALIDATE_EVERY,
            validation_data=self.kind.known(VALIDATED_ROWS),
            batch_size=self.batch_size,
            backup=self.notebook.path("distil.backup.npz"),
            verbose=self._fit_verbose,
        )
        self.notebook.drop("distil.backup.npz")
        self.notebook.drop("targets-*.npz")
        return self._tokens(history, steps)

    def _targets(self, rows: Rows) -> list[TeacherTargets]:
        """The predictions of the exact model, whose weights the model still has."""
        count, found = len(rows["token_ids"]), []
        size = TARGETS_IN_A_FILE * self.batch_size
        shown = self.verbose and count > size
        progress = Progress("the exact model's logits", "rows", count, verbose=shown)
        for number, start in enumerate(range(0, count, size)):
            some = {key: x[start : start + size] for key, x in rows.items()}

            def note(some: Rows = some) -> list[TeacherTargets]:
                with exactly(self.layers.values()):
                    return list(
                        teacher_targets(self.model, some, top_k=TOP_K, batch_size=self.batch_size)
                    )

            found += self.notebook.targets(f"targets-{number}", note)
            progress.update(min(start + size, count))
        progress.finish()
        return found

    def report(self, length: int, description: str | None) -> LinearizationReport:
        """The report of the run."""
        facts = self.notebook.facts
        backbone: Model = getattr(self.model, "backbone", self.model)
        number = len(backbone.transformer_layers)
        return LinearizationReport(
            model=self.source,
            layers=number,
            exact_layers=[i for i in range(number) if i not in backbone.dark_layers],
            options=facts["plan"]["options"],
            data={
                "training_tokens": self.training["token_ids"].size,
                "held_out_tokens": self.held_out["token_ids"].size,
                "length": length,
                "description": description,
            },
            exact=facts["exact"],
            stages=facts["stages"],
            versions=versions(),
        )

    @property
    def _fit_verbose(self) -> Any:
        return "auto" if self.verbose else 0

    def _reached(self) -> Figures:
        """The figures of the model: those after the last stage that was kept."""
        return [x for x in self.notebook.facts["stages"] if x["kept"]][-1]

    def _steps(self, name: str, share: float, cost: float) -> int:
        """The steps of a fit, set when it first begins; a step costs `cost` forward passes."""
        facts = self.notebook.facts
        if f"{name}_steps" not in facts:
            facts[f"{name}_steps"] = self.budget.steps(
                share, cost * facts["seconds_per_token"], self.batch_size * self.kind.length
            )
            self.notebook.write()
        return facts[f"{name}_steps"]

    def _tokens(self, history: keras.callbacks.History, steps: int) -> int:
        """The number of tokens a fit has read, which may have stopped early."""
        made = min(steps, VALIDATE_EVERY * len(history.history["loss"]))
        return made * self.batch_size * self.kind.length

    def _drawn(self, steps: int, seed: int) -> Rows:
        """Rows for a number of steps: all of them in a new order, as often as needed."""
        count, needed = len(self.training["token_ids"]), steps * self.batch_size
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(count) for _ in range(-(-needed // count))]
        chosen = np.concatenate(orders)[:needed]
        rows = {name: value[chosen] for name, value in self.training.items()}
        return self.kind.to_learn(rows, rng)

    def _forward_seconds(self) -> float:
        """Seconds per token of a forward pass: the second one, as the first may compile."""
        rows = first(self.held_out, 1)
        seconds = 0.0
        for _ in range(2):
            started = time.time()
            keras.tree.map_structure(keras.ops.convert_to_numpy, look(self.model, rows))
            seconds = time.time() - started
        return seconds / rows["token_ids"].size

    def _say(self, line: str) -> None:
        if self.verbose:
            print(line, flush=True)


def first(rows: Rows, count: int) -> Rows:
    """The first `count` rows, at least one."""
    return {name: x[: max(1, count)] for name, x in rows.items()}


def _figures(stage: Config) -> Figures:
    return {name: value for name, value in stage.items() if name not in FACTS}


def _told(figures: Figures) -> str:
    return ", ".join(f"{name} {value:z.3f}" for name, value in figures.items())
