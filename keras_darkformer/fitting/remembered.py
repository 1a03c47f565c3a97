"""Which keys are in an exact memory, for fitting the features beside it."""

import heapq

import numpy as np

from keras_darkformer.memory import Memory


def exact_keys(near: np.ndarray, real: np.ndarray, memory: Memory) -> np.ndarray:
    """Which keys each query of one key/value head meets exactly, bool `(t, s)`.

    It equals `ops.reference.exact_keys` if all real tokens are written, in a fraction of the time:
    keys receive attention only before they compete, so all of it is summed at once.

    Args:
        near: softmax logits, `(g, t, s)`; those of masked tokens may be anything.
        real: bool, `(s,)`: which tokens are not masked.
        memory: `Memory`.
    """
    window, s = memory.window, np.arange(len(real))
    t = s[:, None]
    sinks = np.isin(s, np.flatnonzero(real)[: memory.num_sinks])
    local = real & (s <= t) & (sinks | (s > t - window))
    asks = real & local.any(axis=1)
    weights = np.where(local[asks], near[:, asks], -np.inf)
    weights = np.exp(weights - weights.max(axis=-1, keepdims=True))
    received = np.sum(weights / weights.sum(axis=-1, keepdims=True), axis=(0, 1))

    kept: list[tuple[float, int]] = []
    lost = np.zeros_like(s)  # the first query that no longer has a key
    for now in range(window, np.max(np.flatnonzero(real), initial=-1) + 1):
        key = now - window
        if real[key] and not sinks[key]:
            heapq.heappush(kept, (received[key], key))
            lost[key] = len(real)
            if len(kept) > memory.cache_size:
                lost[heapq.heappop(kept)[1]] = now
    return local | ((s <= t - window) & (t < lost))
