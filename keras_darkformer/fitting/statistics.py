"""Statistics of the queries and keys of one layer: moments, and a bounded sample."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from keras_darkformer.fitting.moments import HeadMoments, Moments
from keras_darkformer.fitting.reservoir import Reservoir
from keras_darkformer.fitting.sequences import HeadSample
from keras_darkformer.memory import NO_MEMORY, Memory


class HeadStatistics(NamedTuple):
    """What was seen of one key/value head; see `LayerStatistics`."""

    head: int
    moments: HeadMoments
    unrotated: HeadMoments | None
    layout: np.ndarray
    sample: HeadSample | None

    def of_part(self, part: HeadSample) -> "HeadStatistics":
        """The statistics of the head as if only a part of its sample had been seen."""
        moments = Moments(1, part.key.shape[-1])
        moments.update(part.query, part.key[:, :, None], part.query_mask, part.key_mask)
        return self._replace(moments=moments.of_head(0), sample=part)


class LayerStatistics:
    """Moments and, where a method needs it, a sample of one layer's queries and keys.

    Args:
        num_heads, head_dim: int. Heads and head size of the keys.
        needs_sample: bool. Whether to keep a sample.
        needs_unrotated: bool. Whether `probe_layout` and `update_unrotated` must be called, too.
        max_tokens, seed: int. Size and seed of the sample.
        memory: the exact `Memory`, whose keys features do not stand for.

    Attributes:
        moments: moments of rotated queries and keys.
        unrotated: moments of those before the rotation, or `None`.
        layout: `(h,)`, the unrotated coordinate that each rotated one comes from.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        needs_sample: bool,
        needs_unrotated: bool = False,
        max_tokens: int,
        seed: int,
        memory: Memory = NO_MEMORY,
    ) -> None:
        self.num_heads, self.head_dim = num_heads, head_dim
        self.needs_unrotated, self.memory = needs_unrotated, memory
        self.moments = Moments(num_heads, head_dim)
        self.unrotated = Moments(num_heads, head_dim) if needs_unrotated else None
        self.layout = np.arange(head_dim)
        self._reservoir = Reservoir(max_tokens, seed) if needs_sample else None

    def update(
        self,
        query: np.ndarray,
        key: np.ndarray,
        *,
        query_mask: np.ndarray | None = None,
        key_mask: np.ndarray | None = None,
        causal: bool = False,
    ) -> None:
        """Adds a batch of rotated queries `(b, t, n, h)` and keys `(b, s, k, h)`.

        Raises:
            ValueError: if shapes do not fit, or a vector that counts is not finite.
        """
        if len(query) != len(key):
            raise ValueError(
                "`query` and `key` must have the same batch size. "
                f"Received: query shape {query.shape}, key shape {key.shape}"
            )
        query_mask = _full_mask("query_mask", query_mask, query)
        key_mask = _full_mask("key_mask", key_mask, key)
        self.moments.update(query, key, query_mask, key_mask)
        if self._reservoir is not None:
            self._reservoir.add((query, key, query_mask, key_mask), causal)

    def update_unrotated(
        self,
        query: np.ndarray,
        key: np.ndarray,
        *,
        query_mask: np.ndarray | None = None,
        key_mask: np.ndarray | None = None,
    ) -> None:
        """Adds the same batch as it was before the rotation, if that is needed."""
        if self.unrotated is not None:
            self.unrotated.update(query, key, query_mask, key_mask)

    def probe_layout(self, rotate_first: Callable[[np.ndarray], np.ndarray]) -> None:
        """Finds where the rotation puts coordinates, since some models shuffle them.

        Args:
            rotate_first: function that rotates a vector `(h,)` like the token at position 0.
        """
        self.layout = np.rint(rotate_first(np.arange(self.head_dim))).astype(int)

    def of_head(self, head: int) -> HeadStatistics:
        """What was seen of one key/value head."""
        unrotated = None if self.unrotated is None else self.unrotated.of_head(head)
        sample = None if self._reservoir is None else self._reservoir.of_head(head)
        if sample is not None:
            sample = sample._replace(memory=self.memory)
        return HeadStatistics(head, self.moments.of_head(head), unrotated, self.layout, sample)


def _full_mask(name: str, mask: np.ndarray | None, tokens: np.ndarray) -> np.ndarray:
    """The mask as bool `(b, t)`, from that shape or `(1, t)`; true everywhere without one."""
    shape = tokens.shape[:2]
    if mask is None:
        return np.ones(shape, "bool")
    if mask.shape not in (shape, (1, *shape[1:])):
        raise ValueError(
            f"`{name}` must have shape (batch, length) = {shape}. Received: shape {mask.shape}"
        )
    return np.broadcast_to(mask.astype("bool"), shape)
