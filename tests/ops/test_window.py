"""A window of the exact kernel in `linear_attention`, against the float64 reference."""

import functools

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    DEFAULT_JIT,
    MODES,
    compiled,
    differentiated,
    largest_intermediate,
    run,
    to_numpy,
    value_and_gradients,
)
from keras import ops, tree

from keras_darkformer.ops import exact_dark_attention, initial_state, partition
from keras_darkformer.ops.backend import BASE
from keras_darkformer.ops.features import FeatureProjections, Window
from keras_darkformer.ops.linear_attention import accumulate_state, linear_attention
from keras_darkformer.ops.reference import windowed_attention_reference

from .cases import Case, assert_close

NAMES = (*FeatureProjections._fields, "norm_kernel", "kernel", "bias")
TOKENS = ("query", "key", "value")


@functools.lru_cache
def weights(case):
    """Features unlike each other, and the query's scale: what `NAMES` names."""
    rng = np.random.default_rng(7)
    num_heads, kv_heads = case.heads

    def normal(scale, *shape):
        return (scale * rng.standard_normal(shape)).astype("float32")

    kernel = (kv_heads, case.head_dim, case.num_features)
    return (
        normal(0.5, *kernel),
        normal(0.5, *kernel),
        normal(0.3, kv_heads, case.num_features),
        normal(0.3, kv_heads, case.head_dim, 5),
        normal(0.3, kv_heads, case.head_dim),
        normal(0.3, kv_heads, case.head_dim, 5),
        normal(0.3, kv_heads, case.head_dim),
        normal(1.0, num_heads) - 2.0,  # near and far of a size
    )


def arrays_of(case, **others):
    """Queries, keys and values, then `weights`; some of them others, by name."""
    arrays = dict(zip((*TOKENS, *NAMES), (*case.arrays[:3], *weights(case)), strict=True))
    return tuple((arrays | others).values())


def unpacked(weights, size, only=False):
    """Projections and window of what `NAMES` names."""
    return FeatureProjections(*weights[:5]), Window(size, *weights[5:], only)


def made_once(make):
    """`make`, which gives one function for the same arguments: JAX then compiles it once."""
    made = {}

    @functools.wraps(make)
    def function(*arguments, **options):
        named = (*arguments, *options, *options.values())
        key = tuple(x if isinstance(x, int | str | Case) else id(x) for x in named)
        # The arguments are kept, for as long as an id stands for them.
        return made.setdefault(key, (make(*arguments, **options), named))[0]

    return function


@made_once
def windowed(size, only=False, **options):
    """`linear_attention` as a function of all arrays."""

    def function(query, key, value, *weights):
        projections, window = unpacked(weights, size, only)
        return linear_attention(
            query, key, value, projections, causal=True, window=window, **options
        )

    return function


def attend(case, size, arrays=None, *, jit=DEFAULT_JIT, **options):
    """Output and state."""
    options = {"key_mask": case.key_mask} | options
    return run(windowed(size, **options), *(arrays or arrays_of(case)), jit=jit)


@made_once
def differentiated_scalar(case, size, **options):
    """Of `sum(output * upstream)`, with output and state beside it."""

    def scalar(*arrays):
        output, state = windowed(size, **options)(*arrays)
        return ops.sum(output * ops.convert_to_tensor(case.upstream)), (output, state)

    return differentiated(scalar, has_aux=True)


def attend_with_gradients(case, size, arrays=None, *, jit=DEFAULT_JIT, **options):
    """Output, state, and the gradients of `sum(output * upstream)` by all arrays, by name."""
    function = differentiated_scalar(case, size, **{"key_mask": case.key_mask} | options)
    (_, (output, state)), gradients = run(function, *(arrays or arrays_of(case)), jit=jit)
    return output, state, dict(zip((*TOKENS, *NAMES), gradients, strict=True))


def expected(case, size, arrays=None, only=False, **options):
    query, key, value, *weights = arrays or arrays_of(case)
    options = {"key_mask": case.key_mask} | options
    return windowed_attention_reference(
        query, key, value, *unpacked(weights, size, only), **options
    )


# Outputs.

ODD = {"heads": (4, 2), "value_dim": 6}


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


def in_blocks_of(length, monkeypatch):
    monkeypatch.setattr(partition, "block_length", lambda _: length)


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

    def function(*arrays):
        arrays = [*(ops.cast(x, dtype) for x in arrays[:3]), *arrays[3:]]
        output, state = windowed(16, key_mask=case.key_mask)(*arrays)
        for x in (output, *state):
            assert keras.backend.standardize_dtype(x.dtype) == "float32"
        return output

    assert_close(run(function, *rounded), expected(case, 16, rounded), 1e-5)


def test_window_of_keys_to_come_is_refused():
    case = Case(length=4)
    query, key, value, *weights = arrays_of(case)
    projections, window = unpacked(weights, 2)
    with pytest.raises(ValueError, match="causal=True"):
        linear_attention(query, key, value, projections, window=window)


# Gradients.


