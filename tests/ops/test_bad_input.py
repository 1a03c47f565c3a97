"""Errors name the argument to blame."""

import numpy as np
import pytest
from backends import run

from keras_darkformer.ops import (
    dark_attention,
    exact_dark_attention,
    initial_state,
)

SHAPES = {
    "query": (2, 6, 4, 8),
    "key": (2, 6, 2, 8),
    "value": (2, 6, 2, 5),
    "geometry": (2, 7, 8),
    "projection": (2, 16, 7),
}
EXACT = ("query", "key", "value", "geometry")


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


def call(function, names, **changes):
    arguments = {name: zeros(*SHAPES[name]) for name in names}
    return function(**arguments | changes)


# Wrong for every function that takes these arguments.
BAD_TENSORS = [
    ({"key": zeros(6, 2, 8)}, "`key` must have shape"),
    ({"query": zeros(6, 4, 8)}, "`query` must have shape"),
    ({"value": zeros(2, 6, 5)}, "`value` must have shape"),
    ({"geometry": zeros(7, 8)}, "`geometry` must have shape"),
    ({"query": zeros(2, 6, 4, 9)}, "`query` and `key` must have the same head_dim"),
    ({"query": zeros(2, 6, 3, 8)}, "heads of `query` must be a multiple"),
    ({"value": zeros(2, 5, 2, 5)}, "`value` must have the length"),
    ({"value": zeros(2, 6, 4, 5)}, "`value` must have the length and the heads"),
    ({"geometry": zeros(1, 7, 8)}, "`geometry` must have shape"),
    ({"geometry": zeros(2, 7, 9)}, "`geometry` must have shape"),
    ({"query": zeros(2, 5, 4, 8), "causal": True}, "`query` and `key` must have the same length"),
    ({"key_mask": zeros(2, 5, dtype="bool")}, "`key_mask` must have shape"),
    ({"key_mask": zeros(3, 6, dtype="bool")}, "`key_mask` must have shape"),
    ({"key_mask": zeros(2, 1, 1, 6, dtype="bool")}, "`key_mask` must have shape"),
]
SUMS = (zeros(2, 2, 16, 5), zeros(2, 2, 16), zeros(2, 2))
BAD_FEATURES = [
    ({"projection": zeros(16)}, "`projection` must have shape"),
    ({"projection": zeros(16, 8)}, "`projection` must have shape"),
    ({"projection": zeros(3, 16, 7)}, "`projection` must have shape"),
    ({"log_weight": zeros(16)}, "`log_weight` must have shape"),
    ({"log_weight": zeros(2, 15)}, "`log_weight` must have shape"),
    ({"query_geometry": zeros(7, 8)}, "`query_geometry` must have shape"),
    ({"query_geometry": zeros(1, 7, 8)}, "`query_geometry` must have shape"),
    ({"query_geometry": zeros(2, 6, 8)}, "`query_geometry` must have the rank of `geometry`, 7"),
    ({"query_shift": zeros(8)}, "`query_shift` must have shape"),
    ({"query_shift": zeros(2, 7)}, "`query_shift` must have shape"),
    ({"key_shift": zeros(4, 8)}, "`key_shift` must have shape"),
    ({"sliding_window": 0, "causal": True}, "`sliding_window` must be a positive integer"),
    ({"sliding_window": 2.0, "causal": True}, "`sliding_window` must be a positive integer"),
    (
        {"sliding_window": 3, "causal": True, "initial_state": SUMS},
        r"`initial_state` must be .*\(2, 2, 3, 8\), \(2, 2, 3, 5\), \(2, 2, 3\)",
    ),
    (
        {"initial_state": (zeros(2, 2, 16, 4), zeros(2, 2, 16), zeros(2, 2))},
        "`initial_state` must be",
    ),
    ({"initial_state": (zeros(2, 2, 16, 5), zeros(2, 2, 16))}, "`initial_state` must be"),
    (
        {
            "causal": True,
            "initial_state": (SUMS, (zeros(2, 3, 2, 8), zeros(2, 3, 2, 5), zeros(2, 3))),
        },
        "`initial_state` must be",
    ),
]
BAD_WRITES = [
    ({"write_mask": zeros(2, 6, dtype="bool")}, "`write_mask` needs `causal=True`"),
    ({"write_mask": zeros(2, 5, dtype="bool"), "causal": True}, "`write_mask` must have shape"),
    ({"write_mask": zeros(3, 6, dtype="bool"), "causal": True}, "`write_mask` must have shape"),
    ({"write_mask": zeros(6, dtype="bool"), "causal": True}, "`write_mask` must have shape"),
]
BAD_OPTIONS = [
    ({"chunk_size": 0}, "`chunk_size` must be a positive integer"),
    ({"chunk_size": 64.0}, "`chunk_size` must be a positive integer"),
    ({"sliding_window": 3}, "`sliding_window` and `num_sinks` need `causal=True`"),
    ({"far_offset": zeros(4)}, "`far_offset` needs a `sliding_window`"),
    (
        {"sliding_window": 3, "causal": True, "far_offset": zeros(2)},
        r"`far_offset` must have shape \(num_query_heads,\) = \(4,\)",
    ),
]


def test_the_arguments_that_are_changed_here_are_right_unchanged():
    assert run(lambda: call(dark_attention, SHAPES)).shape == (2, 6, 4, 5)
    assert run(lambda: call(exact_dark_attention, EXACT)).shape == (2, 6, 4, 5)
    masks = {"key_mask": zeros(2, 6), "write_mask": zeros(2, 6)}
    options = {"causal": True, "initial_state": SUMS, "return_state": True}
    _, state = run(lambda: call(dark_attention, SHAPES, **masks, **options))
    assert state.kv_state.shape == (2, 2, 16, 5)


def bad_inputs(*cases):
    return pytest.mark.parametrize(
        ("changes", "message"), cases, ids=lambda x: "+".join(x) if isinstance(x, dict) else None
    )


@bad_inputs(*BAD_TENSORS, *BAD_FEATURES, *BAD_WRITES, *BAD_OPTIONS)
def test_dark_attention_names_the_argument_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        call(dark_attention, SHAPES, **changes)


@bad_inputs(*BAD_TENSORS)
def test_exact_attention_names_the_argument_that_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        call(exact_dark_attention, EXACT, **changes)


def test_state_with_a_window_needs_to_know_the_size_of_keys():
    with pytest.raises(ValueError, match="needs a `head_dim`"):
        initial_state(2, 2, 16, 5, sliding_window=3)
