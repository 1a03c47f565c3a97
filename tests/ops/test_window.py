"""A window of the exact kernel in `attend`, against the float64 reference."""

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    MODES,
    differentiated,
    largest_intermediate,
    run,
    to_numpy,
    value_and_gradients,
)
from keras import ops, tree

from keras_darkformer.memory import Memory
from keras_darkformer.ops import attention, exact_dark_attention
from keras_darkformer.ops.backend import BASE
from keras_darkformer.ops.call import Call
from keras_darkformer.ops.chunked import chunked
from keras_darkformer.ops.state import StateShapes

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
    folded,
    in_blocks_of,
    weights,
    windowed,
)
from .states import (
    assert_equal_states,
    assert_same_state,
    mask_for_pieces,
    unscaled,
    window_reference,
)

# Outputs.


@pytest.mark.parametrize("jit", MODES)
@pytest.mark.parametrize(
    ("size", "case"),
    [
        (16, Case(length=1, heads=(4, 2))),
        (16, Case(length=63, batch=2, masked=True, **ODD)),
    ],
    ids=str,
)
def test_output_agrees_with_the_reference(case, size, jit):
    assert_close(attend(case, size, jit=jit)[0], expected(case, size), 1e-5)


@pytest.mark.parametrize(
    ("size", "case"),
    [
        (1, Case(length=63, batch=2, **ODD)),
        (16, Case(length=500, masked=True, **ODD)),
        (40, Case(length=63, heads=(4, 1), batch=2)),
        (40, Case(length=500, heads=(2, 1), masked=True)),
        (65, Case(length=130, heads=(2, 1))),  # all of one chunk before, and no more
        (100, Case(length=63, masked=True, **ODD)),
        (600, Case(length=500, heads=(2, 1))),
    ],
    ids=str,
)
def test_output_agrees_with_the_reference_at_more_sizes(case, size):
    assert_close(attend(case, size)[0], expected(case, size), 1e-5)


@pytest.mark.parametrize("chunk_size", [1, 7, 5000])
def test_chunk_size_does_not_change_the_output(chunk_size):
    case = Case(length=50, batch=2, masked=True, **ODD)
    assert_close(attend(case, 12, chunk_size=chunk_size)[0], expected(case, 12), 1e-5)


BLOCKS_CASE, BLOCKS_SIZE = Case(length=70, batch=2, **ODD), 20


@pytest.mark.parametrize("jit", MODES)
@pytest.mark.parametrize("remat", [True, False], ids=["remat", "kept"])
def test_neither_blocks_nor_remat_change_output_gradients_and_state(remat, jit, monkeypatch):
    output, state, gradients = attend_with_gradients(BLOCKS_CASE, BLOCKS_SIZE)
    in_blocks_of(24, monkeypatch)  # the window spans more than one chunk
    output_in_blocks, state_in_blocks, gradients_in_blocks = attend_with_gradients(
        BLOCKS_CASE, BLOCKS_SIZE, chunk_size=12, remat=remat, jit=jit
    )
    assert_close(output_in_blocks, output, 1e-5)
    assert_same_state(state_in_blocks, state)
    for name, gradient in gradients.items():
        assert_close(gradients_in_blocks[name], gradient)


def test_no_tensor_on_the_way_has_an_element_for_every_pair():
    case = Case(length=2048, heads=(1, 1))
    output = windowed(32)
    largest = largest_intermediate(lambda *arrays: output(*arrays)[0], *arrays_of(case))
    assert largest < case.length**2 // 4


