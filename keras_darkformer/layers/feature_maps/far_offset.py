"""How much mass a feature map leaves outside its exact memory, and how much softmax does."""

import math
from typing import TYPE_CHECKING

import numpy as np
from keras import ops

from keras_darkformer.fitting import FarOffset
from keras_darkformer.ops.scores import exact_logits, log_sum_exp, visible_pairs
from keras_darkformer.types import Tensor

if TYPE_CHECKING:
    from keras_darkformer.layers.feature_maps.base import FeatureMap

QUERIES = 1024  # per head and call, or a few more: enough to fit one number per head


class FarMass:
    """Log-odds of the far part in a feature map's attention and in softmax's.

    In long calls it looks at a regular sample of the queries of every sequence.

    Args:
        feature_map: a `FeatureMap` with an exact memory.
    """

    def __init__(self, feature_map: "FeatureMap") -> None:
        self.map = feature_map
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
        exact = self.map.exact_pairs(feature_query, feature_key, key_mask)
        every = max(1, math.prod(query.shape[:2]) // QUERIES)
        query, feature_query = query[:, ::every], feature_query[:, ::every]
        visible, exact = visible[:, :, ::every], exact[:, :, ::every]
        far = ops.logical_and(visible, ops.logical_not(exact))
        near = ops.logical_and(visible, exact)
        counts = ops.logical_and(ops.any(far, axis=-1), ops.any(near, axis=-1))
        if key_mask is not None:
            counts = ops.logical_and(counts, ops.cast(key_mask, "bool")[:, None, ::every])
        log_odds, exact_log_odds = (
            ops.convert_to_numpy(log_sum_exp(scores, far) - log_sum_exp(scores, near))
            for scores in (
                self.map.log_scores(feature_query, feature_key, exact),
                exact_logits(query, key),
            )
        )
        self.fit.add(log_odds, exact_log_odds, ops.convert_to_numpy(counts))

    def offset(self) -> np.ndarray:
        """What to set the map's `far_offset` to, `(n,)`, if it was zero before."""
        return self.fit.solve()
