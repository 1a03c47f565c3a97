"""Random inputs of an attention call, and what the reference makes of them."""

import dataclasses
import functools

import numpy as np
from backends import DEFAULT_JIT, compiled, to_numpy, value_and_gradients
from keras import ops, tree

from keras_darkformer.ops import dark_attention, draw_projection, partition
from keras_darkformer.ops.reference import Gradients, dark_attention_reference


@dataclasses.dataclass(frozen=True)
class Case:
    """Equal cases hold equal numbers."""

    length: int = 63
    key_length: int | None = None  # None: as length
    heads: tuple[int, int] = (2, 2)  # query heads, key/value heads
    batch: int = 1
    head_dim: int = 8
    rank: int | None = None  # None: as head_dim
    value_dim: int | None = None  # None: as head_dim
    num_features: int = 16
    causal: bool = False
    masked: bool = False  # random, and the first three tokens of the first row
    weighted: bool = False  # with log_weight
    untied: bool = False  # with query_geometry
    shifted: bool = False  # with query_shift and key_shift
    window: int | None = None  # with sliding_window and far_offset
    num_sinks: int = 0  # with far_offset
    window_alone: bool = False  # with a far_offset that leaves the far part out
    shared: bool = False  # one projection for all heads
    scale: float = 1.0

    def __str__(self):
        fields = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        changed = {name: value for name, (value, default) in fields.items() if value != default}
        named = (
            name if value is True else f"{name}={value}".replace(" ", "")
            for name, value in changed.items()
        )
        return "-".join(named) or "default"

    @functools.cached_property
    def arrays(self):
        """Query, key, value and geometry: what gradients are taken by."""
        return _draw(self)[:4]

    @functools.cached_property
    def options(self):
        """The other arguments of `dark_attention`, by name."""
        return _draw(self)[4]

    @functools.cached_property
    def upstream(self):
        """The gradient of the scalar that tests differentiate, by the output."""
        return _draw(self)[5]

    @property
    def key_mask(self):
        return self.options["key_mask"]

    def replaced(self, **arrays):
        """`arrays` with some of them others, by name."""
        return Gradients(*self.arrays)._replace(**arrays)


@functools.lru_cache
def _draw(case):
    rng = np.random.default_rng([case.length, *case.heads, case.batch])
    num_heads, kv_heads = case.heads
    head_dim, key_length = case.head_dim, case.key_length or case.length
    rank, value_dim = case.rank or head_dim, case.value_dim or head_dim

    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    query = case.scale * normal(case.batch, case.length, num_heads, head_dim)
    key = case.scale * normal(case.batch, key_length, kv_heads, head_dim)
    value = normal(case.batch, key_length, kv_heads, value_dim)
    geometry = np.eye(rank, head_dim, dtype="float32") + 0.3 * normal(kv_heads, rank, head_dim)
    projection = np.stack(
        [draw_projection(case.num_features, rank, seed=rng) for _ in range(kv_heads)]
    )
    key_mask = None
    if case.masked:
        key_mask = rng.random((case.batch, key_length)) < 0.7
        key_mask[0, :3], key_mask[:, 3] = False, True
    options = {
        "projection": projection[0] if case.shared else projection,
        "log_weight": 0.3 * normal(kv_heads, case.num_features) if case.weighted else None,
        "key_mask": key_mask,
        "causal": case.causal,
    }
    upstream = normal(case.batch, case.length, num_heads, value_dim)
    if case.untied:
        other = np.eye(rank, head_dim, dtype="float32") + 0.3 * normal(kv_heads, rank, head_dim)
        options["query_geometry"] = other
    if case.shifted:
        for name in ("query_shift", "key_shift"):
            options[name] = 0.7 * normal(kv_heads, head_dim)
    if case.window is not None or case.num_sinks:
        far_offset = normal(num_heads)
        if case.window_alone:
            far_offset = np.full_like(far_offset, -1e30)
        options |= {"sliding_window": case.window, "far_offset": far_offset}
        options |= {"num_sinks": case.num_sinks} if case.num_sinks else {}
    return query, key, value, geometry, options, upstream


@functools.lru_cache
def reference(case):
    """Output and gradients in float64."""
    return dark_attention_reference(*case.arrays, **case.options, upstream=case.upstream)


def attend(case, arrays=None, *, function=dark_attention, jit=DEFAULT_JIT, **options):
    """`dark_attention` of the case, changed where asked."""
    settings, tensors = [], {}
    for name, x in (case.options | options).items():
        if x is None or isinstance(x, bool | int):
            settings.append((name, x))
        else:
            tensors[name] = tree.map_structure(ops.convert_to_tensor, x)
    arrays = [ops.convert_to_tensor(x) for x in arrays or case.arrays]
    call = _compiled_once(function, tuple(sorted(settings)), jit, partition.block_length)
    return to_numpy(call(arrays, tensors))


@functools.lru_cache
def _compiled_once(function, settings, jit, block_length):
    """One function for the same arguments: JAX compiles it once for tensors of the same shapes.

    A test that changes `block_length` changes what is traced.
    """

    def call(arrays, tensors):
        return function(*arrays, **dict(settings), **tensors)

    return compiled(call) if jit else call


def attend_with_gradients(
    case, arrays=None, *, function=dark_attention, upstream=None, jit=DEFAULT_JIT, **options
):
    """The same, and the gradients of `sum(output * upstream)`."""
    options = case.options | options
    upstream = case.upstream if upstream is None else upstream

    def scalar(*tensors):
        output = function(*tensors, **options)
        return ops.sum(output * ops.convert_to_tensor(upstream)), output

    (_, output), gradients = value_and_gradients(
        scalar, *(arrays or case.arrays), jit=jit, has_aux=True
    )
    return output, Gradients(*gradients)


def assert_close(actual, expected, tolerance=1e-4):
    """The largest error is within `tolerance` of the largest number expected."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    # Gradients that are zero by cancellation are compared with the inputs' size instead.
    size = max(np.abs(expected).max(), 0.05)
    error = np.abs(actual - expected).max() / size
    assert error <= tolerance, f"relative error {error:.2e}"
