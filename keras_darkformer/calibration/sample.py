"""What calibration keeps of the queries and keys of one layer: moments, and a bounded sample."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from keras_darkformer.calibration.moments import Moments


class Sample(NamedTuple):
    """Whole sequences of one layer, padded to one length.

    Attributes:
        query: `(b, t, n, h)`, float32.
        key: `(b, s, k, h)`.
        query_mask: `(b, t)`, true = counts.
        key_mask: `(b, s)`.
        causal: Whether query t attends to keys up to t.
    """

    query: np.ndarray
    key: np.ndarray
    query_mask: np.ndarray
    key_mask: np.ndarray
    causal: bool

    def of_head(self, head: int) -> dict[str, Any]:
        """Arrays of one key/value head, queries `(b, t, g, h)`, as calibration takes them."""
        groups = self.query.shape[2] // self.key.shape[2]
        return {
            "query": self.query[:, :, head * groups : (head + 1) * groups],
            "key": self.key[:, :, head],
            "query_mask": self.query_mask,
            "key_mask": self.key_mask,
            "causal": self.causal,
        }


class Reservoir:
    """A random sample of the sequences that go by, bounded in tokens.

    Args:
        max_tokens: int. Longer sequences are cut to this.
        seed: int.
    """

    def __init__(self, max_tokens: int, seed: int) -> None:
        self.max_tokens = max_tokens
        self.rng = np.random.default_rng(seed)
        self.kept: list[tuple[float, tuple[Any, ...]]] = []
        self.causal = False

    def add(
        self,
        query: np.ndarray,
        key: np.ndarray,
        query_mask: np.ndarray | None,
        key_mask: np.ndarray | None,
        causal: bool,
    ) -> None:
        """Offers a batch; a sequence stays by the rank of a random number."""
        self.causal = causal
        for row in range(len(query)):
            offered = tuple(
                None if x is None else np.array(x[row, : self.max_tokens])
                for x in (query, key, query_mask, key_mask)
            )
            self.kept.append((float(self.rng.random()), offered))
        self.kept.sort(key=lambda item: item[0])
        total = 0
        for count, (_, parts) in enumerate(self.kept):
            total += max(len(parts[0]), len(parts[1]))
            if total > self.max_tokens and count:
                del self.kept[count:]
                break

    def sample(self) -> Sample | None:
        """All that was kept, or `None`."""
        if not self.kept:
            return None
        columns = list(zip(*(parts for _, parts in self.kept), strict=True))
        masks = [
            [np.ones(len(x), bool) if m is None else m for x, m in zip(rows, given, strict=True)]
            for rows, given in ((columns[0], columns[2]), (columns[1], columns[3]))
        ]
        return Sample(
            _stacked(columns[0]),
            _stacked(columns[1]),
            _stacked(masks[0]),
            _stacked(masks[1]),
            self.causal,
        )


def _stacked(rows: Any) -> np.ndarray:
    """Rows of different lengths as one array, with zeros behind."""
    length = max(len(row) for row in rows)
    stacked = np.zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype)
    for row, into in zip(rows, stacked, strict=True):
        into[: len(row)] = row
    return stacked


def _full_mask(name: str, mask: np.ndarray | None, tokens: np.ndarray) -> np.ndarray | None:
    """The mask as bool `(b, t)`, from that or `(1, t)`."""
    if mask is None:
        return None
    batch, length = tokens.shape[:2]
    if mask.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"`{name}` must have shape (batch, length) = ({batch}, {length}). "
            f"Received: shape {mask.shape}"
        )
    return np.broadcast_to(mask.astype("bool"), (batch, length))


class LayerStatistics:
    """Moments and, where a method needs it, a sample of one layer's queries and keys.

    Args:
        feature_map: the layer's `DarkFeatureMap`.
        needs_sample: bool.
        max_tokens: int. Of the sample.
        seed: int. Of the sample.

    Attributes:
        moments: of rotated queries and keys.
        unrotated: of those before the rotation, where the geometry sits there.
        layout: `(h,)`: the unrotated coordinate that each rotated one comes from.
    """

    def __init__(self, feature_map: Any, needs_sample: bool, max_tokens: int, seed: int) -> None:
        sizes = feature_map.num_heads, feature_map.head_dim
        self.moments = Moments(*sizes)
        self.needs_unrotated = feature_map.rope_geometry == "before"
        self.needs_layout = feature_map.rope_geometry != "after"
        self.unrotated = Moments(*sizes) if self.needs_unrotated else None
        self.layout = np.arange(feature_map.head_dim)
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
            self._reservoir.add(query, key, query_mask, key_mask, causal)

    def update_unrotated(
        self,
        query: np.ndarray,
        key: np.ndarray,
        *,
        query_mask: np.ndarray | None = None,
        key_mask: np.ndarray | None = None,
    ) -> None:
        """Adds the same batch as it was before the rotation."""
        if self.unrotated is not None:
            self.unrotated.update(query, key, query_mask, key_mask)

    def probe_layout(self, rotate_first: Callable[[np.ndarray], np.ndarray]) -> None:
        """Finds where the rotation puts coordinates; some models shuffle them.

        Args:
            rotate_first: rotates a vector `(h,)` as the token at position 0.
        """
        self.layout = np.rint(rotate_first(np.arange(len(self.layout)))).astype(int)

    @property
    def sample(self) -> Sample | None:
        """The sequences kept, or `None`."""
        return None if self._reservoir is None else self._reservoir.sample()
