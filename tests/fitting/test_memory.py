"""Fits of features that stand beside an exact memory."""

import numpy as np
import pytest
from backends import numpy_only

from keras_darkformer.fitting import remembered
from keras_darkformer.fitting import sequences as module
from keras_darkformer.fitting.sequences import HeadSample, exact_weights, feature_weights, sequences
from keras_darkformer.memory import Memory
from keras_darkformer.ops.reference import exact_keys

from .fits import HEAD_DIM, HEADS, data, fitted, folded_head

numpy_only()

MEMORY = Memory(6, 2, 4)


def samples(query, key, memory=MEMORY):
    query = query.reshape(*query.shape[:2], HEADS, -1, HEAD_DIM)
    for head in range(HEADS):
        yield HeadSample(query[:, :, head], key[:, :, head], causal=True, memory=memory)


def test_queries_see_what_is_not_in_the_memory():
    query, key = data(length=40, groups=2)
    for sample in samples(query, key):
        plain = sequences(sample._replace(memory=Memory()))
        for row, (far, whole) in enumerate(zip(sequences(sample), plain, strict=True)):
            near = np.einsum("tgh,sh->gts", sample.query[row], sample.key[row]) / HEAD_DIM**0.5
            real = np.ones(40, bool)
            exact = np.repeat(exact_keys(near, real, real, MEMORY), 2, axis=0)
            expected = whole.visible & ~exact
            some = expected.any(axis=1)
            np.testing.assert_array_equal(far.visible, expected[some])
            np.testing.assert_array_equal(far.query, whole.query[some])
            assert some.sum() == 2 * (40 - 6 - 2 - 4)


@pytest.mark.parametrize(
    "memory",
    [MEMORY, Memory(6, 2), Memory(6, 0, 4), Memory(None, 3), Memory(1, 1, 1), Memory(50, 2, 3)],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_keys_of_the_memory_are_those_of_the_reference(memory, masked, rng):
    near = 2 * rng.standard_normal((3, 40, 40))
    real = np.ones(40, bool)
    if masked:
        real = rng.random(40) < 0.8
        real[[0, -1, -2]] = False
        near[:, ~real] = near[:, :, ~real] = np.nan
    expected = exact_keys(near, real, real, memory)
    found = remembered.exact_keys(near, real, memory)
    np.testing.assert_array_equal(found[real], expected[real])
    assert found.any() or not memory.size


def test_without_a_real_key_nothing_is_remembered():
    nothing = np.zeros(8, bool)
    assert not remembered.exact_keys(np.zeros((1, 8, 8)), nothing, MEMORY).any()


def test_what_is_in_the_memory_is_found_once_a_sequence_and_head(monkeypatch):
    calls = []

    def counted(near, real, memory):
        calls.append(memory)
        return remembered.exact_keys(near, real, memory)

    monkeypatch.setattr(module, "exact_keys", counted)
    query, key = data(length=40)
    fitted(query, key, how={"causal": True, "memory": MEMORY})
    assert calls == [MEMORY] * HEADS * len(query)


def far_divergence(query, key, fit):
    total = []
    for head, sample in enumerate(samples(query, key)):
        for part in sequences(sample):
            exact = np.maximum(exact_weights(part), 1e-300)
            ours = np.maximum(feature_weights(folded_head(fit, head), part), 1e-300)
            total.append(np.sum(exact * np.log(exact / ours), axis=1))
    return np.mean(np.concatenate(total))


def test_features_are_refined_for_what_is_left_to_them():
    query, key = (x.copy() for x in data(length=60, seed=3, scale=1.0))
    key[:, :2] += 2.0 * query.mean(axis=(0, 1))  # sinks, which the memory has
    plain = fitted(query, key, how={"causal": True})
    beside = fitted(query, key, how={"causal": True, "memory": MEMORY})
    far = [far_divergence(query, key, fit) for fit in (beside, plain)]
    assert far[0] < 0.9 * far[1], far
