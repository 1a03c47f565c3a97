"""`attend` with an exact memory as a function of all arrays, and what the reference makes of it."""

import functools

import numpy as np
from backends import DEFAULT_JIT, differentiated, run
from keras import ops

from keras_darkformer.memory import Memory
from keras_darkformer.ops import attention, partition
from keras_darkformer.ops.features import FoldedFeatures, QueryScale
from keras_darkformer.ops.reference import memory_attention_reference
from keras_darkformer.ops.state import StateShapes

from .cases import Case, assert_close
from .states import in_pieces

ODD = {"heads": (4, 2), "value_dim": 6}
NAMES = (*FoldedFeatures._fields[:-1], *QueryScale._fields)
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


def folded(weights):
    """Features of what `NAMES` names; no features of nothing."""
    if not weights:
        return None
    return FoldedFeatures(*weights[:5], QueryScale(*weights[5:]))


# A bias that leaves the far part out.
WINDOW_ALONE = np.full(4, -1e30, "float32")


def made_once(make):
    """`make`, which gives one function for the same arguments: JAX then compiles it once."""
    made = {}

    @functools.wraps(make)
    def function(*arguments, **options):
        named = (*arguments, *options, *options.values())
        key = tuple(x if isinstance(x, int | str | Case | Memory) else id(x) for x in named)
        # The arguments are kept, for as long as an id stands for them.
        return made.setdefault(key, (make(*arguments, **options), named))[0]

    return function


def memory_of(size):
    """A memory, or a window of so many tokens."""
    return size if isinstance(size, Memory) else Memory(size)


@made_once
def windowed(size, **options):
    """`attend` as a function of all arrays."""
    options = {"return_state": True} | options

    def function(query, key, value, *weights):
        features = folded(weights)
        return attention.attend(
            query, key, value, features, memory=memory_of(size), causal=True, **options
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
    names = (*TOKENS, *NAMES) if arrays is None or len(arrays) > len(TOKENS) else TOKENS
    return output, state, dict(zip(names, gradients, strict=True))


def expected(case, size, arrays=None, **options):
    query, key, value, *weights = arrays or arrays_of(case)
    options = {"key_mask": case.key_mask} | options
    return memory_attention_reference(
        query, key, value, folded(weights), memory_of(size), **options
    )


def attend_in_pieces(case, size, arrays, sizes, key_mask):
    """Output and state of pieces of these lengths, each with the state of those before."""
    features = [ops.convert_to_tensor(x) for x in arrays[3:]]

    def step(query, key, value, mask, state):
        function = windowed(size, key_mask=mask, initial_state=state)
        return function(query, key, value, *features)

    empty = shapes_of(case, size, num_features=None if features else 0).zeros(case.batch)
    return in_pieces(step, empty, arrays[:3], key_mask, sizes)


def in_blocks_of(length, monkeypatch):
    monkeypatch.setattr(partition, "block_length", lambda *_: length)


def shapes_of(case, size, num_features=None):
    value_dim = case.value_dim or case.head_dim
    num_features = case.num_features if num_features is None else num_features
    return StateShapes(case.heads[1], num_features, value_dim, case.head_dim, memory_of(size))


def assert_gradients_are_differences(gradients, case, memory, rng, *, step):
    """Gradients of `sum(output * upstream)` by their arrays are what the reference changes by."""
    arrays = dict(zip((*TOKENS, *NAMES), arrays_of(case), strict=True))
    arrays = {name: arrays[name] for name in gradients}
    for name, array in arrays.items():
        direction = rng.standard_normal(array.shape)
        above, below = (
            np.sum(
                expected(case, memory, tuple((arrays | {name: array + s * direction}).values()))
                * case.upstream
            )
            for s in (step, -step)
        )
        assert abs(above - below) > 1e-3 * step, name  # it has an influence
        assert_close(np.sum(gradients[name] * direction), (above - below) / (2 * step))
