"""The result of a fit."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np


class Fit(NamedTuple):
    """Weights of a feature map.

    Attributes:
        kind: one of `options.FEATURE_MAPS`, the kind of map they are for.
        weights: dict of float64 arrays, stacked over heads, by the names of the map's weights.
    """

    kind: str
    weights: dict[str, np.ndarray]

    @classmethod
    def of_heads(cls, kind: str, heads: Sequence[NamedTuple], names: Sequence[str]) -> Self:
        """Stacks the arrays with these names over heads."""
        return cls(kind, {name: np.stack([getattr(x, name) for x in heads]) for name in names})
