"""No tensor on the way has an element for every pair of a query and a key."""

import numpy as np
import pytest
from backends import BACKEND, differentiated, largest_intermediate, torch_operations
from keras import ops

from keras_darkformer.ops import dark_attention, exact_dark_attention

from .cases import Case

LENGTH = 4096
PAIRS = LENGTH * LENGTH
KEY_MASK = np.arange(LENGTH)[None] < LENGTH - 5

causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
masked_or_not = pytest.mark.parametrize("key_mask", [None, KEY_MASK], ids=["", "masked"])


def case_and_attention(causal, key_mask):
    case = Case(length=LENGTH, heads=(1, 1), causal=causal)
    options = case.options | {"key_mask": key_mask}
    return case, lambda *tensors: dark_attention(*tensors, **options)


@causal_or_not
@masked_or_not
def test_attention_makes_no_tensor_of_all_pairs(causal, key_mask):
    case, attention = case_and_attention(causal, key_mask)
    assert largest_intermediate(attention, *case.arrays) < PAIRS


@causal_or_not
@masked_or_not
def test_gradients_make_no_tensor_of_all_pairs(causal, key_mask):
    case, attention = case_and_attention(causal, key_mask)
    gradients = differentiated(lambda *tensors: ops.sum(attention(*tensors)))
    assert largest_intermediate(gradients, *case.arrays) < PAIRS


@pytest.mark.skipif(BACKEND != "torch", reason="others fuse what is made block by block")
@pytest.mark.parametrize("recorded", [False, True], ids=["", "for gradients"])
def test_of_long_outputs_there_is_one_where_nothing_is_recorded(recorded):
    import torch

    case, attention = case_and_attention(True, None)
    tensors = [torch.tensor(x, requires_grad=recorded) for x in case.arrays]
    ways = {"aten.stack.default", "aten.new_empty.default"}
    operations = {name for name, _ in torch_operations(attention, *tensors)}
    assert operations & ways == {"aten.stack.default" if recorded else "aten.new_empty.default"}
    assert attention(*tensors).requires_grad == recorded


@causal_or_not
def test_exact_attention_makes_one_so_that_the_check_can_fail(causal):
    if BACKEND == "torch" and not causal:
        pytest.skip("torch's fused kernel makes none either; of the causal mask there is one")
    arrays = Case(length=LENGTH, heads=(1, 1)).arrays

    def attention(*tensors):
        return exact_dark_attention(*tensors, causal=causal, key_mask=KEY_MASK)

    assert largest_intermediate(attention, *arrays) >= PAIRS
