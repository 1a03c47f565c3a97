"""What fitting gives."""

from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """Weights of a feature map.

    Attributes:
        kind: one of `options.FEATURE_MAPS`: the map they are for.
        weights: float64 arrays, stacked over heads, by the names of the map's
            weights.
    """

    kind: str
    weights: dict[str, np.ndarray]
