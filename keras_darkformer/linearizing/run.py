"""`linearize`: from a stock model and texts to a usable dark model."""

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
    """A dark model and the report of how it was made.

    Attributes:
        model: the dark model.
        report: a `LinearizationReport`, which is also the model's `linearization`.
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
    """Converts a model and restores its abilities, in one call.

    The stages are `choose_layers` if some layers are to stay exact, `convert_to_dark`, `calibrate`,
    `transfer_attention` and, for causal LMs, `distil` from the model's own exact logits, taken
    before it learns: there is no second copy of its weights. Each row that a causal LM learns from
    repeats one of its segments, so that there is something to look up. Before and after each stage
    the model is judged on text held out from all of them. A stage that made it worse is undone, and
    each fit stops when nothing more is gained. Every stage can also be called by itself.

    Args:
        model: a stock model that `convert_to_dark` takes. It is converted in place.
        data: long texts, or arrays or batches as for `calibrate`, with rows of at least `length`
            tokens. For a causal LM texts are joined and cut into rows of `length` tokens; for an
            encoder the preprocessor turns each text into a row.
        keep_exact: int. Number of layers of a causal LM to leave exact. A probe chooses them, on a
            second copy of the model. Looking things up in long texts needs some.
        tokens: int. How many tokens the fits may read in all, a quarter of them in
            `transfer_attention`; `None` for 150,000 unless `minutes` is given.
        minutes: float. About how long the call may take. When a fit begins, the time of a forward
            pass turns this into tokens.
        length: int. Tokens per row, more than the exact memory holds.
        batch_size: int. Rows per training step.
        train: what `distil` trains besides the feature maps.
        validation_data: texts to judge by; `None` holds back the last tenth of the rows, at most
            32.
        work_dir: path of a folder where progress is saved. If the call is killed at any point, the
            same call continues from there.
        description: str, a description of the data for the model card.
        on_stage_end: function of a stage's name and the model, to inspect the model. It is called
            with `"exact"` before the conversion, and after every stage of this run.
        verbose: bool. Whether to show progress, and a line on what each stage achieved.
        **kwargs: the options of `ConversionOptions`. If none are given, a causal LM gets
            `feature_map="none", sliding_window=64, num_sinks=4, cache_size=188`: a memory of 256
            tokens, and nothing to calibrate. Features are worth their bytes in smaller memories.

    Returns:
        `Linearized`: the model, and a report to print, read as a dict and `plot`. The report is
        also the model's `linearization`, and appears in the card of its presets.

    Raises:
        TypeError: for an unknown option.
        ValueError: if an argument is out of range, there is too little text, the model can't be
            converted, or `work_dir` holds another run or a damaged one. Wrong arguments are found
            before the model is converted.

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
