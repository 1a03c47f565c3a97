"""How much mass a feature map leaves behind its sliding window, and how much softmax does."""

from collections.abc import Callable

import numpy as np
from keras import ops

from keras_darkformer.fitting import FarOffset
from keras_darkformer.ops.scores import exact_logits, log_sum_exp, visible_pairs
from keras_darkformer.types import Tensor


class FarMass:
    """Log-odds of the far part in a feature map's attention and in softmax's.

    Args:
        log_scores: `FeatureMap.log_scores` of a map with a sliding window.
        window: int. Its tokens.
    """

    def __init__(self, log_scores: Callable[[Tensor, Tensor], Tensor], window: int) -> None:
        self.log_scores, self.window = log_scores, window
        self.fit = FarOffset()

    def add(
        self,
        query: Tensor,
        key: Tensor,
        feature_query: Tensor,
        feature_key: Tensor,
        *,
        key_mask: Tensor = None,
        attention_mask: Tensor = None,
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
        index = ops.arange(ops.shape(query)[1])
        behind = index[:, None] - index[None, :] >= self.window
        far = ops.logical_and(visible, behind)
        near = ops.logical_and(visible, ops.logical_not(behind))
        counts = ops.logical_and(ops.any(far, axis=-1), ops.any(near, axis=-1))
        if key_mask is not None:
            counts = ops.logical_and(counts, ops.cast(key_mask, "bool")[:, None, :])
        log_odds, exact_log_odds = (
            ops.convert_to_numpy(log_sum_exp(scores, far) - log_sum_exp(scores, near))
            for scores in (
                self.log_scores(feature_query, feature_key),
                exact_logits(query, key),
            )
        )
        self.fit.add(log_odds, exact_log_odds, ops.convert_to_numpy(counts))

    def offset(self) -> np.ndarray:
        """What to set the map's `far_offset` to, `(n,)`, where it was zero before."""
        return self.fit.solve()
