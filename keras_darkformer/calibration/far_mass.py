"""The scale of features behind a sliding window, from the mass softmax has there."""

from typing import Any

import numpy as np
from keras import ops

from keras_darkformer.ops.scores import exact_logits, log_sum_exp, visible_pairs


class FarMass:
    """Log-odds of the far part in a feature map's attention, and its mass in softmax's.

    Features underestimate: an average of exponentials lies below its
    expectation more often than not. One offset d per head, added to the far
    part's log-weights, makes the masses agree,

        sum_t sigmoid(z_t + d) = sum_t p_t,

    z_t being the log-odds of the far part and p_t softmax's far mass. It is the
    offset that minimises the divergence of near/far from softmax's.

    Args:
        feature_map: a `DarkFeatureMap` with a sliding window.
    """

    def __init__(self, feature_map: Any) -> None:
        self.map = feature_map
        self.log_odds: list[list[np.ndarray]] = []
        self.exact: list[list[np.ndarray]] = []

    def add(
        self,
        query: Any,
        key: Any,
        feature_query: Any,
        feature_key: Any,
        *,
        key_mask: Any = None,
        attention_mask: Any = None,
    ) -> None:
        """Adds a causal call of the layer.

        Args:
            query, key: `(b, t, n, h)` and `(b, t, k, h)`, as softmax gets them.
            feature_query, feature_key: as `feature_map.attend` gets them.
            key_mask: bool, `(b, t)`, or `None`.
            attention_mask: bool, of rank 4, or `None`.
        """
        visible = visible_pairs(
            query, key, causal=True, key_mask=key_mask, attention_mask=attention_mask
        )
        window_only, self.map.window_only = self.map.window_only, False
        scores = self.map.log_scores(feature_query, feature_key)
        self.map.window_only = window_only
        logits = exact_logits(query, key)
        index = ops.arange(ops.shape(query)[1])
        behind = index[:, None] - index[None, :] >= self.map.sliding_window
        far = ops.logical_and(visible, behind)
        near = ops.logical_and(visible, ops.logical_not(behind))
        counts = ops.logical_and(ops.any(far, axis=-1), ops.any(near, axis=-1))
        if key_mask is not None:
            counts = ops.logical_and(counts, ops.cast(key_mask, "bool")[:, None, :])
        for kept, x in ((self.log_odds, scores), (self.exact, logits)):
            odds = log_sum_exp(x, far) - log_sum_exp(x, near)
            odds = np.asarray(ops.convert_to_numpy(odds), "float64")
            chosen = np.broadcast_to(ops.convert_to_numpy(counts), odds.shape)
            kept.append([odds[:, head][chosen[:, head]] for head in range(odds.shape[1])])

    def offset(self) -> np.ndarray:
        """d, of shape `(n,)`."""
        return np.array([self._solve(head) for head in range(len(self.exact[0]))], "float32")

    def _solve(self, head: int) -> float:
        log_odds = np.concatenate([part[head] for part in self.log_odds])
        mass = sigmoid(np.concatenate([part[head] for part in self.exact])).sum()
        low, high = -80.0, 80.0  # the sum rises with d: bisection
        for _ in range(60):
            middle = (low + high) / 2
            if sigmoid(log_odds + middle).sum() < mass:
                low = middle
            else:
                high = middle
        return (low + high) / 2


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))
