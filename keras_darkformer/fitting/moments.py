"""Moments of queries and keys, in one pass and in constant memory."""

from typing import NamedTuple, Self

import numpy as np


class HeadMoments(NamedTuple):
    """Means of `q^` and `k^` of one head, `(h,)`, and `Cov(q^) + Cov(k^)`, `(h, h)`."""

    query_mean: np.ndarray
    key_mean: np.ndarray
    covariance: np.ndarray

    def uncentred(self) -> "HeadMoments":
        """The moments about the origin, which features of raw queries and keys depend on."""
        total = self.query_mean + self.key_mean
        zero = np.zeros_like(total)
        # Geometries and proposals depend only on E[z z'] of z = q^ + k^.
        return HeadMoments(zero, zero, self.covariance + np.outer(total, total))


class Moments:
    """Counts, means and covariances of `q^` and `k^` per key/value head, in one pass.

    Queries are pooled over their group. Memory is constant; partial results merge in any order.

    Attributes:
        count: `(2,)`, the number of queries and of keys per head.
        mean: `(2, k, h)`, the means of queries and of keys.
        cov: `(2, k, h, h)`, their covariances, divided by the count.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self.count = np.zeros(2, "int64")
        self.mean = np.zeros((2, num_heads, head_dim))
        self._scatter = np.zeros((2, num_heads, head_dim, head_dim))

    @property
    def cov(self) -> np.ndarray:
        """`(2, k, h, h)`."""
        return self._scatter / np.maximum(self.count, 1)[:, None, None, None]

    def of_head(self, head: int) -> HeadMoments:
        """The moments of one key/value head."""
        query_mean, key_mean = self.mean[:, head]
        return HeadMoments(query_mean, key_mean, self.cov[:, head].sum(axis=0))

    def update(
        self,
        query: np.ndarray,
        key: np.ndarray,
        query_mask: np.ndarray | None = None,
        key_mask: np.ndarray | None = None,
    ) -> Self:
        """Adds queries `(b, t, n, h)` and keys `(b, s, k, h)`; masked vectors may hold anything.

        Raises:
            ValueError: if a vector that counts is not finite, or shapes do not fit.
        """
        num_heads, head_dim = self.mean.shape[1:]
        batch = Moments(num_heads, head_dim)
        given = (("query", query, query_mask), ("key", key, key_mask))
        rows = [_rows(name, value, mask, num_heads, head_dim) for name, value, mask in given]
        for side, x in enumerate(rows):
            batch.count[side] = x.shape[1]
            batch.mean[side] = x.sum(axis=1) / max(x.shape[1], 1)
            centred = x - batch.mean[side, :, None]
            batch._scatter[side] = np.swapaxes(centred, 1, 2) @ centred
        return self.merge(batch)

    def merge(self, other: "Moments") -> Self:
        """Adds what `other` has counted.

        This is Chan, Golub and LeVeque's update, which takes no difference of large numbers, unlike
        E[xx'] - E[x]^2.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        weight = (self.count * other.count / np.maximum(count, 1))[:, None, None, None]
        between = delta[..., :, None] * delta[..., None, :] * weight
        self._scatter = self._scatter + other._scatter + between
        self.mean = self.mean + delta * (other.count / np.maximum(count, 1))[:, None, None]
        self.count = count
        return self


def _rows(
    name: str, value: np.ndarray, mask: np.ndarray | None, num_heads: int, head_dim: int
) -> np.ndarray:
    """The vectors that count, divided by `h^(1/4)`, of shape `(k, rows, h)`."""
    if value.ndim != 4 or value.shape[2] % num_heads or value.shape[3] != head_dim:
        raise ValueError(
            f"`{name}` does not fit {num_heads} key/value heads of size {head_dim}. "
            f"Received: shape {value.shape}"
        )
    kept = value.reshape(-1, *value.shape[2:])
    if mask is not None:
        kept = kept[np.broadcast_to(np.asarray(mask, bool), value.shape[:2]).reshape(-1)]
    kept = np.asarray(kept, "float64")
    if not np.all(np.isfinite(kept)):
        raise ValueError(f"`{name}` must be finite where it is not masked.")
    groups = value.shape[2] // num_heads
    grouped = kept.reshape(len(kept), num_heads, groups, head_dim) * head_dim**-0.25
    return grouped.transpose(1, 0, 2, 3).reshape(num_heads, len(kept) * groups, head_dim)
