"""`DarkAttention` on random calls of every kind, against what its weights mean in float64."""

import dataclasses
import functools

import numpy as np
from backends import BACKEND, DEFAULT_JIT
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from .helpers import WIDTH, arrays, attention, call, normal, reference_attention

LENGTHS = [5, 0, 1, 3]
DTYPES = {"float32": 1e-3, "mixed_bfloat16": 0.15}
DTYPES |= {} if BACKEND == "jax" else {"float64": 1e-3}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A call of a layer; numbers are drawn by the seed."""

    seed: int
    batch: int
    query_length: int
    key_length: int
    causal: bool
    rope: float | None
    dtype: str
    with_key: bool
    query_mask: bool
    value_mask: bool
    key_mask: bool
    attention_mask: str
    training: bool
    poison: float


@st.composite
def samples(draw):
    causal, length = draw(st.booleans()), draw(st.sampled_from(LENGTHS))
    rope = draw(st.sampled_from([None, 100.0]))
    masks = ["", "padding"]
    if causal and not DEFAULT_JIT:  # where it is traced, a mask of pairs can't be looked at
        masks += ["causal", "causal and padding"]
    return Sample(
        seed=draw(st.integers(0, 99)),
        batch=draw(st.sampled_from([2, 0, 1])),
        query_length=length,
        key_length=length if causal else draw(st.sampled_from(LENGTHS)),
        causal=causal,
        rope=rope,
        dtype=draw(st.sampled_from(list(DTYPES))),
        with_key=draw(st.booleans()),
        query_mask=(causal or rope is None) and draw(st.booleans()),
        value_mask=draw(st.booleans()),
        key_mask=draw(st.booleans()),
        attention_mask=draw(st.sampled_from(masks)),
        training=draw(st.booleans()),
        poison=draw(st.sampled_from([0.0, np.nan, 1e30])),
    )


@functools.lru_cache
def layer_of(rope, dtype):
    return attention(rope_max_wavelength=rope, dtype=dtype)


@tried(share=0.7)
@given(samples())
def test_every_call_means_what_its_masks_say(sample):
    if not sample.batch and not sample.query_length * sample.key_length:
        return  # EinsumDense of TensorFlow makes a row of it
    rng, layer = np.random.default_rng(sample.seed), layer_of(sample.rope, sample.dtype)
    rows, queries, keys = sample.batch, sample.query_length, sample.key_length
    query, value, key = (
        normal(rows, length, WIDTH, seed=sample.seed + i)
        for i, length in enumerate((queries, keys, keys))
    )
    seen, masks = np.ones((rows, keys), bool), {}
    for name in ("value_mask", "key_mask"):
        if getattr(sample, name):
            masks[name] = rng.random((rows, keys)) < 0.7
            seen &= masks[name]
    if sample.attention_mask:
        mask = np.ones((rows, 1, keys), bool)
        if "padding" in sample.attention_mask:
            mask = (rng.random((rows, keys)) < 0.7)[:, None]
            seen &= mask[:, 0]
        if "causal" in sample.attention_mask:
            mask = mask & np.tri(queries, dtype=bool)
        masks["attention_mask"] = mask
    asked = np.ones((rows, queries), bool)
    if sample.query_mask:
        masks["query_mask"] = asked = rng.random((rows, queries)) < 0.7
    with_key = {"key": key} if sample.with_key else {}
    expected = reference_attention(
        layer, query, value, **with_key, causal=sample.causal, key_mask=seen
    )
    poisoned = [np.where(seen[..., None], x, sample.poison).astype("float32") for x in (value, key)]
    with_key = {"key": poisoned[1]} if sample.with_key else {}
    output = call(
        layer,
        query,
        poisoned[0],
        **with_key,
        **masks,
        # A causal mask that is given says so by itself.
        use_causal_mask=sample.causal and "causal" not in sample.attention_mask,
        training=sample.training,
    )
    found = arrays(output).astype("float64")
    assert found.shape == (rows, queries, WIDTH)
    error = np.abs(found - expected)[asked]
    assert np.isfinite(found).all()
    assert error.max(initial=0.0) <= DTYPES[sample.dtype] * max(
        1.0, np.abs(expected).max(initial=0.0)
    )
