"""Compares a dark causal LM with the one it was converted from, in figures."""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops
from rich.table import Table

from keras_darkformer.linearizing.texts import JUDGED, Rows, kind_of
from keras_darkformer.printed import PrintedDict
from keras_darkformer.training.held_out import inputs_of
from keras_darkformer.types import Model

REPEATS = 3
# Figures of a model: their meaning, and how they are formatted.
FIGURES = {
    "text": ("loss of text", "z.3f"),
    "lookups": ("loss of lookups", "z.3f"),
    "divergence": ("divergence from exact", "z.3f"),
    "reading": ("tokens read per second", ",.0f"),
    "writing": ("tokens written per second", ",.1f"),
    "bytes": ("bytes carried", ",.0f"),
}


class Comparison(PrintedDict):
    """The figures of two models: a dict for code, a table when printed.

    Keys:
        length: int, tokens of a row, and of the prompt.
        written: int, tokens written after it.
        rows: int, rows whose losses were taken.
        exact, dark: dicts of a model's figures: `text` and `lookups`, losses in nats per token;
            `divergence` from the exact model's predictions, in nats per token; `reading` and
            `writing`, tokens per second; `bytes`, the size of the caches and states that writing
            carries for one text.
    """

    def __rich__(self) -> Table:
        table = Table(
            title=f"{self['length']:,} tokens",
            caption=f"losses in nats per token, of {self['rows']} rows; {self['written']} tokens "
            "written after the prompt",
        )
        for column in ("", "exact", "dark"):
            table.add_column(column, justify="right" if column else "left")
        for name, (told, form) in FIGURES.items():
            table.add_row(told, *(format(self[model][name], form) for model in ("exact", "dark")))
        return table


def compare(exact: Model, dark: Model, rows: Rows, length: int, written: int) -> Comparison:
    """Measures two models.

    Args:
        exact: a stock causal LM.
        dark: a causal LM converted from it.
        rows: text held out from both.
        length: int. Tokens of a row.
        written: int. Tokens to write.

    Raises:
        ValueError: if it was not: the models differ in class or vocabulary size.
    """
    sizes = [model.backbone.vocabulary_size for model in (exact, dark)]
    if dark.stock_cls is not type(exact) or sizes[0] != sizes[1]:
        raise ValueError(
            f"A {type(dark).__name__} with {sizes[1]} tokens in its vocabulary does not come from "
            f"a {type(exact).__name__} with {sizes[0]}."
        )
    kind = kind_of(exact, length)
    kind.look(exact, rows)
    found = {"exact": kind.judge(exact), "dark": kind.judge(dark)}
    prompt = rows["token_ids"][:1]
    for name, model in (("exact", exact), ("dark", dark)):
        found[name] |= {
            "reading": length / _seconds(functools.partial(_read, model, prompt)),
            "writing": _writing_speed(model, prompt, written),
            "bytes": dark.cache_bytes(length + written, exact=name == "exact"),
        }
    judged = min(JUDGED, len(rows["token_ids"]))
    return Comparison(length=length, written=written, rows=judged, **found)


def _read(model: Model, prompt: np.ndarray) -> Any:
    return model.backbone.predict_on_batch(inputs_of(prompt))


def _writing_speed(model: Model, prompt: np.ndarray, written: int) -> float:
    """Tokens per second without the first, whose time is that of the prompt."""
    model.preprocessor = None  # or it would expect text
    model.compile(sampler="greedy")
    size = prompt.shape[1] + written + 1

    def write(count: int) -> None:
        # The buffer always has one size, so that one compiled function serves all calls.
        tokens = np.pad(prompt, [(0, 0), (0, written + 1)], mode="wrap")
        real = (np.arange(size) < size - count)[None]
        inputs = {"token_ids": tokens * real, "padding_mask": real.astype("int32")}
        ops.convert_to_numpy(model.generate(inputs, stop_token_ids=None)["token_ids"])

    seconds = _seconds(lambda: write(written + 1)) - _seconds(lambda: write(1))
    return written / max(seconds, 1e-9)


def _seconds(function: Callable[[], Any]) -> float:
    """The shortest of a few runs, after one that compiles."""
    function()
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)
