"""No rows, no keys or no queries: an empty answer, as stock attention gives, and no error."""

import numpy as np
import pytest
from backends import BACKEND, DEFAULT_JIT, differentiated, run, to_numpy
from keras import ops, tree

from keras_darkformer.memory import NO_MEMORY, Memory
from keras_darkformer.ops import dark_attention, exact_dark_attention, exact_dark_attention_scores
from keras_darkformer.ops.state import StateShapes

from .cases import Case, assert_close, reference
from .states import assert_equal_states, assert_same_state, in_pieces

BATCH, HEADS, HEAD_DIM, VALUE_DIM, FEATURES = 2, (4, 2), 8, 6, 16
KEPT = Memory(3, 2, 2)
ROWS_WITHOUT = {"no rows": (0, 5, 5), "no rows, one key": (0, 3, 1), "no rows of one": (0, 1, 1)}
TOKENS_WITHOUT = {"no keys": (2, 3, 0), "no queries": (2, 0, 4), "neither": (2, 0, 0)}
SIZES = {**ROWS_WITHOUT, **TOKENS_WITHOUT, "nothing": (0, 0, 0)}
sizes = pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)


def arrays_of(batch, queries, keys, heads=HEADS, seed=0):
    """Query, key, value, geometry and projection."""
    case = Case(
        length=max(1, queries),
        key_length=max(1, keys),
        batch=max(1, batch),
        heads=heads,
        value_dim=VALUE_DIM,
        num_features=FEATURES,
    )
    query, key, value, geometry = case.arrays
    tokens = query[:batch, :queries], key[:batch, :keys], value[:batch, :keys]
    return *tokens, geometry, case.options["projection"]


def random_state(memory, batch, features=FEATURES):
    """A state as if some keys had been seen."""
    rng = np.random.default_rng(1)
    shapes = StateShapes(HEADS[1], features, VALUE_DIM, HEAD_DIM, memory)
    return tree.map_structure(
        lambda x: np.abs(rng.standard_normal(tuple(x.shape))).astype("float32"),
        shapes.zeros(batch),
    )


def attend_with_gradients(arrays, **options):
    """Output, state and gradients of the sum of squares."""
    state = options.pop("initial_state", None)

    def scalar(*tensors):
        tensors, state = tensors[: len(arrays)], tensors[len(arrays) :]
        given = tree.pack_sequence_as(structure, list(state)) if state else None
        padded = (*tensors, None, None)[:5]
        output, after = dark_attention(*padded, **options, initial_state=given, return_state=True)
        return ops.sum(output**2), (output, after)

    structure = state
    leaves = [] if state is None else tree.flatten(state)
    (_, (output, after)), gradients = run(
        differentiated(scalar, has_aux=True), *arrays, *leaves, jit=DEFAULT_JIT
    )
    return output, after, gradients[: len(arrays)]


@sizes
@pytest.mark.parametrize("memory", [NO_MEMORY, KEPT, Memory(None, 2)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_what_is_empty_gives_what_is_empty_and_the_state_as_it_was(shape, memory, causal):
    batch, queries, keys = shape
    if (memory and not causal) or (causal and queries != keys):
        return
    arrays, state = arrays_of(*shape), random_state(memory, batch)
    masks = {"key_mask": np.ones((batch, keys), bool)}
    if causal:
        masks["write_mask"] = np.ones((batch, keys), bool)
    for given in ({}, masks):
        options = memory._asdict() | {"causal": causal, "initial_state": state} | given
        output, after, gradients = attend_with_gradients(arrays, **options)
        assert output.shape == (batch, queries, HEADS[0], VALUE_DIM)
        shapes = [x.shape for x in tree.flatten(state)]
        assert [x.shape for x in tree.flatten(after)] == shapes
        for gradient, array in zip(gradients, arrays, strict=True):
            assert gradient.shape == array.shape
            assert np.isfinite(gradient).all()


def test_queries_without_keys_get_zeros_and_read_what_a_state_has():
    empty = arrays_of(2, 3, 0)
    output, after, gradients = attend_with_gradients(empty)
    assert not output.any()
    assert not any(gradient.any() for gradient in gradients)
    case = Case(length=7, batch=2, value_dim=VALUE_DIM, heads=HEADS)
    query, key, value, geometry = case.arrays
    projection = case.options["projection"]
    _, state, _ = attend_with_gradients((query, key, value, geometry, projection))
    output, after, _ = attend_with_gradients(
        (query, key[:, :0], value[:, :0], geometry, projection), initial_state=state
    )
    assert_close(output, reference(case)[0])
    assert_equal_states(after, state)


@pytest.mark.parametrize("memory", [NO_MEMORY, KEPT], ids=str)
def test_an_empty_piece_between_others_changes_nothing(memory):
    arrays = arrays_of(2, 9, 9)
    weights = [ops.convert_to_tensor(x) for x in arrays[3:]]
    options = memory._asdict() | {"causal": True, "return_state": True}

    def step(query, key, value, mask, state):
        return dark_attention(query, key, value, *weights, **options, initial_state=state)

    empty = StateShapes(HEADS[1], FEATURES, VALUE_DIM, HEAD_DIM, memory).zeros(2)
    expected, state = in_pieces(step, empty, arrays[:3], None, [6, 3])
    output, after = in_pieces(step, empty, arrays[:3], None, [0, 6, 0, 3, 0])
    assert_close(output, expected)
    assert_same_state(after, state)


@sizes
def test_exact_attention_takes_what_is_empty(shape):
    batch, queries, keys = shape
    query, key, value, geometry, _ = arrays_of(*shape)
    masks = [{}, {"key_mask": np.ones((batch, keys), bool)}]
    masks += [{"causal": True}] if queries == keys else []
    for options in masks:
        output = to_numpy(exact_dark_attention(query, key, value, geometry, **options))
        assert output.shape == (batch, queries, HEADS[0], VALUE_DIM)
        assert not output.any() or keys
        scores = to_numpy(exact_dark_attention_scores(query, key, geometry, **options))
        assert scores.shape == (batch, HEADS[0], queries, keys)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the others know all sizes beforehand")
@pytest.mark.parametrize(
    ("memory", "causal", "jit"),
    [
        pytest.param(NO_MEMORY, False, False, id="graph"),
        pytest.param(NO_MEMORY, True, True, id="causal, jit"),
        pytest.param(KEPT, True, True, id="memory, jit", marks=pytest.mark.slow),
    ],
)
def test_what_is_empty_only_in_the_run_is_empty_too(memory, causal, jit):
    import tensorflow as tf

    arrays = arrays_of(2, 5, 5)
    weights = arrays[3:]
    signature = [tf.TensorSpec((None, None, *x.shape[2:]), x.dtype) for x in arrays[:3]]

    def scalar(*tokens):
        output, state = dark_attention(
            *tokens, *weights, causal=causal, return_state=True, **memory._asdict()
        )
        return tf.reduce_sum(output**2), (output, state)

    function = tf.function(
        differentiated(scalar, has_aux=True), input_signature=signature, jit_compile=jit or None
    )
    for shape in ((2, 5, 5), (0, 5, 5), (2, 0, 0), (0, 0, 0)):
        tokens = arrays_of(*shape)[:3]
        (_, (output, _)), gradients = to_numpy(function(*tokens))
        assert output.shape == (*shape[:2], HEADS[0], VALUE_DIM)
        assert [x.shape for x in gradients] == [x.shape for x in tokens]
        assert all(np.isfinite(x).all() for x in gradients)
