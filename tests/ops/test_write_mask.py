"""`write_mask`: which keys enter the state, while queries see all that `key_mask` lets them."""

import functools

import numpy as np
import pytest
from backends import value_and_gradients
from keras import ops, tree

from keras_darkformer.ops import MemoryState, dark_attention, partition, sums
from keras_darkformer.ops.reference import dark_attention_reference

from .cases import Case, assert_close, attend
from .states import assert_equal_states, assert_same_state, assert_state_is_of

FITTED = {"rank": 5, "value_dim": 6, "untied": True, "shifted": True, "weighted": True}
LENGTH = 24
INDEX = np.arange(LENGTH)
ALL, NONE = INDEX >= 0, INDEX < 0
# One row each: what is masked, and what is written.
MASKS = {
    "padding in front": (INDEX >= 5, INDEX < 13),
    "padding behind, and masked tokens written": (INDEX < 17, INDEX < 20),
    "holes": (INDEX % 5 != 2, INDEX < 17),
    "nothing written": (ALL, NONE),
    "gaps in what is written": (ALL, INDEX % 7 < 4),
    "nothing to attend to": (NONE, INDEX < 9),
    "padding written alone": (INDEX >= 9, INDEX < 9),
}
KEY_MASK, WRITE_MASK = (np.stack(rows) for rows in zip(*MASKS.values(), strict=True))

windows = pytest.mark.parametrize("window", [None, 5, 30])
some_windows = pytest.mark.parametrize("window", [None, 5])


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """Two of them, the first one filled up: 28 places for 24 tokens."""
    monkeypatch.setattr(partition, "block_length", blocks_of_14)


def blocks_of_14(*_):
    return 14


def case_of(window, length=LENGTH, **changes):
    options = {"batch": len(KEY_MASK), "heads": (4, 2), "causal": True, **FITTED} | changes
    return Case(length=length, window=window, **options)


def call(case, arrays=None, **options):
    return attend(case, arrays, **{"return_state": True, "chunk_size": 7} | options)


def assert_writes(case, output, state, key_mask=KEY_MASK, write_mask=WRITE_MASK):
    options = case.options | {"key_mask": key_mask}
    assert_close(output, dark_attention_reference(*case.arrays, **options)[0])
    assert_state_is_of(state, case, written=key_mask & write_mask)


@windows
@pytest.mark.parametrize("chunk_size", [1, 7, None])
def test_state_holds_what_is_written_and_queries_see_all(window, chunk_size):
    case = case_of(window)
    masks = {"key_mask": KEY_MASK, "write_mask": WRITE_MASK}
    assert_writes(case, *call(case, chunk_size=chunk_size, **masks))


@some_windows
def test_without_a_key_mask_all_is_seen(window):
    case = case_of(window)
    output, state = call(case, write_mask=WRITE_MASK)
    assert_writes(case, output, state, np.ones_like(KEY_MASK))
    # One row is for all rows, and the output does not depend on it.
    output_of_row, state = call(case, write_mask=WRITE_MASK[:1])
    assert_close(output_of_row, output, 1e-6)
    assert_writes(case, output, state, np.ones_like(KEY_MASK), WRITE_MASK[:1])
    output_alone = attend(case, write_mask=WRITE_MASK, chunk_size=7)
    assert_close(output_alone, output, 1e-6)


@some_windows
def test_one_row_of_either_mask_is_for_all_rows(window):
    case = case_of(window)
    for rows, write_rows in ((slice(2, 3), slice(None)), (slice(None), slice(4, 5))):
        masks = KEY_MASK[rows], WRITE_MASK[write_rows]
        output, state = call(case, key_mask=masks[0], write_mask=masks[1])
        both = np.broadcast_arrays(*masks, KEY_MASK)[:2]
        assert_writes(case, output, state, *both)


def started(window):
    """A state that tokens of every row have been written to."""
    return call(case_of(window, length=8))[1]


@some_windows
def test_state_is_that_of_a_call_on_what_is_written_alone(window):
    # A prompt behind its padding, and the same without what comes after.
    case, prompt = case_of(window), case_of(window, length=13)
    key_mask = np.arange(len(KEY_MASK))[:, None] <= INDEX
    arrays = (*(x[:, :13] for x in case.arrays[:3]), case.arrays[3])
    for state in (None, started(window)):
        options = case.options | {"initial_state": state}
        masks = {"key_mask": key_mask, "write_mask": np.tile(INDEX < 13, (len(key_mask), 1))}
        _, of_whole = call(case, **options | masks)
        masks = {"key_mask": key_mask[:, :13]}
        _, of_prompt = call(prompt, arrays, **options | masks)
        assert_same_state(of_whole, of_prompt, 1e-5)


