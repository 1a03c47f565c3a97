"""No tensor has an element for every pair of a query and a key, and what is kept is little."""

import math
import re

import numpy as np
import pytest
from backends import BACKEND, differentiated, largest_intermediate, torch_operations
from keras import ops

from keras_darkformer.ops import dark_attention, exact_dark_attention, partition

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


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the other backends have remat of their own")
def test_xla_keeps_less_with_remat(monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(partition, "block_length", lambda *_: 64)
    case = Case(length=256, heads=(1, 1))
    tensors = [tf.constant(x) for x in case.arrays]

    def most_bytes(remat):
        def loss(*tensors):
            return ops.sum(dark_attention(*tensors, **case.options, remat=remat))

        gradients = tf.function(differentiated(loss), jit_compile=True)
        ir = gradients.experimental_get_compiler_ir(*tensors)
        return most_bytes_at_once(ir(stage="optimized_hlo"))

    assert most_bytes(True) < 0.75 * most_bytes(False)


def most_bytes_at_once(program):
    """Of float32 results in use at once, in a program of XLA whose lines are in order."""
    entry = program[program.index("\nENTRY") :]
    lines = re.findall(r"^ +(?:ROOT )?%([\w.-]+) = (.+?) ([\w-]+)\((.*)$", entry, re.M)
    behind, sizes, last_use = {}, {}, {}  # behind: the results that a name stands for
    for place, (name, shape, operation, operands) in enumerate(lines):
        used = [x for word in re.findall(r"%([\w.-]+)", operands) for x in behind.get(word, ())]
        last_use |= dict.fromkeys(used, place)
        if operation in ("bitcast", "tuple", "get-tuple-element"):
            behind[name] = used
        elif operation not in ("parameter", "constant"):
            dimensions = [x.split(",") for x in re.findall(r"f32\[([\d,]*)\]", shape)]
            sizes[place] = 4 * sum(math.prod(int(x) for x in sides if x) for sides in dimensions)
            behind[name], last_use[place] = [place], place
    return max(
        sum(size for made, size in sizes.items() if made <= place <= last_use[made])
        for place in range(len(lines))
    )
