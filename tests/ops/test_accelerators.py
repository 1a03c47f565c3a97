"""What an accelerator changes, tried on a CPU: products of bfloat16, and larger blocks."""

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES
from keras import ops

from keras_darkformer.ops import attention, backend, dark_attention, partition
from keras_darkformer.ops.attention import accumulate
from keras_darkformer.ops.features import DarkParameters, fold

from .cases import Case, assert_close, attend_with_gradients, reference

CASES = {
    "causal": Case(length=100, heads=(4, 2), causal=True, masked=True, shifted=True),
    "bidirectional": Case(length=100, heads=(4, 2), masked=True),
    "memory": Case(length=100, heads=(4, 2), causal=True, window=8, num_sinks=2),
}


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(attention, "products_dtype", lambda _: "bfloat16")


@pytest.mark.parametrize("jit", MODES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_products_of_bfloat16_round_as_much_as_its_outputs(case, narrow, jit):
    output, gradients = attend_with_gradients(case, jit=jit)
    expected, expected_gradients = reference(case)
    step = 2**-8  # of bfloat16, between two numbers
    assert_close(output, expected, 3 * step)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, wanted, 4 * step)
    error = np.abs(np.asarray(output) - expected).max() / np.abs(expected).max()
    assert error > step / 100  # or nothing was rounded


def test_the_state_stays_in_float32(narrow):
    case = CASES["causal"]
    query, key, value, geometry = map(ops.convert_to_tensor, case.arrays)
    state = dark_attention(query, key, value, geometry, **case.options, return_state=True)[1]
    names = "projection", "query_geometry", "log_weight", "query_shift", "key_shift"
    rest = (case.options.get(name) for name in names)
    features = fold(DarkParameters(*backend.numbers(geometry, *rest)), 2, case.head_dim)
    mask = ops.convert_to_tensor(case.key_mask)
    alone = accumulate(key, value, features, key_mask=mask)
    for leaf, other in zip(state, alone, strict=True):
        assert keras.backend.standardize_dtype(leaf.dtype) == "float32"
        assert_close(ops.convert_to_numpy(leaf), ops.convert_to_numpy(other), 0.02)


def test_products_are_as_wide_as_inputs_on_an_accelerator_alone(monkeypatch):
    for is_there, dtype, expected in (
        (True, "bfloat16", "bfloat16"),
        (True, "float16", "float32"),
        (True, "float32", "float32"),
        (False, "bfloat16", "float32"),
    ):
        monkeypatch.setattr(backend, "accelerated", lambda is_there=is_there: is_there)
        assert backend.products_dtype(dtype) == expected


def test_blocks_of_an_accelerator_hold_the_tokens_of_all_rows(monkeypatch):
    for module in (backend, partition):
        monkeypatch.setattr(module, "accelerated", lambda: True)
    most = backend.ACCELERATOR_TOKENS
    assert backend.block_length(most) == most
    assert backend.block_length(most, 2) == max(most // 2, backend.LEAST_BLOCK)
    assert backend.block_length(most, 10_000) == backend.LEAST_BLOCK
    if BACKEND == "torch":
        assert backend.block_length(None, None) == most  # as many rows as the run has
    chunk = backend.ACCELERATOR_CHUNK or 32
    assert partition.chunk_partition(4 * most, 1, 64, 8, None) == (4, most // chunk, chunk)
