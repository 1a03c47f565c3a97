"""`linearize`: from a stock model and texts to a dark model one can use."""

import importlib.metadata
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_darkformer.checks import is_integer, positive_integer
from keras_darkformer.choosing import choose_layers
from keras_darkformer.hub.conversion import convert_to_dark
from keras_darkformer.layers.core import exactly
from keras_darkformer.linearizing.budget import Budget
from keras_darkformer.linearizing.notebook import Notebook, fingerprint, values_of
from keras_darkformer.linearizing.report import FACTS, LinearizationReport
from keras_darkformer.linearizing.texts import Figures, Kind, Rows, kind_of
from keras_darkformer.options import ConversionOptions, shows_options
from keras_darkformer.training.calibrate import calibrate
from keras_darkformer.training.data import dark_layers
from keras_darkformer.training.distil import (
    TeacherTargets,
    distil,
    teacher_targets,
    trained_variables,
)
from keras_darkformer.training.transfer import transfer_attention
from keras_darkformer.types import Config, Data, Model

CALIBRATION_TOKENS = 4096
HELD_OUT_ROWS = 8
VALIDATE_EVERY = 20  # steps
TOP_K = 64
TARGETS_IN_A_FILE = 32  # batches


class Linearized(NamedTuple):
    """A model and how it came to be.

    Attributes:
        model: the dark model.
        report: a `LinearizationReport`, also the model's `linearization`.
    """

    model: Model
    report: LinearizationReport


@shows_options(ConversionOptions)
def linearize(
    model: Model,
    data: Data,
    *,
    keep_exact: int = 0,
    tokens: int | None = None,
    minutes: float | None = None,
    length: int = 512,
    batch_size: int = 1,
    train: str = "qkv",
    validation_data: Data = None,
    work_dir: str | Path | None = None,
    description: str | None = None,
    verbose: bool = True,
    **kwargs: Any,
) -> Linearized:
    """Converts a model and brings back what it could do, in one call.

    Stages: `choose_layers` where some are to stay exact, `convert_to_dark`, `calibrate`,
    `transfer_attention` and, for causal LMs, `distil`, from the model's own logits before it
    learns: there is no second copy of its weights. Before and after each stage the model is judged
    on text held out from all of them; a stage that made it worse is undone, and each fit stops when
    nothing is gained any more. Every stage can be called by itself instead.

    Args:
        model: a stock model that `convert_to_dark` takes. It is converted in place.
        data: texts, long ones: those of a causal LM are put together and cut into rows of `length`
            tokens. Or arrays or batches, as for `calibrate`, with rows of at least `length`
            tokens. Encoders take each text as their preprocessor makes it.
        keep_exact: int. Layers of a causal LM to leave exact, chosen by a probe, for which there is
            a second copy of the model. What is to be looked up in long texts needs some.
        tokens: int. How many the fits may read in all, a quarter of them in `transfer_attention`;
            `None` for 150,000 unless `minutes` are given.
        minutes: float. About how long it may take. Turned into tokens from the time of a forward
            pass when a fit begins.
        length: int. Tokens of a row.
        batch_size: int. Rows of a step.
        train: what `distil` trains beside the feature maps.
        validation_data: texts to judge by; `None` holds the last tenth of the rows back.
        work_dir: a folder where all that is reached is noted down. The same call, killed at any
            point, goes on from there.
        description: of the data, for the model card.
        verbose: bool. Shows progress and a line on what each stage won.
        **kwargs: the options of `ConversionOptions`. `None` of them given, a causal LM gets
            `num_features=128, sliding_window=64, num_sinks=4, cache_size=60`.

    Returns:
        `Linearized`: the model, and a report to print, read as a dict and `plot`. The report is
        also the model's `linearization`, and stands in the card of its presets.

    Raises:
        TypeError: for an option that is unknown.
        ValueError: if an argument is out of range, there is too little text, the model can't be
            converted, or `work_dir` holds another run or a damaged one. What was wrong from the
            start is found before the model is converted.

    Example:

        model, report = linearize(CausalLM.from_preset("smollm2"), texts, keep_exact=4)
        print(report)
        model.save_to_preset("dark_smollm2")
    """
    ConversionOptions.take(linearize, kwargs, besides=())
    for name, value in (("length", length), ("batch_size", batch_size)):
        positive_integer(name, value)
    if not is_integer(keep_exact) or keep_exact < 0:
        raise ValueError(f"`keep_exact` must be an integer, 0 or more. Received: {keep_exact!r}")
    if keep_exact and "layers" in kwargs:
        raise ValueError("`keep_exact` chooses the layers; it does not go with `layers`.")
    budget = Budget(tokens, minutes)
    kind = kind_of(model, length)
    if kind.distils and not kwargs:
        kwargs = {"num_features": 128, "sliding_window": 64, "num_sinks": 4, "cache_size": 60}
    training, held_out = _split(model, kind, data, validation_data)
    plan = {
        "model": type(model).__name__,
        "options": {**kwargs},
        "keep_exact": keep_exact,
        "tokens": tokens,
        "minutes": minutes,
        "length": length,
        "batch_size": batch_size,
        "train": train,
        "training": fingerprint(training),
        "held_out": fingerprint(held_out),
        "backend": keras.backend.backend(),
    }
    notebook = Notebook(work_dir, plan)
    pipeline = Pipeline(model, kind, training, held_out, budget, notebook, batch_size, verbose)
    pipeline.look()
    if keep_exact:
        kwargs["layers"] = pipeline.choose(keep_exact, kwargs)
    pipeline.convert(kwargs)
    if pipeline.has_features:
        pipeline.stage("calibrated", [], pipeline.calibrate)
        pipeline.stage("transferred", [], pipeline.transfer)
    if kind.distils:
        trained = trained_variables(model, train)
        pipeline.stage("distilled", trained, lambda: pipeline.distil(train))
    report = pipeline.report(length, description)
    model.linearization = dict(report)
    return Linearized(model, report)


