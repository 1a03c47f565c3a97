"""Random projections W: the directions along which the features look."""

from collections.abc import Sequence

import numpy as np

from keras_darkformer.checks import one_of, positive_integer
from keras_darkformer.options import PROJECTIONS


def draw_projection(
    num_features: int,
    dim: int,
    *,
    kind: str = "orthogonal",
    seed: int | Sequence[int] | np.random.Generator | None = None,
) -> np.ndarray:
    """Draws the projection W of positive random features.

    Every row is distributed as `N(0, I)`, so features built from any kind are unbiased.
    `"gaussian"` draws the rows independently. `"orthogonal"` makes them orthogonal within blocks of
    `dim` rows, where each row keeps the length of an independent Gaussian vector; the features have
    no larger variance than independent ones (Choromanski et al., 2021, theorem 2). `"antithetic"`
    draws half of the rows in this way and adds their negatives: where one overestimates, the other
    tends to underestimate.

    NumPy draws them under every Keras backend, so a seed gives the same projection everywhere.

    Args:
        num_features: int. The number of features m.
        dim: int. The dimension r of the vectors that are projected.
        kind: `"orthogonal"`, `"gaussian"` or `"antithetic"`.
        seed: int, sequence of ints, `numpy.random.Generator` (which is advanced) or `None` for a
            fresh draw.

    Returns:
        A float32 NumPy array of shape `(num_features, dim)`.

    Raises:
        ValueError: if a size is not a positive integer or `kind` is unknown.

    Example:

    >>> draw_projection(128, 64, seed=0).shape
    (128, 64)

    References:
        - [Rethinking Attention with Performers](https://arxiv.org/abs/2009.14794)
    """
    num_features, dim = positive_integer("num_features", num_features), positive_integer("dim", dim)
    one_of("kind", kind, PROJECTIONS)
    rng = np.random.default_rng(seed)
    if kind == "antithetic":
        half = draw_projection(-(-num_features // 2), dim, seed=rng)
        return np.concatenate([half, -half])[:num_features]
    if kind == "gaussian":
        return rng.standard_normal((num_features, dim)).astype("float32")
    num_blocks = -(-num_features // dim)
    directions = np.concatenate([_random_rotation(rng, dim) for _ in range(num_blocks)])
    lengths = np.linalg.norm(rng.standard_normal((num_features, dim)), axis=1, keepdims=True)
    return (lengths * directions[:num_features]).astype("float32")


def proposal_log_weight(projection: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Log-weights that keep features unbiased if directions are not drawn from `N(0, I)`.

    With `w = S e`, `e ~ N(0, I)` and `S = diag(scale)`, this is half the logarithm of the density
    ratio of `N(0, I)` to `N(0, S S')`. It is added to the log-features of both queries and keys:

        l(w) = (log|det S| + (|e|^2 - |w|^2) / 2) / 2

    The paper's theorem 3.2 gives the S of least variance for normal data;
    `DarkFeatureMap.calibrate` chooses among several.

    Args:
        projection: W, float array with rows w, of shape `(..., m, r)`.
        scale: the diagonal of S, positive float array of shape `(..., r)`.

    Returns:
        A float32 array of shape `(..., m)`: the `log_weight` of `dark_attention`.

    Raises:
        ValueError: if a scale is not positive and finite.

    Example:

    >>> scale = np.full(8, 1.2)
    >>> projection = scale * draw_projection(64, 8, seed=0)
    >>> proposal_log_weight(projection, scale).shape
    (64,)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
    """
    projection, scale = np.asarray(projection, "float64"), np.asarray(scale, "float64")
    if not np.all(scale > 0) or not np.all(np.isfinite(scale)):
        raise ValueError(f"`scale` must be positive and finite. Received: {scale}")
    scale = scale[..., None, :]
    squares = projection**2 * (1 / scale**2 - 1)
    log_weight = 0.5 * np.log(scale).sum(axis=-1) + 0.25 * squares.sum(axis=-1)
    return log_weight.astype("float32")


def _random_rotation(rng: np.random.Generator, dim: int) -> np.ndarray:
    """An orthogonal matrix drawn uniformly (Haar): QR with the signs of R fixed."""
    q, r = np.linalg.qr(rng.standard_normal((dim, dim)))
    return q * np.sign(np.diag(r))
