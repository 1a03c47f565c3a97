"""States of attention calls: compared, taken apart, and made piece by piece."""

import keras
import numpy as np
from backends import DEFAULT_JIT, compiled, to_numpy
from keras import ops, tree

from keras_darkformer.ops import MemoryState, initial_state
from keras_darkformer.ops.reference import dark_state_reference

from .cases import assert_close


def empty_state(case):
    """The state before the first token of the case."""
    value_dim = case.value_dim or case.head_dim
    sizes = case.batch, case.heads[1], case.num_features, value_dim
    return initial_state(*sizes, sliding_window=case.window, head_dim=case.head_dim)


def tensors_of(state):
    """The state as backend tensors."""
    return tree.map_structure(ops.convert_to_tensor, state)


def row_of(state, row):
    """The state of one row, in a batch of its own."""
    return tree.map_structure(lambda x: x[row : row + 1], state)


def unscaled(state, log_scale=0.0):
    """The sums themselves times `exp(-log_scale)`, then the memory's tokens, in float64."""
    sums, *parts = state if isinstance(state, MemoryState) else (state,)
    found = []
    if sums:
        kv_state, key_state, own = (np.asarray(x, "float64") for x in sums)
        scale = np.exp(own - log_scale)[..., None]
        found = [kv_state * scale[..., None], key_state * scale]
    for tokens in filter(None, parts):
        key, value, received = (np.asarray(x, "float64") for x in tokens)
        real = received[..., None] >= 0
        found += [np.where(real, key, 0), np.where(real, value, 0), received]
    return found


def assert_same_state(actual, expected, tolerance=1e-4):
    """The sums are the same, whatever their scales, and so is the window."""
    assert type(actual) is type(expected)
    sums = expected.sums if isinstance(expected, MemoryState) else expected
    log_scale = sums.log_scale.astype("float64") if sums else 0.0
    pairs = zip(unscaled(actual, log_scale), unscaled(expected, log_scale), strict=True)
    for x, y in pairs:
        assert_close(x, y, tolerance)


def assert_equal_states(actual, expected):
    """The same to the last bit."""
    assert type(actual) is type(expected)
    for x, y in zip(tree.flatten(actual), tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(x, y)


def window_reference(key, value, written, size):
    """Which keys have left the window by the last that a row has written, and the window.

    Args:
        written: bool, `(b, s)`.
        size: W.

    Returns:
        A bool mask `(b, s)`, and the window's keys, values and `received`, by head.
    """
    index = np.arange(written.shape[1])
    count = np.max(np.where(written, index + 1, 0), axis=1)
    left = written & (index < count[:, None] - size)
    recent = []
    for x in (key, value, np.ones(written.shape)):
        x = np.where(written.reshape(*written.shape, *[1] * (x.ndim - 2)), x, 0.0)
        x = np.concatenate([np.zeros((len(x), size, *x.shape[2:])), x], axis=1)
        recent.append(np.stack([row[n : n + size] for row, n in zip(x, count, strict=True)]))
    key, value, real = (np.swapaxes(x, 1, 2) if x.ndim > 2 else x for x in recent)
    received = np.repeat(np.where(real, 0.0, -1.0)[:, None], key.shape[1], axis=1)
    return left, (key, value, received)


def assert_state_is_of(state, case, written=None, arrays=None):
    """The state holds these keys of a case of `dark_attention`: `written`, or those not masked."""
    _, key, value, geometry = arrays or case.arrays
    if written is None:
        written = np.ones(key.shape[:2], bool) if case.key_mask is None else case.key_mask
    recent = []
    if case.window is not None:
        written, recent = window_reference(key, value, written, case.window)
    left_out = ("causal", "key_mask", "sliding_window", "far_offset")
    options = {name: x for name, x in case.options.items() if name not in left_out}
    sums = dark_state_reference(key, value, geometry, **options, key_mask=written)
    actual_sums, actual_recent = (unscaled(state)[part] for part in (slice(2), slice(2, None)))
    for actual, expected in zip(actual_sums, sums, strict=True):
        assert_close(actual, expected)
    for actual, expected in zip(actual_recent, recent, strict=True):
        np.testing.assert_array_equal(actual, expected)


def mask_for_pieces(batch, sizes):
    """Random, and no piece ends with a masked key: in a window those would not count as tokens."""
    key_mask = np.random.default_rng(3).random((batch, sum(sizes))) < 0.7
    key_mask[:, np.cumsum(sizes) - 1] = True
    return key_mask


def in_pieces(step, state, tokens, key_mask, sizes):
    """Outputs of the pieces side by side, and the last state.

    Args:
        step: `(query, key, value, key_mask, state) -> (output, state)`.
        state: before the first piece.
        tokens: query, key and value of the whole.
        key_mask: of the whole, or `None`.
        sizes: the pieces' lengths.
    """
    assert sum(sizes) == tokens[0].shape[1]
    step = compiled(step) if DEFAULT_JIT else step
    outputs, shapes = [], [tuple(x.shape) for x in tree.flatten(state)]
    for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
        piece = slice(stop - size, stop)
        query, key, value, mask = (
            None if x is None else ops.convert_to_tensor(x[:, piece]) for x in (*tokens, key_mask)
        )
        output, after = step(query, key, value, mask, state)
        assert type(after) is type(state)
        state = after
        outputs.append(to_numpy(output))
        assert [tuple(x.shape) for x in tree.flatten(state)] == shapes
        assert {keras.backend.standardize_dtype(x.dtype) for x in tree.flatten(state)} == {
            "float32"
        }
    return np.concatenate(outputs, axis=1), to_numpy(state)
