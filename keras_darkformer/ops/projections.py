"""Random projections W: the directions along which the features look."""

from collections.abc import Sequence

import numpy as np

from keras_darkformer.ops.checks import one_of, positive_integer

PROJECTIONS = ("orthogonal", "gaussian")


def draw_projection(
    num_features: int,
    dim: int,
    *,
    kind: str = "orthogonal",
    seed: int | Sequence[int] | np.random.Generator | None = None,
) -> np.ndarray:
    """Draws the projection W of positive random features.

    Every row is distributed as `N(0, I)`, so features built from either kind
    are unbiased. `"gaussian"` draws the rows independently. `"orthogonal"`
    makes them orthogonal within blocks of `dim` rows, each row keeping the
    length of an independent Gaussian vector; features from it have a variance
    no larger than independent ones (Choromanski et al., 2021, theorem 2).

    NumPy draws them, whatever the Keras backend, so one seed gives one
    projection everywhere.

    Args:
        num_features: int. The number of features m.
        dim: int. The dimension r of the vectors that are projected.
        kind: `"orthogonal"` or `"gaussian"`.
        seed: int, sequence of ints, `numpy.random.Generator` (which is
            advanced) or `None` for a fresh draw.

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
    if kind == "gaussian":
        return rng.standard_normal((num_features, dim)).astype("float32")
    num_blocks = -(-num_features // dim)
    directions = np.concatenate([_random_rotation(rng, dim) for _ in range(num_blocks)])
    lengths = np.linalg.norm(rng.standard_normal((num_features, dim)), axis=1, keepdims=True)
    return (lengths * directions[:num_features]).astype("float32")


def _random_rotation(rng: np.random.Generator, dim: int) -> np.ndarray:
    """An orthogonal matrix drawn uniformly (Haar): QR with the signs of R fixed."""
    q, r = np.linalg.qr(rng.standard_normal((dim, dim)))
    return q * np.sign(np.diag(r))
