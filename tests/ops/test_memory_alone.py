"""An exact memory without features in `attend`, against the float64 reference."""

import numpy as np
import pytest
from backends import BACKEND, MODES, run, to_numpy

from keras_darkformer.memory import Memory
from keras_darkformer.ops import dark_attention, initial_state

from .cases import Case, assert_close
from .memories import (
    ODD,
    TOKENS,
    assert_gradients_are_differences,
    attend,
    attend_in_pieces,
    attend_with_gradients,
    expected,
    in_blocks_of,
    windowed,
)
from .states import assert_same_state, mask_for_pieces, row_of

MEMORIES = {"window": Memory(12), "sinks alone": Memory(None, 4), "kept": Memory(12, 3, 8)}
memories = pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)


@pytest.mark.parametrize("jit", MODES)
@memories
def test_output_agrees_with_the_reference(memory, jit):
    case = Case(length=63, batch=2, masked=True, **ODD)
    output, state = attend(case, memory, case.arrays[:3], jit=jit)
    assert_close(output, expected(case, memory, case.arrays[:3]), 1e-5)
    assert state.sums == ()


@memories
def test_neither_chunks_nor_blocks_change_the_output(memory, monkeypatch):
    case = Case(length=50, batch=2, masked=True, **ODD)
    in_blocks_of(24, monkeypatch)
    output, _ = attend(case, memory, case.arrays[:3], chunk_size=7)
    assert_close(output, expected(case, memory, case.arrays[:3]), 1e-5)


@pytest.mark.parametrize("remat", [True, False], ids=["remat", "kept"])
def test_gradients_agree_with_differences_of_the_reference(rng, remat, monkeypatch):
    in_blocks_of(24, monkeypatch)
    case, memory = Case(length=60, heads=(4, 2), masked=True), MEMORIES["kept"]
    _, _, gradients = attend_with_gradients(
        case, memory, case.arrays[:3], chunk_size=8, remat=remat
    )
    assert set(gradients) == set(TOKENS)
    assert_gradients_are_differences(gradients, case, memory, rng, step=1e-6)


@memories
@pytest.mark.parametrize("sizes", [[1, 30, 1, 5, 5, 30], [1] * 40], ids=["pieces", "tokens"])
def test_sequence_in_pieces_gives_the_outputs_and_the_state_of_the_whole(memory, sizes):
    case = Case(length=sum(sizes), batch=2, **ODD)
    alone = len(set(sizes)) == 1  # a masked token by itself takes no place
    key_mask = None if alone else mask_for_pieces(case.batch, sizes)
    output, state = attend_in_pieces(case, memory, case.arrays[:3], sizes, key_mask)
    assert_close(output, expected(case, memory, case.arrays[:3], key_mask=key_mask), 1e-5)
    assert_same_state(state, attend(case, memory, case.arrays[:3], key_mask=key_mask)[1])


@memories
def test_rows_of_different_lengths_go_on_like_each_by_itself(memory):
    case, counts = Case(length=60, batch=3, **ODD), np.array([60, 41, 9])
    mask = np.arange(60) < counts[:, None]
    _, state = attend(case, memory, case.arrays[:3], write_mask=mask)
    for row, count in enumerate(counts):
        arrays = tuple(x[row : row + 1, :count] for x in case.arrays[:3])
        assert_same_state(row_of(state, row), attend(case, memory, arrays)[1])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="others know every size when they trace")
@pytest.mark.parametrize("jit", MODES)
def test_sizes_that_tensorflow_knows_only_in_the_run(jit):
    import tensorflow as tf

    case, memory = Case(length=40, batch=3, **ODD), MEMORIES["kept"]
    signature = [tf.TensorSpec((None, None, *x.shape[2:]), x.dtype) for x in case.arrays[:3]]
    function = tf.function(windowed(memory), input_signature=signature, jit_compile=jit or None)
    output, state = to_numpy(function(*case.arrays[:3]))
    assert_close(output, expected(case, memory, case.arrays[:3]), 1e-5)
    assert_same_state(state, attend(case, memory, case.arrays[:3])[1])


def test_dark_attention_without_a_projection_is_the_memory_alone():
    case, memory = Case(length=40, batch=2, masked=True, **ODD), MEMORIES["kept"]

    def function(query, key, value):
        options = {"causal": True, "key_mask": case.key_mask}
        return dark_attention(query, key, value, None, None, **memory._asdict(), **options)

    assert_close(run(function, *case.arrays[:3]), expected(case, memory, case.arrays[:3]), 1e-5)


@pytest.mark.parametrize(
    ("parameters", "options", "message"),
    [
        ({}, {}, "`projection` may be `None` beside a `sliding_window` or `num_sinks` only"),
        ({"geometry": np.ones((2, 8, 8))}, {"num_sinks": 2}, "`geometry` needs a `projection`"),
        ({}, {"num_sinks": 2, "log_weight": np.ones((2, 4))}, "`log_weight` needs a `projection`"),
        (
            {},
            {"num_sinks": 2, "far_offset": np.ones(4)},
            "`far_offset` needs a `sliding_window` or `num_sinks`, and features",
        ),
    ],
    ids=["no memory", "geometry", "log_weight", "far_offset"],
)
def test_what_says_nothing_without_features_is_refused(parameters, options, message):
    query, key = np.ones((1, 5, 4, 8), "float32"), np.ones((1, 5, 2, 8), "float32")
    parameters = {"geometry": None, "projection": None} | parameters
    with pytest.raises(ValueError, match=message):
        dark_attention(query, key, key, **parameters, **options, causal=True)


def test_a_state_of_nothing_is_refused():
    with pytest.raises(ValueError, match="`num_features` may be 0 beside a `sliding_window`"):
        initial_state(1, 2, 0, 8)
    assert initial_state(1, 2, 0, 8, head_dim=8, num_sinks=2).sums == ()
