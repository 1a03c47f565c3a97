"""TensorFlow, a length known only to the run: blocks in a loop, one trace for all lengths."""

import keras
import numpy as np
import pytest
from backends import BACKEND, MODES, differentiated, to_numpy
from keras import ops, tree

from keras_darkformer.layers import DarkAttention
from keras_darkformer.memory import NO_MEMORY, Memory
from keras_darkformer.ops import dark_attention, partition
from keras_darkformer.ops.state import StateShapes

from .cases import Case, assert_close, reference
from .states import assert_same_state

pytestmark = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="others know every size when they trace"
)
KEPT = Memory(3, 2, 2)
LENGTHS = (61, 0, 1, 16, 17, 40)  # from no token to several blocks, whole and not


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(partition, "block_length", lambda *_: 16)


def case_of(length, causal=True):
    return Case(length=length, heads=(4, 2), batch=2, value_dim=6, causal=causal, masked=True)


def arrays_of(length, memory, causal, goes_on):
    """Query, key, value, key_mask, write_mask, upstream, then the leaves of a state."""
    case, rng = case_of(max(length, 4), causal), np.random.default_rng(1)
    leaves = []
    if goes_on:
        zeros = StateShapes(2, case.num_features, 6, case.head_dim, memory).zeros(2)
        shapes = [tuple(x.shape) for x in tree.flatten(zeros)]
        leaves = [np.abs(rng.standard_normal(shape)).astype("float32") for shape in shapes]
    written = rng.random((2, case.length)) < 0.8
    tokens = (*case.arrays[:3], case.key_mask, written, case.upstream)
    return [x[:, :length] for x in tokens] + leaves


def attend(memory, causal, goes_on, remat=None):
    """A function of `arrays_of` to output, state and the gradients by all that is float."""
    case = case_of(4, causal)
    options = memory._asdict() | {"causal": causal, "return_state": True, "remat": remat}
    geometry, projection = case.arrays[3], case.options["projection"]
    structure = StateShapes(2, case.num_features, 6, case.head_dim, memory).zeros(1)

    def function(query, key, value, key_mask, write_mask, upstream, *leaves):
        masks = {"key_mask": key_mask} | ({"write_mask": write_mask} if causal else {})

        def scalar(query, key, value, geometry, projection, *leaves):
            state = tree.pack_sequence_as(structure, list(leaves)) if goes_on else None
            output, after = dark_attention(
                *(query, key, value, geometry, projection),
                **options,
                **masks,
                initial_state=state,
                chunk_size=4,
            )
            of_state = sum(ops.sum(x**2) for x in tree.flatten(after)[:2])
            return ops.sum(output * upstream) + 0.01 * of_state, (output, after)

        weights = ops.convert_to_tensor(geometry), ops.convert_to_tensor(projection)
        return differentiated(scalar, has_aux=True)(query, key, value, *weights, *leaves)

    return function


def of_unknown_length(function, arrays, jit):
    import tensorflow as tf

    sizes = [(None, None) if i < 6 else (None,) for i in range(len(arrays))]
    signature = [
        tf.TensorSpec((*size, *x.shape[len(size) :]), x.dtype)
        for size, x in zip(sizes, arrays, strict=True)
    ]
    return tf.function(function, input_signature=signature, jit_compile=jit or None)


@pytest.mark.parametrize("jit", MODES[-1:])
@pytest.mark.parametrize(
    ("memory", "causal", "goes_on", "remat"),
    [
        pytest.param(NO_MEMORY, True, False, None, id="causal"),
        pytest.param(NO_MEMORY, True, True, True, id="remat", marks=pytest.mark.slow),
        pytest.param(NO_MEMORY, False, True, None, id="bidirectional, goes on"),
        pytest.param(KEPT, True, True, None, id="memory, goes on", marks=pytest.mark.slow),
    ],
)
def test_one_trace_gives_what_each_length_gives_by_itself(memory, causal, goes_on, remat, jit):
    function = attend(memory, causal, goes_on, remat)
    traced = of_unknown_length(function, arrays_of(4, memory, causal, goes_on), jit)
    for length in LENGTHS[:3] if jit else LENGTHS:
        arrays = arrays_of(length, memory, causal, goes_on)
        (_, (output, state)), gradients = to_numpy(traced(*arrays))
        (_, (expected, after)), by_itself = to_numpy(function(*map(ops.convert_to_tensor, arrays)))
        assert_same_state(state, after)
        for x, y in zip((output, *gradients), (expected, *by_itself), strict=True):
            assert x.shape == y.shape
            if x.size:
                assert_close(x, y)
    assert traced.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_output_and_gradients_of_several_blocks_agree_with_the_reference(causal):
    def step(query, key, value, key_mask, upstream):
        def scalar(*tensors):
            output = dark_attention(
                *tensors, geometry, projection, causal=causal, key_mask=key_mask, chunk_size=4
            )
            return ops.sum(output * upstream), output

        return differentiated(scalar, has_aux=True)(query, key, value)

    import tensorflow as tf

    def spec(x):
        return tf.TensorSpec((None, None, *x.shape[2:]), x.dtype)

    def inputs(case):
        return *case.arrays[:3], case.key_mask, case.upstream

    case = case_of(61, causal)
    geometry, projection = case.arrays[3], case.options["projection"]
    traced = tf.function(step, input_signature=[spec(x) for x in inputs(case)])
    (_, output), gradients = to_numpy(traced(*inputs(case)))
    expected, expected_gradients = reference(case)
    assert_close(output, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients[:3], strict=True):
        assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_features_are_made_in_a_loop_only(causal):
    """Those of all tokens at once would take the memory that blocks save."""
    import tensorflow as tf

    case = case_of(4, causal)
    geometry, projection = case.arrays[3], case.options["projection"]

    def function(*tensors):
        return dark_attention(*tensors, geometry, projection, causal=causal, chunk_size=4)

    signature = [tf.TensorSpec((2, None, *x.shape[2:]), x.dtype) for x in case.arrays[:3]]
    graph = tf.function(function, input_signature=signature).get_concrete_function().graph
    kinds = [x.type for x in graph.get_operations()]
    assert sum("While" in kind for kind in kinds) == (1 if causal else 2)
    assert "Exp" not in kinds
    assert any(x.op == "Exp" for f in graph.as_graph_def().library.function for x in f.node_def)


@pytest.mark.parametrize("jit", MODES[:1])
def test_a_layer_trains_and_predicts_at_lengths_known_only_to_the_run(jit, rng):
    heads = {"head_dim": 4, "num_query_heads": 2, "num_key_value_heads": 1}
    layer = DarkAttention(**heads, num_features=8, chunk_size=4)
    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True))
    model.compile("sgd", "mse", jit_compile=jit)
    batches = [rng.standard_normal((2, n, 8)).astype("float32") for n in (40, 17, 3)]
    for x in batches:
        expected = to_numpy(layer(x, x, use_causal_mask=True))
        assert_close(model.predict(x, verbose=0), expected)
    losses = [model.fit(x, 0 * x, verbose=0).history["loss"][0] for x in batches * 3]
    assert losses[-3] < losses[0]
