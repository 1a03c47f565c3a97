"""Texts as a pipeline works with them, and what a model of each kind is judged by."""

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

PIECE = 20_000  # characters that are tokenized at a time
JUDGED = 8  # rows
TOP_K = 64


def kind_of(model: Model, length: int) -> "Kind":
    """How a model, stock or dark, is dealt with.

    Raises:
        ValueError: if it is neither, with the reason.
    """
    dark = type(model) if isinstance(model, DarkBackbone | DarkTask) else dark_class(type(model))
    family = getattr(dark, "backbone_cls", dark).family
    return Decoder(length) if family.causal else Encoder(length)


class Kind(abc.ABC):
    """One kind of model: its rows, its figures, and what of the pipeline it goes through.

    Args:
        length: tokens a row.
    """

    distils = False

    def __init__(self, length: int) -> None:
        self.length = length

    @abc.abstractmethod
    def rows(self, model: Model, data: Data) -> Rows:
        """All of the data as arrays of one row each."""

    def to_learn(self, rows: Rows, rng: np.random.Generator) -> Rows:
        """Rows as a fit reads them."""
        return rows

    @abc.abstractmethod
    def look(self, model: Model, held_out: Rows) -> None:
        """Keeps the rows, and what the model makes of them before it is converted."""

    @abc.abstractmethod
    def judge(self, model: Model) -> Figures:
        """What a model makes of the rows that are kept."""

    @abc.abstractmethod
    def cost(self, figures: Figures) -> float:
        """What is to fall."""


class Decoder(Kind):
    """A causal LM: its losses per token, in nats, of text and of a segment that comes again, and
    how far its predictions are from the source's."""

    distils = True

    def rows(self, model: Model, data: Data) -> Rows:
        """Texts are put together and cut into rows of `length` tokens; other data likewise."""
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
        """With something to look up in each: text alone asks for it too seldom."""
        return inputs_of(with_segments_again(rows["token_ids"], rng))

    def look(self, model: Model, held_out: Rows) -> None:
        """Keeps texts, lookups made from them, and what the model predicts of both."""
        text = held_out["token_ids"][:JUDGED]
        repeat = max(2, self.length // 8)
        # Rows, and the first token of them whose loss counts.
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
        """Rows of texts and of lookups in turn, one a batch, and what the source predicts."""
        found = [
            (inputs_of(rows[i][None]), self.exact[name][i])
            for i in range(count)
            for name, (rows, _) in self.judged.items()
            if i < len(rows)
        ]
        rows, targets = zip(*found[:count], strict=True)
        return [*rows], [*targets]

    def cost(self, figures: Figures) -> float:
        """The divergence: a model may lose less than its source and have forgotten more."""
        return figures["divergence"]


class Encoder(Kind):
    """A model without a causal mask: how like its outputs are to what they were."""

    def rows(self, model: Model, data: Data) -> Rows:
        """What the preprocessor makes of each text, or the rows of arrays."""
        found = list(batches(model, data, 8))
        names = set.intersection(*({*inputs} for inputs in found))
        return {name: np.concatenate([inputs[name] for inputs in found]) for name in names}

    def look(self, model: Model, held_out: Rows) -> None:
        """Keeps the rows and their embeddings."""
        self.judged = held_out
        self.exact = _pooled(model, held_out)

    def judge(self, model: Model) -> Figures:
        """The mean cosine of embeddings, means over the tokens of a row, to the exact model's."""
        found = _pooled(model, self.judged)
        return {"cosine": float(np.mean(np.sum(found * self.exact, axis=-1)))}

    def cost(self, figures: Figures) -> float:
        """The distance."""
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