def test_window_longer_than_the_sequence_is_exact_attention():
    case = Case(length=63, batch=2, masked=True, causal=True, heads=(4, 2))
    identity = np.stack([np.eye(case.head_dim, dtype="float32")] * 2)
    exact = run(
        lambda *arrays: exact_dark_attention(*arrays, causal=True, key_mask=case.key_mask),
        *case.replaced(geometry=identity),
    )
    assert_close(attend(case, 63)[0], exact, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_computed_in_float32(dtype):
    case = Case(length=70, masked=True, **ODD)
    query, key, value = (to_numpy(ops.cast(ops.cast(x, dtype), "float32")) for x in case.arrays[:3])
    rounded = arrays_of(case, query=query, key=key, value=value)

    def function(query, key, value, *weights):
        query, key, value = (ops.cast(x, dtype) for x in (query, key, value))
        state = StateShapes(2, case.num_features, 6, case.head_dim, Memory(16)).zeros(1)
        call = Call(ops.convert_to_tensor(case.key_mask), memory=Memory(16), with_state=True)
        output, state = chunked(query, key, value, folded(weights), state, call)
        for x in (output, *tree.flatten(state)):
            assert keras.backend.standardize_dtype(x.dtype) == "float32"
        return output

    assert_close(run(function, *rounded), expected(case, 16, rounded), 1e-5)


def test_window_of_keys_to_come_is_refused():
    case = Case(length=4)
    query, key, value, *weights = arrays_of(case)
    with pytest.raises(ValueError, match="`sliding_window` and `num_sinks` need `causal=True`"):
        attention.attend(query, key, value, folded(weights), memory=Memory(2))


# Gradients.


@pytest.mark.parametrize("jit", MODES)
def test_gradients_agree_with_differences_of_the_reference(jit, rng):
    case, size, step = Case(length=20, heads=(4, 2), masked=True), 6, 1e-5
    _, _, gradients = attend_with_gradients(case, size, chunk_size=8, jit=jit)
    assert_gradients_are_differences(gradients, case, size, rng, step=step)


def test_gradients_flow_through_the_state():
    case, size = BLOCKS_CASE, BLOCKS_SIZE

    def scalar(*arrays):
        outputs, state = [], None
        for piece in (slice(0, 30), slice(30, 31), slice(31, 70)):
            output, state = windowed(size, initial_state=state)(
                *(x[:, piece] for x in arrays[:3]), *arrays[3:]
            )
            outputs.append(output)
        return ops.sum(ops.concatenate(outputs, axis=1) * ops.convert_to_tensor(case.upstream))

    _, gradients = value_and_gradients(scalar, *arrays_of(case))
    _, _, of_the_whole = attend_with_gradients(case, size)
    for gradient, whole in zip(gradients, of_the_whole.values(), strict=True):
        assert_close(gradient, whole)


# Causality, and keys that are large.


def scaled_keys(case, scales, **others):
    return arrays_of(case, key=case.arrays[1] * np.float32(scales)[:, None, None], **others)


def test_future_tokens_do_not_change_past_outputs():
    case, present = Case(length=130, heads=(2, 1)), 70
    future = np.arange(case.length) >= present
    before, _ = attend(case, 16)
    for scale in (0.0, 1e6):
        arrays = scaled_keys(case, np.where(future, scale, 1.0))
        arrays = (
            arrays[0],
            arrays[1],
            np.where(future[:, None, None], 1e3, arrays[2]),
            *arrays[3:],
        )
        after, _ = attend(case, 16, arrays)
        np.testing.assert_allclose(after[:, :present], before[:, :present], rtol=0, atol=1e-6)
        assert np.isfinite(after).all()
        assert np.abs(after - before)[:, present:].max() > 0.1


def test_future_tokens_get_no_gradient_from_past_outputs():
    case, present = Case(length=130, heads=(2, 1)), 70
    arrays = scaled_keys(case, np.where(np.arange(case.length) >= present, 1e3, 1.0))

    def scalar(*arrays):
        return ops.sum(windowed(16)(*arrays)[0][:, :present])

    _, gradients = value_and_gradients(scalar, *arrays)
    for gradient in gradients[:3]:
        assert gradient[:, :present].any()
        assert not gradient[:, present:].any()
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e6])
def test_a_large_key_drowns_only_what_it_outweighs(scale):
    # First in the window, where its logits are huge, then far away.
    case = Case(length=70, heads=(2, 1))
    arrays = scaled_keys(case, np.where(np.arange(case.length) == 20, scale, 1.0))
    output, _, gradients = attend_with_gradients(case, 16, arrays)
    assert_close(output, expected(case, 16, arrays), 1e-4)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def one_feature_case(key_logit, query_logit):
    """The first keys have a huge feature, in which queries have next to nothing."""
    case = Case(length=40, heads=(1, 1), num_features=2)
    query, key, value = (x.copy() for x in case.arrays[:3])
    query[..., 0], key[..., 0] = 1.0, 0.0
    key[:, :5, :, 0] = 1.0  # this dimension is theirs alone
    query_kernel, key_kernel = np.zeros((2, 1, 8, 2), "float32")
    query_kernel[0, 0, 0], key_kernel[0, 0] = query_logit, (key_logit, -60.0)
    zeros = {
        "key_norm_kernel": np.zeros((1, 8, 5), "float32"),
        "key_linear": np.zeros((1, 8), "float32"),
    }
    arrays = {"query": query, "key": key, "value": value}
    kernels = {"query_kernel": query_kernel, "key_kernel": key_kernel}
    return case, arrays_of(case, **arrays, **kernels, **zeros)


