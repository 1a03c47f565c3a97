"""The state of `dark_attention`: a sequence in pieces is the whole, and its types."""

import keras
import numpy as np
import pytest
from backends import run, to_numpy, value_and_gradients
from keras import ops, tree

from keras_darkformer.memory import Memory
from keras_darkformer.ops import (
    MemoryState,
    PositionedState,
    State,
    Tokens,
    dark_attention,
    initial_state,
)
from keras_darkformer.ops.state import StateShapes

from .cases import Case, assert_close, attend, reference
from .states import (
    assert_equal_states,
    assert_same_state,
    assert_state_is_of,
    empty_state,
    in_pieces,
)

ODD = {"batch": 2, "rank": 5, "value_dim": 6, "masked": True}
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def case_in_pieces(case, sizes):
    """Causal output fed piece by piece, each through the same function, and the last state."""

    def step(query, key, value, mask, state):
        more = {"key_mask": mask, "initial_state": state, "return_state": True}
        return dark_attention(query, key, value, case.arrays[3], **case.options | more)

    return in_pieces(step, empty_state(case), case.arrays[:3], case.key_mask, sizes)


def whole(case):
    """Output and state of one call."""
    return attend(case, return_state=True)


@causal_or_not
def test_state_is_the_sum_over_keys_of_features_and_of_features_times_values(causal):
    case = Case(length=100, heads=(4, 2), causal=causal, **ODD)
    assert_state_is_of(whole(case)[1], case)


@causal_or_not
def test_what_fills_up_the_last_block_is_not_in_the_state(causal):
    case = Case(length=1103, heads=(1, 1), causal=causal)
    output, state = whole(case)
    assert_close(output, reference(case)[0])
    assert_state_is_of(state, case)


def test_sequence_in_pieces_gives_the_outputs_of_the_whole():
    # The first piece is masked in one row: it starts with nothing to attend to.
    case = Case(length=301, heads=(4, 2), causal=True, weighted=True, **ODD)
    output, state = case_in_pieces(case, [1, 62, 1, 200, 37])
    expected, expected_state = whole(case)
    assert_close(output, expected, 1e-5)
    assert_same_state(state, expected_state)


def test_sequence_token_by_token_gives_the_outputs_of_the_whole():
    case = Case(length=40, heads=(4, 2), causal=True, weighted=True, **ODD)
    output, state = case_in_pieces(case, [1] * 40)
    expected, expected_state = whole(case)
    assert_close(output, expected, 1e-5)
    assert_same_state(state, expected_state)


def test_gradients_flow_through_the_state():
    case = Case(length=30, heads=(4, 2), causal=True, **ODD)

    def scalar(*arrays):
        outputs, state = [], None
        for piece in (slice(0, 7), slice(7, 8), slice(8, 30)):
            more = {"key_mask": case.key_mask[:, piece], "initial_state": state}
            output, state = dark_attention(
                *(x[:, piece] for x in arrays[:3]),
                arrays[3],
                **case.options | more,
                return_state=True,
            )
            outputs.append(output)
        return ops.sum(ops.concatenate(outputs, axis=1) * ops.convert_to_tensor(case.upstream))

    _, gradients = value_and_gradients(scalar, *case.arrays)
    for gradient, expected in zip(gradients, reference(case)[1], strict=True):
        assert_close(gradient, expected)


def test_queries_of_the_last_keys_and_a_state_see_all_keys():
    case = Case(length=20, key_length=80, heads=(4, 2), weighted=True, **ODD)
    options = {name: x for name, x in case.options.items() if name not in ("key_mask", "causal")}

    def function(query, key, value, geometry):
        state = None
        for stop, size in ((10, 10), (11, 1), (50, 39)):
            piece = slice(stop - size, stop)
            _, state = dark_attention(  # of one query or of many
                *(query[:, :size], key[:, piece], value[:, piece], geometry),
                **options,
                key_mask=case.key_mask[:, piece],
                initial_state=state,
                return_state=True,
            )
        return dark_attention(
            *(query, key[:, 50:], value[:, 50:], geometry),
            **options,
            key_mask=case.key_mask[:, 50:],
            initial_state=state,
        )

    assert_close(run(function, *case.arrays), reference(case)[0], 1e-4)


@causal_or_not
def test_log_scale_is_the_largest_log_feature_of_the_keys_seen(causal):
    # 100 tokens do not fill their chunks, and what fills them up is not seen.
    case = Case(length=100, causal=causal, masked=True, scale=30.0)
    _, (_, key_state, log_scale) = whole(case)
    _, key, _, geometry = (x.astype("float64") for x in case.arrays)
    projected = np.einsum("bskh,krh->bskr", key * case.head_dim**-0.25, geometry)
    log_features = np.einsum("bskr,kmr->bskm", projected, case.options["projection"])
    log_features -= 0.5 * np.sum(projected**2, axis=-1, keepdims=True)
    expected = np.max(log_features, axis=(1, 3), where=case.key_mask[..., None, None], initial=-1e9)
    np.testing.assert_allclose(log_scale, expected, rtol=1e-4)
    assert (key_state.max(axis=-1) >= 0.99).all()


@causal_or_not
def test_masked_keys_leave_the_state_as_it_was(causal):
    case = Case(length=20, causal=causal, masked=True)
    nothing = np.zeros_like(case.key_mask)
    output, state = attend(case, return_state=True, key_mask=nothing)
    assert not output.any()
    assert_equal_states(state, to_numpy(empty_state(case)))


# Its types.

