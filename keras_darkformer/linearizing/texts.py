"""How a pipeline turns texts into rows, and judges models of each kind."""

import abc
from collections.abc import Iterable
from typing import Any

import numpy as np
from keras import ops

from keras_darkformer.hub.backbone import DarkBackbone
from keras_darkformer.hub.causal_lm import DarkTask
from keras_darkformer.hub.conversion import dark_class
from keras_darkformer.training.data import batches, look, texts_of
from keras_darkformer.training.distil import TeacherTargets, teacher_targets
from keras_darkformer.training.held_out import (
    full_rows,
    inputs_of,
    token_losses,
    with_repeats,
    with_segments_again,
)
from keras_darkformer.training.positions import Parts
from keras_darkformer.types import Data, Model

Rows = dict[str, np.ndarray]
Figures = dict[str, float]

PIECE = 20_000  # characters tokenized at a time
JUDGED = 8  # rows
TOP_K = 64


def kind_of(model: Model, length: int) -> "Kind":
    """The kind of a model, stock or dark.

    Raises:
        ValueError: if the model is neither dark nor convertible, with the reason.
    """
    dark = type(model) if isinstance(model, DarkBackbone | DarkTask) else dark_class(type(model))
    family = getattr(dark, "backbone_cls", dark).family
    return Decoder(length) if family.causal else Encoder(length)


class Kind(abc.ABC):
    """A kind of model: its rows, its figures, and the stages it goes through.

    Args:
        length: int. Tokens per row.
    """

    distils = False

    def __init__(self, length: int) -> None:
        self.length = length

    @abc.abstractmethod
    def rows(self, model: Model, data: Data) -> Rows:
        """All of the data, as arrays of rows."""

    def to_learn(self, rows: Rows, rng: np.random.Generator) -> Rows:
        """Turns rows into those that a fit reads."""
        return rows

    @abc.abstractmethod
    def look(self, model: Model, held_out: Rows) -> None:
        """Keeps the rows, and the model's outputs for them before the conversion."""

    @abc.abstractmethod
    def judge(self, model: Model) -> Figures:
        """The figures of a model on the rows that are kept."""

    @abc.abstractmethod
    def cost(self, figures: Figures) -> float:
        """The number that should fall."""


class Decoder(Kind):
    """A causal LM, judged by its losses and its divergence from the source, in nats per token.

    Losses are of text and of segments repeated in it.
    """

    distils = True

    def rows(self, model: Model, data: Data) -> Rows:
        """Joins texts and cuts them into rows of `length` tokens; cuts rows of other data."""
        if (texts := texts_of(data)) is None:
            return inputs_of(full_rows(model, data, 8, self.length))
        preprocessor = getattr(model, "preprocessor", None)
        if preprocessor is None:
            raise ValueError(
                "`data` holds text, which needs a model with a preprocessor. Received: "
                f"{type(model).__name__} without one"
            )
        tokenizer = preprocessor.tokenizer
        start = getattr(tokenizer, "start_token_id", None)
        first = [start] if getattr(preprocessor, "add_start_token", False) else []
        first = [token for token in first if token is not None]
        tokens = np.concatenate([_token_ids(tokenizer, text) for text in texts])
        size = self.length - len(first)
        count = len(tokens) // size
        if not count:
            raise ValueError(
                f"`data` must have at least `length={self.length}` tokens. Received: {len(tokens)}"
            )
        rows = tokens[: count * size].reshape(count, size)
        starts = np.tile(np.array(first, "int32"), (count, 1)).reshape(count, len(first))
        return inputs_of(np.concatenate([starts, rows], axis=1))

    def to_learn(self, rows: Rows, rng: np.random.Generator) -> Rows:
        """Repeats a segment in each row: text alone needs lookups too seldom."""
        return inputs_of(with_segments_again(rows["token_ids"], rng))

    def look(self, model: Model, held_out: Rows) -> None:
        """Keeps texts, lookups made from them, and what the model predicts of both."""
        text = held_out["token_ids"][:JUDGED]
        repeat = max(2, self.length // 8)
        # Rows, and the first of their tokens whose loss counts.
        lookups = with_repeats(text, repeat, np.random.default_rng(0))
        self.judged = {"text": (text, 1), "lookups": (lookups, self.length - repeat + 1)}
        self.exact = {
            name: [*teacher_targets(model, inputs_of(rows), top_k=TOP_K, batch_size=1)]
            for name, (rows, _) in self.judged.items()
        }

    def judge(self, model: Model) -> Figures:
        """The losses of `text` and of `lookups`, and the `divergence` from the source in both."""
        parts, found, divergences = Parts(model), {}, []
        for name, (rows, first) in self.judged.items():
            losses = []
            for row, targets in zip(rows, self.exact[name], strict=True):
                loss, divergence = token_losses(parts, row[None], first, targets)
                losses.append(loss)
                divergences.append(divergence / len(rows) / len(self.judged))
            found[name] = float(np.mean(losses))
        return found | {"divergence": float(np.sum(divergences))}

    def known(self, count: int) -> tuple[list[Rows], list[TeacherTargets]]:
        """Rows of text and of lookups in turn, one per batch, and the source's predictions."""
        found = [
            (inputs_of(rows[i][None]), self.exact[name][i])
            for i in range(count)
            for name, (rows, _) in self.judged.items()
            if i < len(rows)
        ]
        rows, targets = zip(*found[:count], strict=True)
        return [*rows], [*targets]

    def cost(self, figures: Figures) -> float:
        """The divergence: a model may have lower losses than its source and have forgotten more."""
        return figures["divergence"]


class Encoder(Kind):
    """A model without a causal mask, judged by how similar its outputs are to the source's."""

    def rows(self, model: Model, data: Data) -> Rows:
        """The preprocessor's row for each text, or the rows of arrays."""
        found = list(batches(model, data, 8))
        names = set.intersection(*({*inputs} for inputs in found))
        return {name: np.concatenate([inputs[name] for inputs in found]) for name in names}

    def look(self, model: Model, held_out: Rows) -> None:
        """Keeps the rows and their embeddings."""
        self.judged = held_out
        self.exact = _pooled(model, held_out)

    def judge(self, model: Model) -> Figures:
        """The mean cosine to the source's embeddings, which are means over the tokens of a row."""
        found = _pooled(model, self.judged)
        return {"cosine": float(np.mean(np.sum(found * self.exact, axis=-1)))}

    def cost(self, figures: Figures) -> float:
        """The distance between embeddings."""
        return 1.0 - figures["cosine"]


def _token_ids(tokenizer: Any, text: str) -> np.ndarray:
    pieces: Iterable[str] = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
    found = [np.asarray(ops.convert_to_numpy(tokenizer(piece)), "int32") for piece in pieces]
    return np.concatenate(found) if found else np.zeros(0, "int32")


def _pooled(model: Model, rows: Rows) -> np.ndarray:
    backbone: Model = getattr(model, "backbone", model)
    found = []
    for start in range(0, min(JUDGED * 4, len(rows["token_ids"])), JUDGED):
        inputs = {name: rows[name][start : start + JUDGED] for name in backbone.input}
        outputs = look(backbone, inputs)
        if isinstance(outputs, dict):
            outputs = outputs["sequence_output"]
        outputs = np.asarray(ops.convert_to_numpy(ops.cast(outputs, "float32")), "float64")
        mask = inputs.get("padding_mask", np.ones(outputs.shape[:2]))[..., None]
        pooled = (outputs * mask).sum(axis=1)
        found.append(pooled / np.maximum(np.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12))
    return np.concatenate(found)
