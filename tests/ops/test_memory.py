"""Sinks and kept keys in `attend`, against the float64 reference."""

import numpy as np
import pytest
from backends import BACKEND, MODES, differentiated, further, run, to_numpy
from keras import ops

from keras_darkformer.memory import Memory
from keras_darkformer.ops import exact_dark_attention
from keras_darkformer.ops.reference import exact_keys
from keras_darkformer.ops.scores import exact_pairs

from .cases import Case, assert_close
from .memories import (
    NAMES,
    ODD,
    WINDOW_ALONE,
    arrays_of,
    assert_gradients_are_differences,
    attend,
    attend_in_pieces,
    attend_with_gradients,
    expected,
    in_blocks_of,
    windowed,
)
from .states import assert_equal_states, assert_same_state, mask_for_pieces, row_of

SINKS, SINKS_ALONE, KEPT = Memory(16, 4), Memory(None, 4), Memory(12, 3, 8)
MEMORIES = {"sinks": SINKS, "sinks alone": SINKS_ALONE, "kept": KEPT, "no sinks": Memory(5, 0, 20)}
memories = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
# Where each of them is compiled at several lengths.
some_memories = pytest.mark.parametrize(
    "memory",
    [SINKS_ALONE, KEPT, *further(SINKS, MEMORIES["no sinks"])],
    ids=["sinks alone", "kept", *further("sinks", "no sinks")],
)


@pytest.mark.parametrize("jit", MODES)
@memories
def test_output_agrees_with_the_reference(memory, jit):
    case = Case(length=63, batch=2, masked=True, **ODD)
    assert_close(attend(case, memory, jit=jit)[0], expected(case, memory), 1e-5)
    without = expected(case, memory._replace(cache_size=0))
    assert (np.abs(without - expected(case, memory)).max() > 0.05) == (memory.cache_size > 0)


@pytest.mark.parametrize(
    ("memory", "case"),
    [
        (KEPT, Case(length=300, batch=2, **ODD)),
        (KEPT, Case(length=300, heads=(2, 1), masked=True)),
        (Memory(1, 1, 1), Case(length=63, batch=2, **ODD)),
        (Memory(65, 2, 5), Case(length=200, heads=(2, 1))),
        (Memory(4, 2, 100), Case(length=63, heads=(4, 1))),
        (Memory(600, 4, 4), Case(length=63, **ODD)),
    ],
    ids=str,
)
def test_output_agrees_with_the_reference_at_more_sizes(case, memory):
    assert_close(attend(case, memory)[0], expected(case, memory), 1e-5)


@some_memories
@pytest.mark.parametrize("chunk_size", [1, 7, 5000])
def test_chunk_size_does_not_change_the_output(chunk_size, memory):
    case = Case(length=50, batch=2, masked=True, **ODD)
    output, _ = attend(case, memory, chunk_size=chunk_size)
    assert_close(output, expected(case, memory), 1e-5)


@pytest.mark.parametrize("jit", MODES)
@pytest.mark.parametrize("remat", [True, False], ids=["remat", "kept"])
def test_neither_blocks_nor_remat_change_output_gradients_and_state(remat, jit, monkeypatch):
    case = Case(length=70, batch=2, masked=True, **ODD)
    output, state, gradients = attend_with_gradients(case, KEPT)
    in_blocks_of(24, monkeypatch)
    others = attend_with_gradients(case, KEPT, chunk_size=12, remat=remat, jit=jit)
    assert_close(others[0], output, 1e-5)
    assert_same_state(others[1], state)
    for name, gradient in gradients.items():
        assert_close(others[2][name], gradient)


def test_gradients_agree_with_differences_of_the_reference(rng):
    """The choice of what is kept is a constant to them."""
    case, step = Case(length=60, heads=(4, 2), masked=True), 1e-6
    _, _, gradients = attend_with_gradients(case, KEPT, chunk_size=8)
    assert_gradients_are_differences(gradients, case, KEPT, rng, step=step)


PIECES = {"pieces": [1, 30, 1, 5, 5, 30], "tokens": [1] * 40}