SHAPES = {
    "sums": StateShapes(2, 16, 6),
    "window": StateShapes(2, 16, 6, 8, Memory(3)),
    "sinks": StateShapes(2, 16, 6, 8, Memory(None, 2)),
    "kept": StateShapes(2, 16, 6, 8, Memory(3, 2, 5)),
    "positioned": StateShapes(2, 16, 6, positioned=True),
    "positioned-kept": StateShapes(2, 16, 6, 8, Memory(3, 2, 5), positioned=True),
}
each_state = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)


@each_state
def test_state_before_the_first_token_its_spec_and_its_check_agree(shapes):
    zeros, spec = shapes.zeros(4), shapes.spec(4)
    tree.assert_same_structure(zeros, spec)
    for leaf, of_spec in zip(tree.flatten(zeros), tree.flatten(spec), strict=True):
        assert tuple(leaf.shape) == of_spec.shape
        assert keras.backend.standardize_dtype(leaf.dtype) == of_spec.dtype == "float32"
    assert_equal_states(to_numpy(shapes.check(zeros, 4)), to_numpy(zeros))
    tree.assert_same_structure(shapes.check(zeros, None), zeros)
    assert {leaf.shape[0] for leaf in tree.flatten(shapes.spec(None))} == {None}


def test_state_has_named_parts_of_the_shapes_that_it_says():
    state = SHAPES["positioned-kept"].zeros(4)
    assert isinstance(state, PositionedState)
    assert tuple(state.position.shape) == (4,)
    assert isinstance(state.attention, MemoryState)
    sums, *memory = state.attention
    assert isinstance(sums, State)
    assert [tuple(x.shape) for x in sums] == [(4, 2, 16, 6), (4, 2, 16), (4, 2)]
    for tokens, size in zip(memory, (2, 3, 5), strict=True):
        assert isinstance(tokens, Tokens)
        shapes = [(4, 2, size, 8), (4, 2, size, 6), (4, 2, size)]
        assert [tuple(x.shape) for x in tokens] == shapes
        assert not any(to_numpy(x).any() for x in (*sums[:2], *tokens[:2], tokens.is_real))
    assert SHAPES["window"].zeros(4)[1::2] == ((), ())
    np.testing.assert_array_equal(to_numpy(sums.log_scale), np.float32(-1e30))


def test_initial_state_is_that_of_its_sizes():
    assert_equal_states(to_numpy(initial_state(4, 2, 16, 6)), to_numpy(SHAPES["sums"].zeros(4)))
    sizes = {"sliding_window": 3, "num_sinks": 2, "cache_size": 5}
    kept = initial_state(4, 2, 16, 6, head_dim=8, **sizes)
    assert_equal_states(to_numpy(kept), to_numpy(SHAPES["kept"].zeros(4)))
    with pytest.raises(ValueError, match="needs a `head_dim`"):
        initial_state(4, 2, 16, 6, num_sinks=1)


@each_state
def test_state_comes_out_of_keras_tree_as_it_went_in(shapes):
    state = to_numpy(shapes.zeros(4))
    leaves = tree.flatten(state)
    assert [x.shape[1:] for x in leaves] == shapes.leaves()
    numbered = tree.pack_sequence_as(state, list(range(len(leaves))))
    assert tree.flatten(numbered) == list(range(len(leaves)))
    for copy in (numbered, tree.map_structure(lambda x: x, state)):
        tree.assert_same_structure(copy, state)
        assert type(copy) is type(state)


def as_plain(state, kind):
    """What saving makes of named tuples."""
    return kind(as_plain(x, kind) for x in state) if isinstance(state, tuple) else state


@pytest.mark.parametrize("kind", [tuple, list])
@each_state
def test_state_of_plain_sequences_gets_its_names_back(shapes, kind):
    state = to_numpy(shapes.zeros(4))
    checked = to_numpy(shapes.check(as_plain(state, kind), 4))
    tree.assert_same_structure(checked, state)
    assert_equal_states(checked, state)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_goes_on_from_a_state_of_plain_sequences(window, length):
    case = Case(length=length, causal=True, window=window)
    _, state = whole(Case(length=5, causal=True, window=window))
    options = {"return_state": True}
    output, after = attend(case, initial_state=as_plain(state, list), **options)
    expected, expected_state = attend(case, initial_state=state, **options)
    np.testing.assert_array_equal(output, expected)
    assert_equal_states(after, expected_state)
    assert np.abs(output - attend(case)).max() > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_state_of_halves_becomes_float32(dtype):
    shapes = SHAPES["window"]
    halves = tree.map_structure(lambda x: ops.cast(ops.zeros_like(x), dtype), shapes.zeros(4))
    for leaf in tree.flatten(shapes.check(halves, 4)):
        assert keras.backend.standardize_dtype(leaf.dtype) == "float32"


@each_state
def test_leaf_of_another_shape_is_refused(shapes):
    leaves = tree.flatten(to_numpy(shapes.zeros(4)))
    for index, leaf in enumerate(leaves):
        for wrong in (leaf[:3], leaf[None], np.repeat(leaf, 2, axis=-1)):
            changed = [*leaves[:index], wrong, *leaves[index + 1 :]]
            with pytest.raises(ValueError, match="`initial_state` must be a state"):
                shapes.check(shapes.pack(changed), 4)
        with pytest.raises(ValueError, match="`initial_state` must be a state"):
            shapes.check([*leaves[:index], *leaves[index + 1 :]], 4)
    with pytest.raises(ValueError, match="`initial_state` must be a state"):
        shapes.check([*leaves, leaves[-1]], 4)
