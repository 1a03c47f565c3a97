"""The text of a model card: what was converted, how it was fitted, and how to load it."""

import re
from collections.abc import Iterable
from typing import Any

import keras_hub

from keras_darkformer.hub.record import FACTS, as_json, versions
from keras_darkformer.hub.report import conversion_report
from keras_darkformer.layers.core import FeatureAttention
from keras_darkformer.memory import Memory
from keras_darkformer.types import Config

# Kinds of tasks: their tags on Hugging Face, and a line that uses one.
TASKS = {
    "CausalLM": ("text-generation", 'print(model.generate("Once upon a time", max_length=256))'),
    "MaskedLM": ("fill-mask", 'print(model.predict(["A text."]))'),
    "TextClassifier": ("text-classification", 'print(model.predict(["A text."]))'),
}
NO_PREPROCESSOR = "# It was saved without a preprocessor, and takes token ids."
FEATURES = {
    "dark": "random features with a learned geometry (DARKFormer)",
    "exponential": "exponential features without a geometry",
    "none": "no features, only the exact memory",
}
CARD = """---
library_name: keras-hub
{pipeline}tags:
- keras
- linear-attention
- darkformer
---

# {name}

A `keras_hub.models.{source}` whose softmax attention was replaced with linear-time attention by
`keras_darkformer`. It does not behave exactly like its source: see the last section.

## What was converted

{converted}

## How it was fitted

{fitted}

## Versions

{versions}

## How to use it

The model needs the package `keras-darkformer` with its extra `hub`, and TensorFlow, JAX or PyTorch.
Without the package it can't be loaded, since KerasHub does not know its classes.

```python
import keras_darkformer.hub  # tells Keras what the model's classes are
import keras_hub

model = keras_hub.models.{kind}.from_preset("hf://USER/MODEL")  # or kaggle://..., or a folder
{use}
```

`keras_darkformer.hub.{name}.from_preset` loads it too.

## What it is not

The model is not an estimate of softmax attention: its layers have their own kernel, fitted or
trained, so measurements of its source do not hold for it. A state of constant size can't keep
everything: what a text says only once, far back, is lost first. So measure the model on your own
texts, which it was not fitted to:

```python
from keras_darkformer import approximation_report

print(approximation_report(model, texts))  # each layer against softmax of its queries and keys
{loss}```
"""
LOSS = """
import keras

loss = keras.losses.SparseCategoricalCrossentropy(
    from_logits=True, reduction="mean_with_sample_weight")
model.compile(loss=loss)  # compile its source in the same way, to compare
model.evaluate(texts)  # nats per token; texts are cut at model.preprocessor.sequence_length
"""


def model_card(model: Any) -> str:
    """The text of a dark model's card."""
    kind = next((x for x in TASKS if isinstance(model, getattr(keras_hub.models, x))), "Backbone")
    tag, use = TASKS.get(kind, (None, NO_PREPROCESSOR))
    takes_text = getattr(model, "preprocessor", None) is not None
    return CARD.format(
        pipeline=f"pipeline_tag: {tag}\n" if tag else "",
        name=type(model).__name__,
        source=model.stock_cls.__name__,
        converted=_converted(model),
        fitted=_fitted(model.linearization),
        versions=_versions(model.linearization),
        kind=kind,
        use=use if takes_text else NO_PREPROCESSOR,
        loss=LOSS if kind == "CausalLM" and takes_text else "",
    )


