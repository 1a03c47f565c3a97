"""Moments of queries and keys, in one pass and in constant memory."""

import numpy as np


class Moments:
    """Counts, means and covariances of `q^` and `k^` per key/value head, in one pass.

    Queries are pooled over their group. Memory is constant; partial results merge in any order.

    Attributes:
        query_count, key_count: vectors counted per head.
        query_mean, key_mean: of shape `(k, h)`.
        query_cov, key_cov: of shape `(k, h, h)`, divided by the count.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self.query_count = self.key_count = 0
        self.query_mean, self.key_mean = np.zeros((2, num_heads, head_dim))
        self._query_scatter, self._key_scatter = np.zeros((2, num_heads, head_dim, head_dim))

    @property
    def query_cov(self) -> np.ndarray:
        """`(k, h, h)`."""
        return self._query_scatter / max(self.query_count, 1)

    @property
    def key_cov(self) -> np.ndarray:
        """`(k, h, h)`."""
        return self._key_scatter / max(self.key_count, 1)

    def update(
        self,
        query: np.ndarray,
        key: np.ndarray,
        query_mask: np.ndarray | None = None,
        key_mask: np.ndarray | None = None,
    ) -> "Moments":
        """Adds query `(b, t, n, h)` and key `(b, s, k, h)`; masked vectors may hold anything.

        Raises:
            ValueError: if a vector that counts is not finite, or shapes do not fit.
        """
        num_heads, head_dim = self.query_mean.shape
        for name, value in (("query", query), ("key", key)):
            heads_fit = value.ndim == 4 and value.shape[2] % num_heads == 0
            if not heads_fit or value.shape[3] != head_dim:
                raise ValueError(
                    f"`{name}` does not fit {num_heads} key/value heads of size {head_dim}. "
                    f"Received: shape {value.shape}"
                )
        both = [
            _rows(value, mask, num_heads, name)
            for value, mask, name in ((query, query_mask, "query"), (key, key_mask, "key"))
        ]
        batch = Moments(num_heads, head_dim)
        batch.query_count, batch.query_mean, batch._query_scatter = _scatter(both[0])
        batch.key_count, batch.key_mean, batch._key_scatter = _scatter(both[1])
        return self.merge(batch)

    def merge(self, other: "Moments") -> "Moments":
        """Adds what `other` has counted."""
        mine, theirs = self, other
        self.query_count, self.query_mean, self._query_scatter = _pool(
            (mine.query_count, mine.query_mean, mine._query_scatter),
            (theirs.query_count, theirs.query_mean, theirs._query_scatter),
        )
        self.key_count, self.key_mean, self._key_scatter = _pool(
            (mine.key_count, mine.key_mean, mine._key_scatter),
            (theirs.key_count, theirs.key_mean, theirs._key_scatter),
        )
        return self


def _rows(value: np.ndarray, mask: np.ndarray | None, num_heads: int, name: str) -> np.ndarray:
    """Hats of the vectors that count, of shape `(k, rows, h)`."""
    kept = value.reshape(-1, *value.shape[2:])
    if mask is not None:
        mask = np.broadcast_to(np.asarray(mask, bool), value.shape[:2])
        kept = kept[mask.reshape(-1)]
    kept = np.asarray(kept, "float64")
    if not np.all(np.isfinite(kept)):
        raise ValueError(f"`{name}` must be finite where it is not masked.")
    heads, head_dim = value.shape[2:]
    groups = heads // num_heads
    grouped = kept.reshape(len(kept), num_heads, groups, head_dim) * head_dim**-0.25
    return grouped.transpose(1, 0, 2, 3).reshape(num_heads, len(kept) * groups, head_dim)


Statistics = tuple[int, np.ndarray, np.ndarray]


def _scatter(rows: np.ndarray) -> Statistics:
    count = rows.shape[1]
    mean = rows.sum(axis=1) / max(count, 1)
    centred = rows - mean[:, None]
    return count, mean, np.swapaxes(centred, 1, 2) @ centred


def _pool(one: Statistics, two: Statistics) -> Statistics:
    """Chan, Golub and LeVeque's update: no difference of large numbers, unlike E[xx'] - E[x]^2."""
    count = one[0] + two[0]
    if count == 0:
        return one
    delta = two[1] - one[1]
    between = delta[:, :, None] * delta[:, None, :] * (one[0] * two[0] / count)
    return count, one[1] + delta * (two[0] / count), one[2] + two[2] + between