@pytest.mark.parametrize(("key_logit", "query_logit"), [(80.0, -100.0), (40.0, -40.0)])
def test_features_that_do_not_meet_do_not_drown_the_window(key_logit, query_logit):
    scale = 1 / np.log(BASE)
    case, arrays = one_feature_case(scale * key_logit, scale * query_logit)
    output, _, gradients = attend_with_gradients(case, 35, arrays)
    assert_close(output, expected(case, 35, arrays), 1e-3)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("bias", [-1e4, -60.0, 60.0, 1e4])
def test_either_part_may_outweigh_the_other_by_far(bias):
    case = Case(length=70, heads=(2, 1))
    arrays = arrays_of(case, bias=np.full(2, bias, "float32"))
    output, _, gradients = attend_with_gradients(case, 16, arrays)
    assert_close(output, expected(case, 16, arrays), 2e-3)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_what_stands_at_masked_keys_changes_nothing():
    case = Case(length=63, batch=3, masked=True, heads=(4, 2))
    garbage = np.array([1e30, np.nan, np.inf], "float32")[:, None, None, None]
    mask = case.key_mask[:, :, None, None]
    key, value = (np.where(mask, x, garbage) for x in case.arrays[1:3])
    before = attend_with_gradients(case, 10)
    after = attend_with_gradients(case, 10, arrays_of(case, key=key, value=value))
    for x, y in zip(tree.flatten(after), tree.flatten(before), strict=True):
        assert_close(x, y, 1e-6)


# The state.


def assert_state_is_of(state, key, value, written, case):
    """The last keys, and the sums over those before; `written` is bool, `(b, s)`."""
    size = state.recent.key.shape[2]
    left, recent = window_reference(key, value, written, size)
    kv_state, key_state, *actual_recent = unscaled(state)
    for actual, of_window in zip(actual_recent, recent, strict=True):
        np.testing.assert_array_equal(actual, of_window)
    _, key_kernel, bias, norm_kernel, linear = weights(case)[:5]
    key, value = (x.astype("float64") for x in (key, value))
    projected = np.einsum("bskh,khr->bskr", key, norm_kernel)
    logits = np.einsum("bskh,khm->bskm", key, key_kernel) + bias
    logits += np.einsum("bskh,kh->bsk", key, linear)[..., None]
    features = BASE ** (logits - np.sum(projected**2, axis=-1, keepdims=True))
    features *= left[:, :, None, None]
    assert_close(kv_state, np.einsum("bskm,bskv->bkmv", features, value))
    assert_close(key_state, features.sum(axis=1))


PIECES = [1, 30, 1, 5, 5, 30]


@pytest.mark.parametrize(
    ("size", "sizes", "masked", "bias"),
    [
        (16, PIECES, False, None),
        (16, PIECES, True, None),
        (6, [1] * 20, True, None),
        (6, [1, 19, 1, 1], True, WINDOW_ALONE),
    ],
    ids=["pieces", "pieces-masked", "tokens", "window-alone"],
)
def test_sequence_in_pieces_gives_the_outputs_and_the_state_of_the_whole(size, sizes, masked, bias):
    case = Case(length=sum(sizes), batch=2, **ODD)
    key_mask = mask_for_pieces(case.batch, sizes) if masked else None
    arrays = arrays_of(case) if bias is None else arrays_of(case, bias=bias)
    output, state = attend_in_pieces(case, size, arrays, sizes, key_mask)
    assert_close(output, expected(case, size, arrays, key_mask=key_mask), 1e-5)
    written = key_mask if masked else np.ones((case.batch, case.length), bool)
    assert_state_is_of(state, *case.arrays[1:3], written, case)


@pytest.mark.parametrize("name", ["key_mask", "write_mask"])
@pytest.mark.parametrize("size", [5, 30])
def test_state_holds_the_last_keys_and_the_sums_over_those_before(size, name):
    # Padding behind is none of them; what is masked before it takes a place.
    case, before = Case(length=24, batch=4, **ODD), Case(length=20, batch=4, **ODD)
    counts = [24, 17, 3, 0]
    mask = np.arange(case.length) < np.array(counts)[:, None]
    mask[0, 4] = False
    _, start = attend(before, size)
    _, state = attend(case, size, **{name: mask, "initial_state": start})
    pairs = zip(before.arrays[1:3], case.arrays[1:3], strict=True)
    tokens = [np.concatenate(pair, axis=1) for pair in pairs]
    written = np.concatenate([np.ones((4, before.length), bool), mask], axis=1)
    assert_state_is_of(state, *tokens, written, case)


