"""`dark_attention` on random calls of every kind, against the float64 reference."""

import dataclasses

import numpy as np
from backends import BACKEND, compiled, differentiated, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from properties import tried

from keras_darkformer.memory import NO_MEMORY, Memory
from keras_darkformer.ops import dark_attention, draw_projection
from keras_darkformer.ops.features import DarkParameters, fold, fold_query_scale
from keras_darkformer.ops.reference import dark_attention_reference, memory_attention_reference

LENGTHS = [1, 0, 2, 5, 12]
POISONS = [0.0, np.nan, np.inf, 1e30]
TOLERANCES = {"float32": 3e-4, "float64": 3e-4, "bfloat16": 2e-2, "float16": 3e-3}
MEMORIES = [NO_MEMORY, Memory(1), Memory(3, 2), Memory(None, 2), Memory(3, 1, 2), Memory(20, 2, 3)]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A call of `dark_attention`; numbers are drawn by the seed."""

    seed: int
    batch: int
    query_length: int
    key_length: int
    kv_heads: int
    groups: int
    head_dim: int
    value_dim: int
    num_features: int
    causal: bool
    memory: Memory
    dtype: str
    masked: str  # "", "rows", or "row" for one mask of all rows
    poison: float
    shifted: bool
    untied: bool
    plain: bool  # without a geometry
    chunk_size: int | None
    remat: bool | None
    first_piece: int | None  # keys of a first call, whose state goes into the second


@st.composite
def samples(draw):
    memory = draw(st.sampled_from(MEMORIES))
    causal = bool(memory) or draw(st.booleans())
    length = draw(st.sampled_from(LENGTHS))
    key_length = length if causal else draw(st.sampled_from(LENGTHS))
    untied = draw(st.booleans())
    pieces = draw(st.booleans())
    return Sample(
        seed=draw(st.integers(0, 999)),
        batch=draw(st.sampled_from([1, 2, 0])),
        query_length=length,
        key_length=key_length,
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([4, 1, 6])),
        value_dim=draw(st.integers(1, 3)),
        num_features=draw(st.sampled_from([5, 1, 16])),
        causal=causal,
        memory=memory,
        dtype=draw(st.sampled_from(list(TOLERANCES))),
        masked=draw(st.sampled_from(["", "rows", "row"])),
        poison=draw(st.sampled_from(POISONS)),
        shifted=draw(st.booleans()),
        untied=untied,
        plain=not untied and not memory.cache_size and draw(st.booleans()),
        chunk_size=draw(st.sampled_from([None, 1, 4])),
        remat=draw(st.sampled_from([None, True])),
        first_piece=draw(st.integers(0, key_length)) if pieces else None,
    )


class Arrays:
    """The numbers of a sample: `tokens`, `parameters` by name, `mask` and `upstream`."""

    def __init__(self, sample):
        rng, x = np.random.default_rng(sample.seed), sample
        heads, h, m = x.kv_heads, x.head_dim, x.num_features

        def normal(scale, *shape):
            return (scale * rng.standard_normal(shape)).astype("float32")

        def rounded(array):
            return to_numpy(ops.cast(ops.cast(array, x.dtype), "float32"))

        tokens = [
            normal(1.0, x.batch, x.query_length, heads * x.groups, h),
            normal(1.0, x.batch, x.key_length, heads, h),
            normal(1.0, x.batch, x.key_length, heads, x.value_dim),
        ]
        self.tokens = [rounded(array) for array in tokens]
        eye = np.eye(h, dtype="float32")
        self.parameters = {
            "geometry": np.stack([eye] * heads) + (0 if x.plain else normal(0.3, heads, h, h)),
            "projection": np.stack([draw_projection(m, h, seed=rng) for _ in range(heads)]),
            "query_geometry": eye + normal(0.3, heads, h, h) if x.untied else None,
            "log_weight": normal(0.3, heads, m) if x.shifted else None,
            "query_shift": normal(0.5, heads, h) if x.shifted else None,
            "key_shift": normal(0.5, heads, h) if x.shifted else None,
        }
        self.mask = None
        if x.masked:
            rows = 1 if x.masked == "row" else x.batch
            self.mask = rng.random((rows, x.key_length)) < 0.6
            if x.memory and x.first_piece is not None:
                # Behind the last real token of a piece padding leaves no trace.
                self.mask[:, [i - 1 for i in (x.first_piece, x.key_length) if i]] = True
        self.full_mask = np.ones((x.batch, x.key_length), bool)
        if self.mask is not None:
            self.full_mask = np.broadcast_to(self.mask, self.full_mask.shape)
        self.upstream = normal(1.0, x.batch, x.query_length, heads * x.groups, x.value_dim)

    def poisoned(self, value):
        """The tokens as they are given: anything may stand where keys are masked."""
        query, *others = self.tokens
        there = self.full_mask[:, :, None, None]
        return [query, *(np.where(there, x, value).astype("float32") for x in others)]


def computed(sample, arrays):
    """The output, and gradients of its product with `upstream` by query, key and value."""
    options = dict(
        **sample.memory._asdict(),
        causal=sample.causal,
        chunk_size=sample.chunk_size,
        remat=sample.remat,
    )
    first = sample.first_piece

    def attend(query, key, value, parameters, **more):
        geometry = None if sample.plain else parameters["geometry"]
        others = {name: x for name, x in parameters.items() if name != "geometry"}
        tokens = (ops.cast(x, sample.dtype) for x in (query, key, value))
        return dark_attention(*tokens, geometry, **others, **options, **more)

    def scalar(query, key, value, parameters, mask, upstream):
        if first is None:
            output = attend(query, key, value, parameters, key_mask=mask)
        else:
            part, rest = slice(first), slice(first, None)
            masks = (None, None) if mask is None else (mask[:, part], mask[:, rest])
            queries = (query[:, part], query[:, rest]) if sample.causal else (query, query)
            before, state = attend(
                queries[0],
                key[:, part],
                value[:, part],
                parameters,
                key_mask=masks[0],
                return_state=True,
            )
            output = attend(
                queries[1],
                key[:, rest],
                value[:, rest],
                parameters,
                key_mask=masks[1],
                initial_state=state,
            )
            if sample.causal:
                output = ops.concatenate([before, output], axis=1)
        output = ops.cast(output, "float32")
        return ops.sum(output * upstream), output

    def function(tokens, parameters, mask, upstream):
        def of_tokens(*tokens):
            return scalar(*tokens, parameters, mask, upstream)

        return differentiated(of_tokens, has_aux=True)(*tokens)

    function = compiled(function) if BACKEND == "jax" else function
    tokens = [ops.convert_to_tensor(x) for x in arrays.poisoned(sample.poison)]
    given = {
        name: None if x is None else ops.convert_to_tensor(x)
        for name, x in arrays.parameters.items()
    }
    mask = None if arrays.mask is None else ops.convert_to_tensor(arrays.mask)
    (_, output), gradients = function(tokens, given, mask, ops.convert_to_tensor(arrays.upstream))
    return to_numpy(output), [to_numpy(x) for x in gradients]


def expected(sample, arrays):
    """The same in float64; no gradients where keys are kept."""
    memory, parameters = sample.memory, arrays.parameters
    mask = arrays.full_mask
    if not memory.cache_size:
        sizes = {"sliding_window": memory.sliding_window, "num_sinks": memory.num_sinks}
        output, gradients = dark_attention_reference(
            *arrays.tokens,
            **parameters,
            **sizes,
            causal=sample.causal,
            key_mask=mask,
            upstream=arrays.upstream,
        )
        return output, gradients[:3]
    tensors = [None if x is None else ops.convert_to_tensor(x) for x in parameters.values()]
    sizes = sample.kv_heads, sample.head_dim
    named = dict(zip(parameters, tensors, strict=True))
    features = fold(DarkParameters(**named), *sizes)
    scale = fold_query_scale(DarkParameters(**named), *sizes, sample.kv_heads * sample.groups, None)
    features = features._replace(
        **{n: to_numpy(x) for n, x in features._asdict().items() if x is not None},
    )
    features = features._replace(query_scale=type(scale)(*map(to_numpy, scale)))
    return memory_attention_reference(*arrays.tokens, features, memory, key_mask=mask), None


def assert_near(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    error = np.abs(actual - expected).max(initial=0.0)
    assert error <= tolerance * max(1.0, np.abs(expected).max(initial=0.0))


@tried()
@given(samples())
def test_every_call_agrees_with_the_reference(sample):
    arrays, tolerance = Arrays(sample), TOLERANCES[sample.dtype]
    output, gradients = computed(sample, arrays)
    expected_output, expected_gradients = expected(sample, arrays)
    assert_near(output, expected_output, tolerance)
    for index, gradient in enumerate(gradients):
        assert np.isfinite(gradient).all()
        if expected_gradients is not None:
            assert_near(gradient, expected_gradients[index], 4 * tolerance)