@pytest.mark.parametrize("jit", MODES)
def test_gradients_agree_with_differences_of_the_reference(jit, rng):
    case, size, step = Case(length=20, heads=(4, 2), masked=True), 6, 1e-5
    _, _, gradients = attend_with_gradients(case, size, chunk_size=8, jit=jit)
    arrays = dict(zip((*TOKENS, *NAMES), arrays_of(case), strict=True))
    for name, array in arrays.items():
        direction = rng.standard_normal(array.shape)
        above, below = (
            np.sum(
                expected(case, size, arrays_of(case, **{name: array + s * direction}))
                * case.upstream
            )
            for s in (step, -step)
        )
        assert abs(above - below) > 1e-3 * step, name  # it has an influence
        assert_close(np.sum(gradients[name] * direction), (above - below) / (2 * step))


def test_gradients_flow_through_the_state():
    case, size = BLOCKS_CASE, BLOCKS_SIZE

    def scalar(*arrays):
        outputs, state = [], None
        for piece in (slice(0, 30), slice(30, 31), slice(31, 70)):
            output, state = windowed(size, state=state)(
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


def empty_state(case, size, only=False):
    sizes = case.batch, case.heads[1], case.num_features, case.value_dim or case.head_dim
    return initial_state(*sizes, sliding_window=size, head_dim=case.head_dim, window_only=only)


def unscaled(state):
    """The sums themselves, then the window."""
    *sums, key, value, mask = (np.asarray(x, "float64") for x in state)
    if sums:
        kv_state, key_state, log_scale = sums
        scale = np.exp(log_scale)[..., None]
        sums = [kv_state * scale[..., None], key_state * scale]
    return *sums, key, value, mask


def assert_same_state(actual, expected):
    for x, y in zip(unscaled(actual), unscaled(expected), strict=True):
        assert_close(x, y)


def assert_state_is_of(state, key, value, key_mask, case):
    """The last keys, and the sums over those before, of one row `(s, k, ...)`."""
    *sums, last_key, last_value, mask = unscaled(state)
    key, value = (np.where(key_mask[:, None, None], x, 0.0).astype("float64") for x in (key, value))
    size = len(mask)
    for leaf, x in ((last_key, key), (last_value, value), (mask, key_mask)):
        empty = np.zeros((size, *x.shape[1:]))  # what stands before the first token
        np.testing.assert_array_equal(leaf, np.concatenate([empty, x])[-size:])
    if not sums:
        return
    _, key_kernel, bias, norm_kernel, linear = weights(case)[:5]
    key, value, key_mask = (x[: max(len(x) - size, 0)] for x in (key, value, key_mask))
    projected = np.einsum("skh,khr->skr", key, norm_kernel)
    logits = np.einsum("skh,khm->skm", key, key_kernel) + bias
    logits += np.einsum("skh,kh->sk", key, linear)[..., None]
    features = BASE ** (logits - np.sum(projected**2, axis=-1, keepdims=True))
    features *= key_mask[:, None, None]
    kv_state, key_state = sums
    assert_close(kv_state, np.einsum("skm,skv->kmv", features, value))
    assert_close(key_state, features.sum(axis=0))


def mask_for_pieces(case, sizes):
    """Random, and no piece ends with a masked key: those would not count as tokens."""
    rng = np.random.default_rng(3)
    key_mask = rng.random((case.batch, case.length)) < 0.7
    key_mask[:, np.cumsum(sizes) - 1] = True
    return key_mask


def in_pieces(case, size, sizes, key_mask, only=False):
    """Output fed piece by piece, each through the same function, and the last state."""
    weights = arrays_of(case)[3:]

    def step(query, key, value, mask, state):
        function = windowed(size, key_mask=mask, state=state, only=only)
        return function(query, key, value, *map(ops.convert_to_tensor, weights))

    step = compiled(step) if DEFAULT_JIT else step
    outputs, state = [], empty_state(case, size, only)
    shapes = [tuple(x.shape) for x in state]
    for stop, length in zip(np.cumsum(sizes), sizes, strict=True):
        piece = slice(stop - length, stop)
        tokens = (ops.convert_to_tensor(x[:, piece]) for x in case.arrays[:3])
        mask = None if key_mask is None else ops.convert_to_tensor(key_mask[:, piece])
        output, state = step(*tokens, mask, state)
        outputs.append(to_numpy(output))
        assert [tuple(x.shape) for x in state] == shapes
    return np.concatenate(outputs, axis=1), to_numpy(state)


PIECES = [1, 30, 1, 5, 5, 30]


@pytest.mark.parametrize(
    ("size", "sizes", "masked", "only"),
    [
        (16, PIECES, False, False),
        (16, PIECES, True, False),
        (6, [1] * 20, True, False),
        (6, [1, 19, 1, 1], True, True),
    ],
    ids=["pieces", "pieces-masked", "tokens", "window-alone"],
)
def test_sequence_in_pieces_gives_the_outputs_and_the_state_of_the_whole(size, sizes, masked, only):
    case = Case(length=sum(sizes), batch=2, **ODD)
    key_mask = mask_for_pieces(case, sizes) if masked else None
    output, state = in_pieces(case, size, sizes, key_mask, only)
    assert_close(output, expected(case, size, key_mask=key_mask, only=only), 1e-5)
    all_true = np.ones((case.batch, case.length), bool)
    tokens = (*case.arrays[1:3], key_mask if masked else all_true)
    for row in range(case.batch):
        assert_state_is_of([leaf[row] for leaf in state], *(x[row] for x in tokens), case)


def state_of(case, size, **options):
    """`accumulate_state` alone."""

    def function(_, key, value, *weights):
        projections, window = unpacked(weights, size)
        return accumulate_state(key, value, projections, window=window, **options)

    return run(function, *arrays_of(case))


@pytest.mark.parametrize("size", [5, 30])
def test_state_holds_the_last_keys_and_the_sums_over_those_before(size):
    # Padding behind is none of them; what is masked before it takes a place.
    case, before = Case(length=24, batch=4, **ODD), Case(length=20, batch=4, **ODD)
    counts = [24, 17, 3, 0]
    key_mask = np.arange(case.length) < np.array(counts)[:, None]
    key_mask[0, 4] = False
    start = state_of(before, size)
    pairs = zip(before.arrays[1:3], case.arrays[1:3], strict=True)
    tokens = [np.concatenate(pair, axis=1) for pair in pairs]
    all_mask = np.concatenate([np.ones((4, before.length), bool), key_mask], axis=1)
    options = {"key_mask": key_mask, "state": tuple(map(ops.convert_to_tensor, start))}
    for state in (attend(case, size, **options)[1], state_of(case, size, **options)):
        for row, count in enumerate(counts):
            assert_state_is_of(
                [leaf[row] for leaf in state],
                *(x[row, : before.length + count] for x in (*tokens, all_mask)),
                case,
            )


def test_masked_token_of_its_own_leaves_the_state_as_it_was():
    case, size = Case(length=20, batch=2, **ODD), 6
    _, state = attend(case, size)
    token = [x[:, :1] for x in case.arrays[:3]]
    key_mask = np.array([[False], [True]])
    _, after = attend(
        case,
        size,
        (*token, *weights(case)),
        key_mask=key_mask,
        state=tuple(map(ops.convert_to_tensor, state)),
    )
    for before, leaf in zip(state, after, strict=True):
        np.testing.assert_array_equal(leaf[0], before[0])
    for before, leaf in zip(state[-3:-1], after[-3:-1], strict=True):
        np.testing.assert_array_equal(leaf[1, :-1], before[1, 1:])


def test_mask_of_one_row_is_for_all_rows():
    case = Case(length=40, batch=2, heads=(4, 2))
    key_mask = np.arange(40)[None] % 3 < 2
    both = np.repeat(key_mask, 2, axis=0)
    output, state = attend(case, 6, key_mask=key_mask)
    assert_close(output, expected(case, 6, key_mask=both), 1e-5)
    for row in range(2):
        tokens = (x[row] for x in (*case.arrays[1:3], both))
        assert_state_is_of([leaf[row] for leaf in state], *tokens, case)


def test_state_that_nobody_asks_for_may_be_left_out():
    case = Case(length=40, masked=True)

    def function(*arrays):
        output, state = windowed(6, key_mask=case.key_mask, with_state=False)(*arrays)
        assert state is None
        return output

    assert_close(run(function, *arrays_of(case)), expected(case, 6), 1e-5)


# The window alone.


def test_window_alone_needs_no_features():
    case, size = Case(length=70, batch=2, masked=True, **ODD), 16
    window = Window(size, None, None, None, only=True)

    def function(*tokens):
        return linear_attention(*tokens, None, causal=True, key_mask=case.key_mask, window=window)

    output, state = run(function, *case.arrays[:3])
    assert_close(output, expected(case, size, only=True), 1e-5)
    assert [x.shape for x in state] == [(2, size, 2, 8), (2, size, 2, 6), (2, size)]


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

    def step(query, key, value, key_mask, upstream, *weights):
        def scalar(*arrays):
            output, state = windowed(size, key_mask=key_mask)(*arrays)
            return ops.sum(output * upstream), (output, state)

        return differentiated(scalar, has_aux=True)(query, key, value, *weights)

    def inputs(case):
        query, key, value, *weights = arrays_of(case)
        return query, key, value, case.key_mask, case.upstream, *weights

    def spec(index, array):  # the weights know their sizes
        known = array.shape if index > 4 else (None, None, *array.shape[2:])
        return tf.TensorSpec(known, array.dtype)

    signature = [spec(*pair) for pair in enumerate(inputs(cases[0]))]
    function = tf.function(step, input_signature=signature, jit_compile=jit or None)
    for case in cases:
        (_, (output, state)), gradients = to_numpy(function(*inputs(case)))
        assert_close(output, expected(case, size), 1e-5)
        assert_same_state(state, attend(case, size)[1])
        known = attend_with_gradients(case, size)[2]
        for gradient, of_known_sizes in zip(gradients, known.values(), strict=True):
            assert_close(gradient, of_known_sizes)
    assert function.experimental_get_tracing_count() == 1
