"""Losses of a model that predicts tokens, on text and on lookups made from it."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_darkformer.ops.backend import no_gradients
from keras_darkformer.training.data import batches
from keras_darkformer.training.distil import TeacherTargets
from keras_darkformer.training.distillation_loss import DistillationLoss
from keras_darkformer.training.positions import Parts, over_positions
from keras_darkformer.types import Data, Model, Tensor


def inputs_of(token_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of real tokens as a KerasHub model takes them."""
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


def full_rows(
    model: Model, data: Data, batch_size: int, length: int, count: int | None = None
) -> np.ndarray:
    """Rows of `length` real tokens from data, `(rows, length)`; at most `count` of them.

    Raises:
        ValueError: if there is none.
    """
    rows: list[np.ndarray] = []
    for inputs in batches(model, data, batch_size):
        token_ids = np.asarray(inputs["token_ids"], "int32")
        mask = np.asarray(inputs.get("padding_mask", np.ones_like(token_ids))) != 0
        for row, real in zip(token_ids, mask, strict=True):
            tokens = row[real]
            rows += [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        if count is not None and len(rows) >= count:
            break
    if not rows:
        raise ValueError(
            f"`data` must have rows of at least `length={length}` tokens. Received: shorter ones"
        )
    return np.stack(rows[:count])


def with_repeats(text: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Rows that end in a copy of a segment from their first third."""
    rows = text.copy()
    for row in rows:
        start = rng.integers(0, max(1, len(row) // 3 - size // 2))
        row[-size:] = row[start : start + size]
    return rows


def with_segments_again(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows in which a segment, of 4 tokens to a quarter of the row, is repeated further on."""
    rows = text.copy()
    length = rows.shape[1]
    for row in rows:
        size = int(2 ** rng.uniform(2, np.log2(max(4, length // 4))))
        if length <= 2 * size:
            continue
        start = rng.integers(1, length - 2 * size + 1)
        again = rng.integers(start + size, length - size + 1)
        row[again : again + size] = row[start : start + size]
    return rows


def token_loss(parts: Parts, token_ids: np.ndarray, first: int) -> float:
    """Mean loss of the tokens from number `first` on, in nats."""
    return token_losses(parts, token_ids, first)[0]


def token_losses(
    parts: Parts, token_ids: np.ndarray, first: int, source: TeacherTargets | None = None
) -> tuple[float, float]:
    """Like `token_loss`, with the mean divergence from a source's predictions of these tokens."""
    distance = DistillationLoss()
    known = {"tokens": ops.convert_to_tensor(token_ids[:, first:])}
    if source is not None:
        of_source = {name: x for name, x in source._asdict().items() if x is not None}
        known |= {
            name: ops.convert_to_tensor(x[:, first - 1 : -1]) for name, x in of_source.items()
        }

    def losses(hidden: Tensor, known: dict[str, Tensor]) -> Tensor:
        logits = ops.cast(parts.logits(hidden), "float32")
        tokens = known["tokens"]
        loss = keras.losses.sparse_categorical_crossentropy(tokens, logits, from_logits=True)
        if source is None:
            return ops.stack([loss, ops.zeros_like(loss)], axis=-1)
        return ops.stack([loss, distance.divergence(known, logits)], axis=-1)

    with no_gradients():
        hidden: Any = parts.hidden(inputs_of(token_ids), training=False)[:, first - 1 : -1]
        means = ops.mean(over_positions(losses, hidden, known), axis=(0, 1))
    loss, divergence = ops.convert_to_numpy(means)
    return float(loss), float(divergence)