class Pipeline:
    """One run of `linearize`: the model, the texts, and what is noted down.

    Args:
        model: converted in place.
        kind: what it is judged by.
        training: rows.
        held_out: rows.
        budget: what may be spent.
        notebook: of this run.
        batch_size: int. Rows of a step.
        verbose: bool.
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
        verbose: bool,
    ) -> None:
        self.model, self.kind = model, kind
        self.training, self.held_out = training, held_out
        self.budget, self.notebook = budget, notebook
        self.batch_size, self.verbose = batch_size, verbose
        self.source = type(model).__name__

    def look(self) -> None:
        """Judges the source, and takes the time of a forward pass."""
        self.kind.look(self.model, self.held_out)
        facts = self.notebook.facts
        if "exact" not in facts:
            facts["exact"] = self.kind.judge(self.model, self.held_out)
            facts["seconds_per_token"] = self._forward_seconds()
            self.notebook.write()
        self._say(f"exact: {_told(facts['exact'])}")

    def choose(self, keep_exact: int, options: Config) -> list[int]:
        """The layers to convert."""
        facts = self.notebook.facts
        if "choice" not in facts:
            some = _first(self.training, CALIBRATION_TOKENS // self.kind.length)
            choice = choose_layers(
                self.model,
                [some],
                keep_exact=keep_exact,
                length=min(256, self.kind.length),
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
        """Goes through one stage, or takes up what it came to.

        Args:
            name: of what the model then is.
            variables: what it may change beside the feature maps.
            work: does it, and returns how many tokens it took.
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
        tokens = work()
        seconds = time.time() - started
        self.budget.spend(seconds)
        found = self.kind.judge(self.model, self.held_out)
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

    def calibrate(self) -> int:
        """Fits the feature maps."""
        some = _first(self.training, CALIBRATION_TOKENS // self.kind.length)
        calibrate(self.model, [some], verbose=self.verbose)
        return some["token_ids"].size

    def transfer(self) -> int:
        """Has each layer learn its softmax."""
        share = 0.25 if self.kind.distils else 1.0
        steps = self._steps("transfer", share, cost=3.0)
        history = transfer_attention(
            self.model,
            self._drawn(steps, seed=1),
            steps=steps,
            validate_every=VALIDATE_EVERY,
            validation_data=self._judged(),
            batch_size=self.batch_size,
            backup=self.notebook.path("transfer.backup.npz"),
            verbose=self._fit_verbose,
        )
        self.notebook.drop("transfer.backup.npz")
        return self._tokens(history, steps)

    def distil(self, train: str) -> int:
        """Has the whole learn its own exact logits."""
        steps = self._steps("distil", 0.75 if self.has_features else 1.0, cost=6.0)
        rows, judged = self._drawn(steps, seed=2), self._judged()
        targets, of_judged = self._targets("targets", rows), self._targets("judged", judged)
        history = distil(
            self.model,
            targets,
            rows,
            steps=steps,
            train=train,
            validate_every=VALIDATE_EVERY,
            validation_data=(judged, of_judged),
            batch_size=self.batch_size,
            backup=self.notebook.path("distil.backup.npz"),
            verbose=self._fit_verbose,
        )
        self.notebook.drop("distil.backup.npz")
        self.notebook.drop("targets-*.npz")
        self.notebook.drop("judged-*.npz")
        return self._tokens(history, steps)

    def _targets(self, name: str, rows: Rows) -> list[TeacherTargets]:
        """What the exact model, which has the weights of this one still, makes of rows."""
        count, found = len(rows["token_ids"]), []
        size = TARGETS_IN_A_FILE * self.batch_size
        for number, start in enumerate(range(0, count, size)):
            some = {key: x[start : start + size] for key, x in rows.items()}

            def note(some: Rows = some) -> list[TeacherTargets]:
                with exactly(self.layers.values()):
                    return list(
                        teacher_targets(self.model, some, top_k=TOP_K, batch_size=self.batch_size)
                    )

            found += self.notebook.targets(f"{name}-{number}", note)
            if self.verbose and count > size:
                self._say(f"the exact model's logits of {min(start + size, count)} of {count} rows")
        return found

    def report(self, length: int, description: str | None) -> LinearizationReport:
        """Of all that was done."""
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
            versions=_versions(),
        )

    @property
    def _fit_verbose(self) -> Any:
        return "auto" if self.verbose else 0

    def _reached(self) -> Figures:
        """What the model is by the last stage that was kept."""
        return [x for x in self.notebook.facts["stages"] if x["kept"]][-1]

    def _steps(self, name: str, share: float, cost: float) -> int:
        """The steps of a fit, settled when it first begins; a step costs so many forward passes."""
        facts = self.notebook.facts
        if f"{name}_steps" not in facts:
            facts[f"{name}_steps"] = self.budget.steps(
                share, cost * facts["seconds_per_token"], self.batch_size * self.kind.length
            )
            self.notebook.write()
        return facts[f"{name}_steps"]

    def _tokens(self, history: keras.callbacks.History, steps: int) -> int:
        """What a fit has read, which may have stopped early."""
        made = min(steps, VALIDATE_EVERY * len(history.history["loss"]))
        return made * self.batch_size * self.kind.length

    def _drawn(self, steps: int, seed: int) -> Rows:
        """Rows for so many steps: all in a new order, again and again."""
        count, needed = len(self.training["token_ids"]), steps * self.batch_size
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(count) for _ in range(-(-needed // count))]
        chosen = np.concatenate(orders)[:needed]
        return {name: value[chosen] for name, value in self.training.items()}

    def _judged(self) -> Rows:
        return _first(self.held_out, HELD_OUT_ROWS)

    def _forward_seconds(self) -> float:
        rows = _first(self.held_out, 1)
        started = time.time()
        self.kind.judge(self.model, rows)
        # Of a decoder: text, and lookups.
        passes = 2 if self.kind.distils else 1
        return (time.time() - started) / (passes * rows["token_ids"].size)

    def _say(self, line: str) -> None:
        if self.verbose:
            print(line, flush=True)


def _split(model: Model, kind: Kind, data: Data, validation_data: Data) -> tuple[Rows, Rows]:
    """Rows to fit to, and rows to judge by."""
    rows = kind.rows(model, data)
    if validation_data is not None:
        return rows, kind.rows(model, validation_data)
    count = len(rows["token_ids"])
    if count < 2:
        raise ValueError(
            f"`data` must have at least two rows of {kind.length} tokens, one of them to judge by. "
            f"Received: {count}"
        )
    held = min(4 * HELD_OUT_ROWS, max(1, count // 10))
    return _first(rows, count - held), {name: x[count - held :] for name, x in rows.items()}


def _first(rows: Rows, count: int) -> Rows:
    return {name: x[: max(1, count)] for name, x in rows.items()}


def _figures(stage: Config) -> Figures:
    return {name: value for name, value in stage.items() if name not in FACTS}


def _told(figures: Figures) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


def _versions() -> Config:
    found = {"python": platform.python_version()}
    backend = keras.backend.backend()
    names = {"keras": "keras", "keras_hub": "keras-hub", "keras_darkformer": "keras-darkformer"}
    for name, package in {**names, backend: backend}.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