def _converted(model: Any) -> str:
    report = conversion_report(model)
    backbone = getattr(model, "backbone", model)
    alike: dict[tuple[str, ...], list[int]] = {}
    for index, attention in enumerate(backbone.attention_layers):
        alike.setdefault(_layer(attention, backbone.family.causal), []).append(index)
    rows = [[_ranges(layers), *facts] for facts, layers in alike.items()]
    parts = [
        f"{len(report['converted'])} of {len(report['layers'])} layers, in a model with "
        f"{report['parameters']:,} parameters:",
        _table(["layers", "attention", "features of each key/value head", "state"], rows),
    ]
    if backbone.family.causal and backbone.options.is_linear:
        parts.append(
            f"State sizes are for one text of any length, in {backbone.compute_dtype}. "
            + _memory(backbone.options.memory)
        )
    if report["dropped"]:
        parts.append("What the converted layers no longer do:")
        parts.append(
            "\n".join(
                f"- {drop['what']}, in layers {_ranges(drop['layers'])}. {drop['why']}"
                for drop in report["dropped"]
            )
        )
    return "\n\n".join(parts)


def _layer(attention: Any, causal: bool) -> tuple[str, ...]:
    """How a layer attends, its features and its state."""
    cache = "key/value cache that grows with the text" if causal else ""
    if not isinstance(attention, FeatureAttention):
        return "exact softmax", "", cache
    feature_map = attention.feature_map
    features = FEATURES[feature_map.kind]
    if feature_map.num_features:
        features = f"{feature_map.num_features} {features}"
    if not attention.is_linear:
        return "the learned kernel, exactly", features, cache
    size = feature_map.state_shapes(dtype=attention.compute_dtype).nbytes()
    form = "linear"
    if attention.options.attention_mode == "auto":
        form += ", short texts exactly"
    return form, features, f"{size / 1024:.1f} KiB" if causal else ""


def _memory(memory: Memory) -> str:
    parts = (
        (memory.window, "the last {:,} tokens (`sliding_window`)"),
        (memory.num_sinks, "the first {:,} (`num_sinks`)"),
        (memory.cache_size, "{:,} in between that received most attention (`cache_size`)"),
    )
    kept = [text.format(size) for size, text in parts if size]
    return f"Kept exactly: {', '.join(kept)}." if kept else "No token is kept exactly."


def _fitted(record: Config | None) -> str:
    if record is None:
        return "Unknown: no record of it was saved with the model."
    record = as_json(record)
    stages = [{"name": "the source, exact", **record.get("exact", {})}, *record.get("stages", [])]
    numbers = (name for stage in stages for name, x in stage.items() if isinstance(x, int | float))
    figures = [name for name in dict.fromkeys(numbers) if name not in FACTS]
    rows = [
        [
            stage.get("name", ""),
            *(_number(stage.get(name), ".3f") for name in figures),
            _number(stage.get("tokens"), ",.0f"),
            _number(stage.get("seconds"), ",.0f"),
            {True: "yes", False: "no"}.get(stage.get("kept"), ""),
        ]
        for stage in stages
    ]
    parts = [_table(["after", *figures, "tokens", "seconds", "kept"], rows)]
    if "cosine" in figures:
        parts.append("`cosine` compares the outputs with the source's; 1 means the same.")
    if {"text", "lookups"} & {*figures}:
        parts.append(
            "Losses are in nats per token, on text held out from all fitting: of the text itself "
            "(`text`) and of segments repeated in it (`lookups`)."
        )
    for title in ("data", "options"):
        if record.get(title):
            given = {name: x for name, x in record[title].items() if x is not None}
            rows = [[f"`{name}`", str(x)] for name, x in given.items()]
            parts.append(_table([title, ""], rows))
    return "\n\n".join(parts)


def _versions(record: Config | None) -> str:
    saved = versions()
    fitted = {} if record is None else record.get("versions", {})
    rows = [[name, fitted.get(name, ""), saved.get(name, "")] for name in fitted | saved]
    if not fitted:
        return _table(["", "saved with"], [[name, version] for name, version in saved.items()])
    return _table(["", "fitted with", "saved with"], rows)


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _ranges(numbers: Iterable[int]) -> str:
    """Rising numbers in words: "0-3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{x[0]}-{x[-1]}" if len(x) > 1 else f"{x[0]}" for x in runs)


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([re.sub(r"\s+", " ", str(cell)).replace("|", r"\|") for cell in x] for x in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
