"""Rows of tokens for a model of any kind."""

from typing import Any

import keras

from keras_darkformer.hub.loading import load_text_preprocessor
from keras_darkformer.linearizing.texts import Rows, kind_of
from keras_darkformer.types import Model


def rows_of(model: Model, preset: str, texts: list[str], length: int, more: int = 0) -> Rows:
    """Turns texts into rows of tokens: joined and cut for a causal LM, in pieces for an encoder.

    Args:
        model: stock or dark.
        preset: the preset with its tokenizer.
        texts: strings.
        length: int. Tokens per row; for an encoder, about as many.
        more: int. Further tokens that need positions after a row.

    Raises:
        ValueError: if there is too little text, or the model has no positions for so many tokens.
    """
    most = getattr(getattr(model, "backbone", model), "max_sequence_length", None)
    if most is not None and length + more > most:
        raise ValueError(f"The model takes {most} tokens at most. Received: {length + more}")
    kind = kind_of(model, length)
    if kind.distils:
        return kind.rows(model, texts)
    preprocessor = load_text_preprocessor(preset, length)
    found = preprocessor([x for text in texts for x in _pieces(preprocessor, text, length)])
    return keras.tree.map_structure(keras.ops.convert_to_numpy, found)


def _pieces(preprocessor: Any, text: str, length: int) -> list[str]:
    """Runs of words that make about `length` tokens each, with two special tokens around them."""
    words = text.split()
    tokens = max(1, len(preprocessor.tokenizer(text)))
    size = max(1, len(words) * (length - 2) // tokens)
    starts = range(0, max(1, len(words) - size + 1), size)
    return [" ".join(words[start : start + size]) for start in starts]