@some_memories
@pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_sequence_in_pieces_gives_the_outputs_and_the_state_of_the_whole(memory, sizes, masked):
    case = Case(length=sum(sizes), batch=2, **ODD)
    key_mask = mask_for_pieces(case.batch, sizes) if masked else None
    output, state = attend_in_pieces(case, memory, arrays_of(case), sizes, key_mask)
    if not masked or sizes != PIECES["tokens"]:  # alone, a masked token takes no place
        assert_close(output, expected(case, memory, key_mask=key_mask), 1e-5)
        assert_same_state(state, attend(case, memory, key_mask=key_mask)[1])


@some_memories
@pytest.mark.parametrize("name", ["key_mask", "write_mask"])
def test_rows_of_different_lengths_go_on_like_each_by_itself(memory, name, monkeypatch):
    """A ragged prefill: padding behind a row, or tokens that are seen but come again."""
    in_blocks_of(24, monkeypatch)
    case = Case(length=60, batch=3, **ODD)
    counts = np.array([60, 41, 9])
    mask = np.arange(60) < counts[:, None]
    output, state = attend(case, memory, chunk_size=12, **{name: mask})
    whole = expected(case, memory, key_mask=None, **({} if name == "key_mask" else {name: mask}))
    for row, count in enumerate(counts):
        arrays = [x[row : row + 1, :count] for x in arrays_of(case)[:3]]
        alone, after = attend(case, memory, (*arrays, *arrays_of(case)[3:]))
        assert_close(output[row, :count], alone[0], 1e-5)
        assert_same_state(row_of(state, row), after)
        if name == "write_mask":
            assert_close(output[row], whole[row], 1e-5)


def test_padding_before_a_row_changes_nothing():
    """The sinks are the first real tokens."""
    case, padding = Case(length=50, **ODD), 13
    arrays = arrays_of(case)
    padded = [np.pad(x, [(0, 0), (padding, 0), (0, 0), (0, 0)], mode="edge") for x in arrays[:3]]
    key_mask = np.arange(50 + padding)[None] >= padding
    output, state = attend(case, KEPT, (*padded, *arrays[3:]), key_mask=key_mask)
    plain, expected_state = attend(case, KEPT, arrays)
    assert_close(output[:, padding:], plain, 1e-5)
    assert_same_state(state, expected_state)


def test_future_tokens_change_nothing_before_them():
    case, present = Case(length=130, heads=(2, 1)), 70
    future = np.arange(case.length) >= present
    before, _ = attend(case, KEPT)
    for scale in (0.0, 1e6):
        scales = np.where(future, scale, 1.0).astype("float32")[:, None, None]
        query, key, value, *rest = arrays_of(case)
        value = np.where(future[:, None, None], np.float32(1e3), value)
        after, _ = attend(case, KEPT, (query * scales, key * scales, value, *rest))
        np.testing.assert_allclose(after[:, :present], before[:, :present], rtol=0, atol=1e-6)
        assert np.isfinite(after).all()


def test_a_memory_of_all_keys_is_exact_attention():
    case = Case(length=63, batch=2, masked=True, heads=(4, 2))
    exact = run(
        lambda *tokens: exact_dark_attention(*tokens, causal=True, key_mask=case.key_mask),
        *case.arrays[:3],
    )
    assert_close(attend(case, Memory(20, 3, 40))[0], exact, 1e-5)


def test_the_memory_alone_is_softmax_over_it():
    case = Case(length=70, heads=(2, 1))
    output, _, gradients = attend_with_gradients(case, KEPT, arrays_of(case, bias=WINDOW_ALONE[:2]))
    query, key, value = (x[0].astype("float64") for x in case.arrays[:3])
    near = np.einsum("tnh,sh->nts", query, key[:, 0]) * case.head_dim**-0.5
    seen = exact_keys(near, np.ones(70, bool), np.ones(70, bool), KEPT)
    assert (seen.sum(axis=1) == np.minimum(np.arange(70) + 1, 12 + 3 + 8)).all()
    weights = np.where(seen, np.exp(near), 0.0)
    weights /= weights.sum(axis=-1, keepdims=True)
    assert_close(output[0], np.einsum("nts,sv->tnv", weights, value[:, 0]), 1e-5)
    for name in NAMES:
        assert not gradients[name].any()


