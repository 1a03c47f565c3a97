"""Features of one head as functions of raw queries and keys."""

from typing import NamedTuple

import numpy as np


class Projections(NamedTuple):
    """Features as functions of raw queries and keys.

        log phi_q[j] = q . A_q[:, j]
        log phi_k[j] = k . A_k[:, j] + a_j - |N' k|^2 / 2

    Terms that are constant for a query cancel in the ratio and are left out.

    Attributes:
        query_kernel: `A_q`, of shape `(h, m)`.
        key_kernel: `A_k`, of shape `(h, m)`.
        key_bias: `a`, of shape `(m,)`.
        norm_kernel: `N = h^(-1/4) M'`, of shape `(h, r)`, or `None` for no norm.
    """

    query_kernel: np.ndarray
    key_kernel: np.ndarray
    key_bias: np.ndarray
    norm_kernel: np.ndarray | None = None


class DarkParameters(NamedTuple):
    """A dark feature map: `log phi_q = W M (q^ - b)` and
    `log phi_k = W M (k^ - c) - |M (k^ - c)|^2 / 2 + b . k^ + 2 log_weight`.

    `proposal` `(r,)` holds the standard deviations that W was drawn with.
    """

    geometry: np.ndarray
    projection: np.ndarray
    log_weight: np.ndarray
    query_shift: np.ndarray
    key_shift: np.ndarray
    proposal: np.ndarray


def fold_dark(dark: DarkParameters) -> Projections:
    """The features of `DarkParameters` as functions of raw queries and keys."""
    geometry, projection, log_weight, b, c, _ = dark
    hat = geometry.shape[1] ** -0.25
    kernel = geometry.T @ projection.T  # (h, m)
    linear = geometry.T @ (geometry @ c) + b  # of -|M (k^ - c)|^2 / 2 + b . k^
    bias = 2 * log_weight - (b + c) @ kernel - 0.5 * np.sum((geometry @ c) ** 2)
    return Projections(hat * kernel, hat * (kernel + linear[:, None]), bias, hat * geometry.T)
