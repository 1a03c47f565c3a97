"""`torch.compile` makes one graph of attention, and one for all lengths of as many blocks."""

import numpy as np
import pytest
from backends import BACKEND, to_numpy

from keras_darkformer.memory import NO_MEMORY, Memory
from keras_darkformer.ops import dark_attention, partition

from .cases import Case, assert_close

if BACKEND != "torch":
    pytest.skip("a compiler of torch", allow_module_level=True)

import torch


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(partition, "block_length", lambda *_: 32)


class Graphs:
    """A backend that runs the graphs as they are, and keeps them."""

    def __init__(self):
        self.made = []

    def __call__(self, module, inputs):
        self.made.append(module)
        return module.forward


def attend(memory=NO_MEMORY, causal=True):
    case = Case(causal=causal)
    geometry, projection = (torch.tensor(x) for x in (case.arrays[3], case.options["projection"]))
    options = memory._asdict() | {"causal": causal, "chunk_size": 8}

    def function(query, key, value):
        return dark_attention(query, key, value, geometry, projection, **options)

    return function


def tokens_of(length):
    tokens = [torch.tensor(x) for x in Case(length=length).arrays[:3]]
    for x in tokens:
        torch._dynamo.mark_dynamic(x, 1)
    return tokens


@pytest.mark.parametrize(
    ("memory", "causal", "lengths"),
    [
        # A sequence that fills its chunks goes without padding: a graph of its own.
        pytest.param(NO_MEMORY, True, {20: 1, 31: 1, 32: 2, 42: 3, 25: 3}, id="causal"),
        pytest.param(NO_MEMORY, False, {20: 1, 63: 1, 65: 2}, id="bidirectional"),
        # The keys that are kept compete chunk by chunk: a graph for each number of chunks.
        pytest.param(Memory(3, 2, 2), True, {10: 1, 13: 1}, id="kept", marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_all_lengths_of_as_many_blocks(memory, causal, lengths):
    function, graphs = attend(memory, causal), Graphs()
    program = torch.compile(function, backend=graphs, fullgraph=True)
    for length, count in lengths.items():
        tokens = tokens_of(length)
        assert_close(to_numpy(program(*tokens)), to_numpy(function(*tokens)), 1e-6)
        assert len(graphs.made) == count, length


def test_gradients_go_through_one_graph():
    function = attend()
    program = torch.compile(function, backend="aot_eager", fullgraph=True)
    found = []
    for call in (program, function):
        tokens = [x.requires_grad_() for x in tokens_of(20)]
        found.append(torch.autograd.grad(torch.sum(call(*tokens) ** 2), tokens))
    for actual, expected in zip(*found, strict=True):
        assert_close(to_numpy(actual), to_numpy(expected), 1e-6)


@pytest.mark.parametrize("length", [0, 1, 7])
def test_the_shortest_lengths(length):
    function = attend()
    program = torch.compile(function, backend="eager", fullgraph=True)
    tokens = [torch.tensor(x[:, :length]) for x in Case(length=max(1, length)).arrays[:3]]
    output, expected = to_numpy(program(*tokens)), to_numpy(function(*tokens))
    np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)
