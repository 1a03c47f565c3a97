"""`linearize`: from a stock model and texts to a dark model one can use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras

from keras_darkformer.checks import not_negative_integer, positive_integer
from keras_darkformer.choosing import check_length
from keras_darkformer.linearizing.budget import Budget
from keras_darkformer.linearizing.notebook import Notebook, fingerprint
from keras_darkformer.linearizing.pipeline import Pipeline, first
from keras_darkformer.linearizing.report import LinearizationReport
from keras_darkformer.linearizing.texts import Kind, Rows, kind_of
from keras_darkformer.options import LINEARIZED, ConversionOptions, shows_options
from keras_darkformer.training.distil import trained_variables
from keras_darkformer.training.loop import value_of
from keras_darkformer.types import Data, Model

HELD_OUT_ROWS = 32  # at most


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
    on_stage_end: Callable[[str, Model], None] | None = None,
    verbose: bool = True,
    **kwargs: Any,
) -> Linearized:
    """Converts a model and brings back what it could do, in one call.

    Stages: `choose_layers` where some are to stay exact, `convert_to_dark`, `calibrate`,
    `transfer_attention` and, for causal LMs, `distil`, from the model's own logits before it
    learns: there is no second copy of its weights. A segment of every row that a causal LM learns
    from comes in it twice, so that there is something to look up. Before and after each stage the
    model is judged on text held out from all of them; a stage that made it worse is undone, and
    each fit stops when nothing is gained any more. Every stage can be called by itself instead.

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
        length: int. Tokens of a row, more than the exact memory holds.
        batch_size: int. Rows of a step.
        train: what `distil` trains beside the feature maps.
        validation_data: texts to judge by; `None` holds the last tenth of the rows back.
        work_dir: a folder where all that is reached is noted down. The same call, killed at any
            point, goes on from there.
        description: of the data, for the model card.
        on_stage_end: function of a stage's name and the model, to look at it meanwhile: called for
            `"exact"`, before anything is converted, and after every stage of this run.
        verbose: bool. Shows progress and a line on what each stage won.
        **kwargs: the options of `ConversionOptions`. `None` of them given, a causal LM gets
            `feature_map="none", sliding_window=64, num_sinks=4, cache_size=188`: a memory of 256
            tokens, and nothing to calibrate. Features are worth their bytes in smaller memories.

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
    not_negative_integer("keep_exact", keep_exact)
    if keep_exact and "layers" in kwargs:
        raise ValueError("`keep_exact` chooses the layers; it does not go with `layers`.")
    allowed = Budget(tokens, minutes)
    kind = kind_of(model, length)
    if kind.distils and not kwargs:
        kwargs = {**LINEARIZED}
    check_length(length, ConversionOptions(**kwargs).memory)
    training, held_out = _split(model, kind, data, validation_data)
    plan = {
        "model": type(model).__name__,
        "weights": fingerprint({v.path: value_of(v).ravel()[:16].copy() for v in model.weights}),
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
    pipeline = Pipeline(
        model, kind, training, held_out, allowed, notebook, batch_size, on_stage_end, verbose
    )
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
    held = min(HELD_OUT_ROWS, max(1, count // 10))
    return first(rows, count - held), {name: x[count - held :] for name, x in rows.items()}
