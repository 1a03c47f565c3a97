"""`dark_attention` against the float64 reference, at awkward sizes."""

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES, differentiated, hessian_product, to_numpy, value_and_gradients
from keras import ops

from keras_darkformer.ops import dark_attention, partition
from keras_darkformer.ops.reference import dark_attention_reference

from .cases import Case, assert_close, attend, attend_with_gradients, reference
from .states import assert_state_is_of

DTYPES = ["float32", "bfloat16", "float16"]
ODD = {"rank": 5, "value_dim": 6, "masked": True, "weighted": True}

# Every backend and mode runs these.
CORE_CASES = [
    Case(length=1, causal=True),
    Case(length=63, heads=(4, 2), batch=2, causal=True, **ODD),
    Case(length=63, heads=(4, 1), batch=2, **ODD),
    Case(length=500, heads=(4, 2), causal=True, masked=True),
]
# Compiling costs TensorFlow seconds a case: it runs these without.
MORE_CASES = [
    Case(length=1),
    Case(length=1, heads=(4, 2), batch=2, causal=True, weighted=True),
    Case(length=63, heads=(4, 1), causal=True, shared=True, rank=11),
    Case(length=500, heads=(4, 1), batch=2, causal=True, value_dim=3),
    Case(length=500, heads=(2, 2), batch=2, shared=True, **ODD),
    Case(length=600, heads=(4, 2), masked=True),
    Case(length=600, heads=(4, 1), causal=True, **ODD),
    Case(length=600, heads=(2, 2), batch=2, causal=True),
    Case(length=1300, heads=(1, 1), causal=True, masked=True),  # several blocks
    Case(length=37, key_length=80, heads=(4, 2), batch=2, **ODD),  # cross attention
    Case(length=80, key_length=2, heads=(4, 1), batch=2),
    Case(length=1, key_length=80),
]


def assert_agrees_with_reference(case, jit):
    output, gradients = attend_with_gradients(case, jit=jit)
    expected, expected_gradients = reference(case)
    assert_close(output, expected)
    for name in gradients._fields:
        assert_close(getattr(gradients, name), getattr(expected_gradients, name))
    if case.masked and case.causal:
        # The first tokens of the first row have nothing to attend to.
        assert not output[0, :3].any()
        assert not any(gradient[0, :3].any() for gradient in gradients[:3])


@pytest.mark.parametrize("jit", MODES)
@pytest.mark.parametrize("case", CORE_CASES, ids=str)
def test_output_and_gradients_agree_with_the_reference(case, jit):
    assert_agrees_with_reference(case, jit)


@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_output_and_gradients_agree_with_the_reference_at_more_sizes(case):
    assert_agrees_with_reference(case, MODES[0].values[0])


def test_projection_and_log_weight_can_be_trained(rng):
    case = Case(length=20, heads=(4, 2), causal=True, weighted=True)
    names, step = ("projection", "log_weight"), 1e-5
    weights = [case.options[name] for name in names]

    def scalar(*weights):
        output = dark_attention(
            *case.arrays, **case.options | dict(zip(names, weights, strict=True))
        )
        return ops.sum(output * ops.convert_to_tensor(case.upstream))

    def scalar_reference(**changes):
        output, _ = dark_attention_reference(*case.arrays, **case.options | changes)
        return np.sum(output * case.upstream)

    _, gradients = value_and_gradients(scalar, *weights)
    for name, weight, gradient in zip(names, weights, gradients, strict=True):
        direction = rng.standard_normal(weight.shape)
        above, below = (scalar_reference(**{name: weight + s * direction}) for s in (step, -step))
        assert_close(np.sum(gradient * direction), (above - below) / (2 * step))


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 5000])
def test_chunk_size_does_not_change_the_output(chunk_size):
    case = Case(length=200, heads=(4, 2), batch=2, causal=True, masked=True)
    assert_close(attend(case, chunk_size=chunk_size), reference(case)[0], 1e-5)


def test_chunk_size_does_not_change_the_gradients():
    case = Case(length=100, heads=(4, 2), causal=True, masked=True)
    _, gradients = attend_with_gradients(case, chunk_size=7)
    for gradient, expected in zip(gradients, reference(case)[1], strict=True):
        assert_close(gradient, expected)