@memories
def test_pairs_that_meet_are_those_of_the_reference(memory):
    case = Case(length=40, batch=2, masked=True, heads=(4, 2))
    found = run(lambda *x: exact_pairs(*x, memory, case.key_mask), *case.arrays[:2])
    assert found.shape == (2, 4, 40, 40)
    for row, real in enumerate(case.key_mask):
        for head in range(4):
            query = case.arrays[0][row, :, head // 2 * 2 : head // 2 * 2 + 2].astype("float64")
            key = case.arrays[1][row, :, head // 2].astype("float64")
            near = np.einsum("tgh,sh->gts", query, key) * case.head_dim**-0.5
            expected = exact_keys(near, real, real, memory)
            seen = np.tri(40, dtype=bool) & real
            np.testing.assert_array_equal(found[row, head] & seen, expected & seen)


only_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="others know every size when they trace"
)


@only_tensorflow
@pytest.mark.parametrize(
    ("memory", "known", "jit"),
    [
        pytest.param(KEPT, False, True, id="kept, jit"),
        pytest.param(KEPT, True, True, id="kept, length known, jit"),
        pytest.param(SINKS_ALONE, False, False, id="sinks alone"),
    ],
)
def test_sizes_that_tensorflow_knows_only_in_the_run(memory, known, jit):
    import tensorflow as tf

    cases = [
        Case(length=40 if known else length, batch=batch, masked=True, **ODD)
        for length, batch in ((70, 2), (40, 3))
    ]

    def step(query, key, value, key_mask, upstream, *weights):
        def scalar(*arrays):
            output, state = windowed(memory, key_mask=key_mask)(*arrays)
            return ops.sum(output * upstream), (output, state)

        return differentiated(scalar, has_aux=True)(query, key, value, *weights)

    def given(case):
        query, key, value, *weights = arrays_of(case)
        return query, key, value, case.key_mask, case.upstream, *weights

    signature = [
        tf.TensorSpec(x.shape if i > 4 else (None, 40 if known else None, *x.shape[2:]), x.dtype)
        for i, x in enumerate(given(cases[0]))
    ]
    function = tf.function(step, input_signature=signature, jit_compile=jit or None)
    for case in cases:
        (_, (output, state)), gradients = to_numpy(function(*given(case)))
        assert_close(output, expected(case, memory), 1e-5)
        _, expected_state, of_known_sizes = attend_with_gradients(case, memory)
        assert_same_state(state, expected_state)
        for gradient, expected_gradient in zip(gradients, of_known_sizes.values(), strict=True):
            assert_close(gradient, expected_gradient)


@only_tensorflow
@pytest.mark.parametrize("memory", [KEPT, Memory(90, 1, 2)], ids=["kept", "long window"])
def test_pairs_of_sizes_that_tensorflow_knows_only_in_the_run(memory):
    import tensorflow as tf

    case = Case(length=40, batch=2, masked=True, heads=(4, 2))
    arrays = (*case.arrays[:2], case.key_mask)
    signature = [tf.TensorSpec((None, None, *x.shape[2:]), x.dtype) for x in arrays]
    function = tf.function(lambda q, k, mask: exact_pairs(q, k, memory, mask), signature)
    expected = run(lambda *x: exact_pairs(*x, memory, case.key_mask), *arrays[:2])
    np.testing.assert_array_equal(function(*arrays), expected)


def test_masked_token_of_its_own_leaves_the_state_as_it_was():
    case = Case(length=40, batch=2, **ODD)
    _, state = attend(case, KEPT)
    arrays = (*(x[:, :1] for x in case.arrays[:3]), *arrays_of(case)[3:])
    _, after = attend(case, KEPT, arrays, key_mask=np.zeros((2, 1), bool), initial_state=state)
    assert_equal_states(after, state)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((None, 0, 4), "`cache_size` needs a `sliding_window`"),
        ((8, -1), "`num_sinks` must be an integer, 0 or more. Received: num_sinks=-1"),
        ((8, 0, 2.0), "`cache_size` must be an integer, 0 or more. Received: cache_size=2.0"),
        ((0,), "`sliding_window` must be a positive integer"),
    ],
)
def test_sizes_that_can_not_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        attend(Case(length=4), Memory(*sizes))
