"""What is no float tensor: NumPy's other arrays, lists, and the backends' own variables."""

import keras
import numpy as np
import pytest
from backends import BACKEND, to_numpy
from keras import ops

from keras_darkformer.ops import (
    apply_geometry,
    dark_attention,
    dark_features,
    draw_projection,
    exact_dark_attention,
    exact_dark_attention_scores,
    rotary_embedding,
)


def variable(x):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.Variable(x)
    if BACKEND == "torch":
        import torch

        return torch.nn.Parameter(torch.tensor(x), requires_grad=x.dtype.kind == "f")
    return ops.convert_to_tensor(x)


KINDS = {
    **{kind: lambda x, kind=kind: x.astype(kind) for kind in ("int64", "int8", "bool", "float16")},
    "list": lambda x: x.tolist(),
    "variable": lambda x: variable(x.astype("float32")),
    "variable of integers": lambda x: variable(x.astype("int32")),
    "keras variable": lambda x: keras.Variable(x.astype("float32")),
}
RNG = np.random.default_rng(0)
# Small integers: all kinds can hold them.
QUERY, KEY, VALUE = (RNG.integers(0, 2, (2, 5, n, 4)) for n in (4, 2, 2))
GEOMETRY, PROJECTION = RNG.integers(0, 2, (2, 4, 4)), np.round(draw_projection(6, 4, seed=0))
MASK = RNG.integers(0, 2, (2, 5))
MASK[:, 0] = 1
OPERATIONS = {
    "causal": lambda to: dark_attention(
        *map(to, (QUERY, KEY, VALUE, GEOMETRY)), PROJECTION, causal=True, key_mask=to(MASK)
    ),
    "memory": lambda to: dark_attention(
        *map(to, (QUERY, KEY, VALUE, GEOMETRY)),
        PROJECTION,
        causal=True,
        sliding_window=2,
        far_offset=to(np.array([0, 1, 1, 0])),
    ),
    "bidirectional": lambda to: dark_attention(
        *map(to, (QUERY, KEY, VALUE, GEOMETRY, PROJECTION > 0)), log_weight=to(np.eye(2, 6))
    ),
    "exact": lambda to: exact_dark_attention(
        *map(to, (QUERY, KEY, VALUE, GEOMETRY)), key_mask=to(MASK)
    ),
    "scores": lambda to: exact_dark_attention_scores(
        *map(to, (QUERY, KEY, GEOMETRY)), key_mask=to(MASK)
    ),
    "features": lambda to: dark_features(*map(to, (KEY, GEOMETRY, PROJECTION > 0))),
    "geometry": lambda to: apply_geometry(*map(to, (QUERY, GEOMETRY))),
    "rotation": lambda to: rotary_embedding(*map(to, (QUERY, np.array([0, 1, 1, 0, 1])))),
}
# JAX takes its time to compile the others.
TRIED = ("bidirectional", "exact", "rotation") if BACKEND == "jax" else tuple(OPERATIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_kind_mean_what_they_are(kind):
    for name in TRIED:
        operation = OPERATIONS[name]
        expected = to_numpy(operation(lambda x: x.astype("float32")))
        found = operation(KINDS[kind])
        dtype = keras.backend.standardize_dtype(found.dtype)
        halves = kind == "float16" and name not in ("scores", "features", "geometry")
        assert dtype == ("float16" if halves else "float32"), name
        error = np.abs(to_numpy(found) - expected).max()
        assert error <= (1e-2 if kind == "float16" else 1e-5) * np.abs(expected).max(), name