@pytest.mark.parametrize("remat", [True, False], ids=["remat", "kept"])
@pytest.mark.parametrize(
    "causal",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["causal", "bidirectional"],
)
def test_second_derivatives_agree_with_differences_of_gradients(causal, remat, monkeypatch):
    monkeypatch.setattr(partition, "block_length", lambda *_: 8)  # some blocks
    case = Case(length=40, causal=causal, num_features=8)
    query, key, value, geometry = case.arrays
    direction = np.random.default_rng(2).standard_normal(key.shape).astype("float32")

    def scalar(key):
        output = dark_attention(query, key, value, geometry, **case.options, remat=remat)
        return ops.sum(output * ops.convert_to_tensor(case.upstream))

    def gradient(step):
        arrays = query, key.astype("float64") + step * direction, value, geometry
        return dark_attention_reference(*arrays, **case.options, upstream=case.upstream)[1].key

    expected = (gradient(1e-4) - gradient(-1e-4)) / 2e-4
    assert_close(hessian_product(scalar, key, direction), expected)


@pytest.mark.parametrize("jit", MODES)
@pytest.mark.parametrize("remat", [True, False], ids=["remat", "kept"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_remat_changes_neither_output_nor_gradients(causal, remat, jit):
    case = Case(length=1100, heads=(2, 1), causal=causal, masked=True, weighted=True)
    output, gradients = attend_with_gradients(case, remat=remat, jit=jit)
    expected, expected_gradients = reference(case)
    assert_close(output, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_no_geometry_is_the_identity(causal):
    case = Case(length=200, heads=(4, 2), causal=causal, **ODD | {"rank": None})
    arrays = case.replaced(geometry=np.stack([np.eye(case.head_dim, dtype="float32")] * 2))
    expected, expected_gradients = dark_attention_reference(
        *arrays, **case.options, upstream=case.upstream
    )

    def function(query, key, value, _, **options):
        return dark_attention(query, key, value, None, **options)

    output, gradients = attend_with_gradients(case, function=function)
    assert_close(output, expected)
    for gradient, expected_gradient in zip(gradients[:3], expected_gradients[:3], strict=True):
        assert_close(gradient, expected_gradient)


def attention_of(dtype):
    """`dark_attention` with inputs cast to `dtype`; it checks the dtypes it returns."""

    def function(*tensors, **options):
        tensors = [ops.cast(x, dtype) for x in tensors]
        output, state = dark_attention(*tensors, **options, return_state=True)
        assert keras.backend.standardize_dtype(output.dtype) == dtype
        assert {keras.backend.standardize_dtype(x.dtype) for x in state} == {"float32"}
        return ops.cast(output, "float32")

    return function


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_has_the_dtype_of_the_inputs_and_the_state_is_float32(dtype):
    case = Case(length=70, causal=True)
    output = attend(case, function=attention_of(dtype))
    # Rounding the inputs is all that half precision costs: they keep 8 or 11 bits.
    assert_close(output, reference(case)[0], 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_of_large_inputs_stay_finite(dtype):
    case = Case(length=8192, heads=(1, 1), head_dim=16, causal=True, scale=3.0)
    output, gradients = attend_with_gradients(case, function=attention_of(dtype))
    assert np.isfinite(output).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert gradient.any()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="others know every size when they trace")
@pytest.mark.parametrize("jit", MODES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_tensorflow_sizes_may_be_unknown_until_the_run(causal, jit):
    import tensorflow as tf

    cases = [
        Case(length=length, heads=(4, 2), batch=batch, causal=causal, masked=True)
        for length, batch in ((63, 1), (130, 2), (4, 3))
    ]

    def step(query, key, value, geometry, projection, key_mask, write_mask, upstream):
        options = {"causal": causal, "key_mask": key_mask, "return_state": True}
        if causal:
            options["write_mask"] = write_mask

        def scalar(*tensors):
            output, state = dark_attention(*tensors, projection, **options)
            return ops.sum(output * upstream), (output, state)

        return differentiated(scalar, has_aux=True)(query, key, value, geometry)

    def write_mask(case):
        half = np.arange(case.length) < case.length // 2 + np.arange(case.batch)[:, None]
        return half if causal else np.ones_like(half)

    def inputs(case):  # those of three dimensions have neither batch nor length
        masks = case.key_mask, write_mask(case)
        return *case.arrays, case.options["projection"], *masks, case.upstream

    def spec(array):
        batch_and_length = [None, None] if array.ndim != 3 else array.shape[:2]
        return tf.TensorSpec([*batch_and_length, *array.shape[2:]], array.dtype)

    signature = [spec(array) for array in inputs(cases[0])]
    function = tf.function(step, input_signature=signature, jit_compile=jit or None)
    for case in cases:
        (_, (output, state)), gradients = to_numpy(function(*inputs(case)))
        assert_state_is_of(state, case, written=case.key_mask & write_mask(case))
        expected, expected_gradients = reference(case)
        assert_close(output, expected)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert_close(gradient, expected_gradient)
    assert function.experimental_get_tracing_count() == 1