def test_masked_token_of_its_own_leaves_the_state_as_it_was():
    case, size = Case(length=20, batch=2, **ODD), 6
    _, state = attend(case, size)
    token = [x[:, :1] for x in case.arrays[:3]]
    key_mask = np.array([[False], [True]])
    arrays = (*token, *weights(case))
    _, after = attend(case, size, arrays, key_mask=key_mask, initial_state=state)
    rows = (tree.map_structure(lambda x: x[0], x) for x in (after, state))
    assert_equal_states(*rows)
    for before, leaf in zip(state.recent[:2], after.recent[:2], strict=True):
        np.testing.assert_array_equal(leaf[1, :, :-1], before[1, :, 1:])


def test_mask_of_one_row_is_for_all_rows():
    case = Case(length=40, batch=2, heads=(4, 2))
    key_mask = np.arange(40)[None] % 3 < 2
    both = np.repeat(key_mask, 2, axis=0)
    output, state = attend(case, 6, key_mask=key_mask)
    assert_close(output, expected(case, 6, key_mask=both), 1e-5)
    assert_state_is_of(state, *case.arrays[1:3], both, case)


def test_state_that_nobody_asks_for_may_be_left_out():
    case = Case(length=40, masked=True)

    output = attend(case, 6, return_state=False)
    assert_close(output, expected(case, 6), 1e-5)


# The window alone.


@pytest.mark.parametrize("size", [2, 16])  # of two, many are masked, and all else is far
def test_window_alone_is_softmax_over_the_window(size):
    case = Case(length=70, batch=2, masked=True, heads=(4, 2))
    arrays = arrays_of(case, bias=WINDOW_ALONE)
    output, _, gradients = attend_with_gradients(case, size, arrays)
    assert_close(output, expected(case, size, arrays), 1e-5)
    age = np.arange(70)[:, None] - np.arange(70)
    exact = run(
        lambda *tokens: exact_dark_attention(
            *tokens, causal=True, key_mask=case.key_mask, attention_mask=(age < size)[None, None]
        ),
        *case.arrays[:3],
    )
    assert_close(output, exact, 1e-5)
    for name in NAMES:
        assert not gradients[name].any()


# Sizes that are known only to the run.


@pytest.mark.skipif(BACKEND != "tensorflow", reason="others know every size when they trace")
@pytest.mark.parametrize("jit", MODES)
def test_tensorflow_sizes_may_be_unknown_until_the_run(jit):
    import tensorflow as tf

    size = 20
    cases = [
        Case(length=length, heads=(4, 2), batch=batch, masked=True)
        for length, batch in ((130, 2), (4, 3))
    ]

    def step(query, key, value, key_mask, write_mask, upstream, *weights):
        def scalar(*arrays):
            masks = {"key_mask": key_mask, "write_mask": write_mask}
            output, state = windowed(size, **masks)(*arrays)
            return ops.sum(output * upstream), (output, state)

        return differentiated(scalar, has_aux=True)(query, key, value, *weights)

    def inputs(case):
        query, key, value, *weights = arrays_of(case)
        write_mask = np.arange(case.length) < case.length // 2 + np.arange(case.batch)[:, None]
        return query, key, value, case.key_mask, write_mask, case.upstream, *weights

    def spec(index, array):  # the weights know their sizes
        known = array.shape if index > 5 else (None, None, *array.shape[2:])
        return tf.TensorSpec(known, array.dtype)

    signature = [spec(*pair) for pair in enumerate(inputs(cases[0]))]
    function = tf.function(step, input_signature=signature, jit_compile=jit or None)
    for case in cases:
        (_, (output, state)), gradients = to_numpy(function(*inputs(case)))
        assert_close(output, expected(case, size), 1e-5)
        written = case.key_mask & inputs(case)[4]
        assert_state_is_of(state, *case.arrays[1:3], written, case)
        known = attend_with_gradients(case, size)[2]
        for gradient, of_known_sizes in zip(gradients, known.values(), strict=True):
            assert_close(gradient, of_known_sizes)
    assert function.experimental_get_tracing_count() == 1
