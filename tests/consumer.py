"""A program of a user with a type checker: what it may do, and what it is told.

`tests/packaging.sh` has mypy read it beside the installed package. A comment that ignores an error
which is none is an error itself, so the package's types have to be seen.
"""

import numpy as np

import keras_darkformer
from keras_darkformer import AttentionOptions, DarkAttention, calibrate, convert_to_dark, ops


def convert(model: object) -> None:
    """Types of a conversion and what follows it."""
    dark = convert_to_dark(model, num_features=64)
    calibrate(dark, ["text"], method="spectral", max_tokens=1024)
    calibrate(dark, ["text"], method=3)  # type: ignore[arg-type]
    keras_darkformer.transfer_attention(dark, ["text"], stepz=3)  # type: ignore[call-arg]


def attend(layer: DarkAttention) -> int:
    """Types of a layer and of an operation."""
    options = AttentionOptions(num_features=64, num_sinks=4)
    AttentionOptions(num_sinks="four")  # type: ignore[arg-type]
    projection = ops.draw_projection(16, 8, seed=0)
    count: int = options.num_sinks
    wrong: str = options.num_sinks  # type: ignore[assignment]
    print(np.shape(projection), layer.num_query_heads, wrong, keras_darkformer.__version__)
    return count