@windows
@pytest.mark.parametrize("with_key_mask", [True, False])
def test_single_token_is_seen_by_its_query_and_written_where_the_mask_says(window, with_key_mask):
    # Rows: written and seen, seen alone, neither, masked however it may be written.
    write_mask = np.array([1, 0, 0, 1, 1, 1, 1], bool)[:, None]
    key_mask = np.array([1, 1, 0, 0, 1, 1, 1], bool)[:, None] if with_key_mask else None
    whole = case_of(window, length=9)
    *tokens, geometry = whole.arrays
    options = whole.options
    _, state = call(whole, (*(x[:, :8] for x in tokens), geometry))
    masks = {"key_mask": key_mask, "write_mask": write_mask, "initial_state": state}
    output, after = call(whole, (*(x[:, 8:] for x in tokens), geometry), **masks)

    seen = np.ones((7, 9), bool)
    seen[:, 8:] = True if key_mask is None else key_mask
    expected, _ = dark_attention_reference(*whole.arrays, **options | {"key_mask": seen})
    assert_close(output, expected[:, 8:])
    written = np.ones((7, 9), bool)
    written[:, 8:] = write_mask & seen[:, 8:]
    assert_state_is_of(after, whole, written=written)
    unchanged = ~written[:, 8]
    assert unchanged.any()
    rows = [tree.map_structure(lambda x: x[unchanged], x) for x in (after, state)]
    assert_equal_states(*rows)


@windows
@pytest.mark.parametrize("length", [1, LENGTH])
@pytest.mark.parametrize("start", [True, False], ids=["started", "empty"])
def test_state_that_nothing_is_written_to_stays_as_it_was(window, length, start):
    case = case_of(window, length=length)
    before = started(window) if start else None
    masks = {"key_mask": KEY_MASK[:, -length:], "write_mask": np.zeros_like(KEY_MASK[:, -length:])}
    output, after = call(case, initial_state=before, **masks)
    assert np.abs(output).max() > 0.1
    if before is None:
        sums = after.sums if isinstance(after, MemoryState) else after
        np.testing.assert_allclose(sums.log_scale, -1e30, rtol=1e-6)
        assert not any(x.any() for x in (sums.kv_state, sums.key_state))
        assert not (window and any(x.any() for x in after.recent[:2]))
    else:
        assert_same_state(after, before, 1e-6)


@some_windows
def test_gradients_through_what_is_written_are_those_through_a_call_on_it(window):
    case, size = case_of(window, batch=2), 13
    options = case.options | {"chunk_size": 7}
    write_mask = (size > INDEX)[None]

    def loss(output, state):
        leaves = tree.flatten(state)
        del leaves[2]  # scales are constants to the gradient
        return ops.sum(output * ops.convert_to_tensor(case.upstream)) + sum(
            ops.sum(x * x) for x in leaves
        )

    def together(*arrays, remat):
        more = {"write_mask": write_mask, "return_state": True, "remat": remat}
        return loss(*dark_attention(*arrays, **options | more))

    def apart(*arrays):
        tokens = (x[:, :size] for x in arrays[:3])
        _, state = dark_attention(*tokens, arrays[3], **options, return_state=True)
        return loss(dark_attention(*arrays, **options), state)

    expected, expected_gradients = value_and_gradients(apart, *case.arrays)
    for remat in (True, False):
        function = functools.partial(together, remat=remat)
        value, gradients = value_and_gradients(function, *case.arrays)
        assert_close(value, expected, 1e-5)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert_close(gradient, expected_gradient)


@some_windows
def test_features_of_a_key_are_computed_once(window, monkeypatch):
    computed = []
    original = sums.log_key_features

    def counting(key, features):
        computed.append(tuple(key.shape))
        return original(key, features)

    monkeypatch.setattr(sums, "log_key_features", counting)
    case = case_of(window)
    masks = {"key_mask": KEY_MASK, "write_mask": WRITE_MASK}

    def attention(*arrays, **options):  # its own, so that it is traced here
        return dark_attention(*arrays, **options)

    call(case, key_mask=KEY_MASK, function=attention, return_state=False)
    once, computed[:] = computed[:], []
    call(case, **masks, function=attention)
    assert computed == once
    assert once
