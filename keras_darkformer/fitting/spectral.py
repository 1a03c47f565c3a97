"""Geometries M and proposals for W from the moments of one head.

Letters: `q^ = h^(-1/4) q`, so that `q^ . k^ = q . k / sqrt(h)`; h head_dim, m features. Every
`covariance` is `Cov(q^) + Cov(k^)`, `(h, h)`, unless stated otherwise.
"""

import numpy as np

GRID = 257  # points in [0, 1] at which a direction's multiplier is tried before polishing


def proposal_variance(v: np.ndarray) -> np.ndarray:
    """`t(v)`: the variance along w that minimises the second moment of a feature.

    `v` is the variance of `M q^ + M k^` along an eigenvector; `t >= 1` for every `v >= 0`.
    """
    p = 3 + 2 * np.asarray(v, "float64")
    return (p + np.sqrt(p * p - 8)) / 4


def log_second_moment(v: np.ndarray) -> np.ndarray:
    """A direction's part of the log variance, `h(v) = log t - log(2 t - 1) / 2 + v / (2 t - 1)`."""
    t = proposal_variance(v)
    return np.log(t) - 0.5 * np.log(2 * t - 1) + v / (2 * t - 1)


def geometry_of(method: str, covariance: np.ndarray, num_features: int) -> np.ndarray:
    """The geometry M `(h, h)` that a method gives.

    `"spectral"` spends the feature budget on the directions that carry the logits. It is `M =
    diag(a) U'`, with `U diag(v) U' = Cov(q^) + Cov(k^)` and `a` from `spectral_multipliers`.
    """
    if method == "identity":
        return np.eye(len(covariance))
    if method == "whitening":
        return whitening(covariance)
    v, u = spectrum(covariance)
    a = spectral_multipliers(v, num_features, one_for_all=method == "scale")
    return a[:, None] * u.T if method == "spectral" else np.diag(a)


def spectral_multipliers(
    v: np.ndarray, num_features: int, *, beta: float = 2.0, one_for_all: bool = False
) -> np.ndarray:
    """The `a` in [0, 1] per direction that minimises

        sum_l (1 - a_l^2)^2 (v_l / 2)^2 + beta softplus(sum_l h(a_l^2 v_l) - log m):

    the variance of the logits that are left out, and the relative variance of m features, where `h`
    is `log_second_moment`.

    softplus(s) is the maximum of `p s + entropy(p)`. For a fixed slope p every direction is
    therefore a problem of its own, `(1 - a^2)^2 (v / 2)^2 + beta p h(a^2 v)`, solved on a grid. At
    the optimum p is the logistic function of s. As s falls when p grows, bisection finds p. Since h
    is concave, s may jump; then the better side of the jump is taken.

    Args:
        v: variances of `q^ + k^` along the directions, `(h,)`.
        num_features: number m of features.
        beta: weight of the features' variance.
        one_for_all: whether to use one multiplier for all directions.
    """
    grid = np.linspace(0, 1, GRID)[:, None]
    if one_for_all:
        best = np.argmin(_cost(grid, v, num_features, beta))
        return np.full(len(v), grid[best, 0])
    distortion = _distortion(grid, v)
    moment = log_second_moment(grid**2 * v)
    directions = np.arange(len(v))
    log_m = np.log(num_features)

    low, high = 0.0, 1.0
    for _ in range(32):
        slope = (low + high) / 2
        best = np.argmin(distortion + beta * slope * moment, axis=0)
        if _logistic(moment[best, directions].sum() - log_m) > slope:
            low = slope
        else:
            high = slope
    sides = [_polish(grid, v, distortion + beta * p * moment, beta * p) for p in (low, high)]
    return min(sides, key=lambda a: _cost(a, v, num_features, beta))


def _polish(grid: np.ndarray, v: np.ndarray, values: np.ndarray, weight: float) -> np.ndarray:
    """Golden-section search around the best grid point of every direction."""
    best = np.argmin(values, axis=0)
    low, high = grid[np.maximum(best - 1, 0), 0], grid[np.minimum(best + 1, GRID - 1), 0]
    golden = (np.sqrt(5) - 1) / 2

    def value(a: np.ndarray) -> np.ndarray:
        return _distortion(a, v) + weight * log_second_moment(a**2 * v)

    for _ in range(24):
        left, right = high - golden * (high - low), low + golden * (high - low)
        go_left = value(left) < value(right)
        low, high = np.where(go_left, low, left), np.where(go_left, right, high)
    a = (low + high) / 2
    on_grid = grid[best, 0]
    return np.where(value(a) < value(on_grid), a, on_grid)


def _distortion(a: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (1 - a**2) ** 2 * (v / 2) ** 2


def _cost(a: np.ndarray, v: np.ndarray, num_features: int, beta: float) -> np.ndarray:
    excess = log_second_moment(a**2 * v).sum(axis=-1) - np.log(num_features)
    return _distortion(a, v).sum(axis=-1) + beta * np.logaddexp(0, excess)


def whitening(
    covariance: np.ndarray, scale: float | None = None, floor: float = 1e-6
) -> np.ndarray:
    """The geometry `M = s L^(-1/2)`, with L half the covariance (proposition C.1), `s = h^(-1/4)`.

    Eigenvalues below `floor` times the largest are raised to that; without any variance, `M = s I`.
    """
    values, u = spectrum(covariance / 2)
    largest = values.max()
    values = np.maximum(values, floor * largest) if largest > 0 else np.ones_like(values)
    s = len(values) ** -0.25 if scale is None else scale
    return s * (u / np.sqrt(values)) @ u.T


def variance_optimal_scale(values: np.ndarray) -> np.ndarray:
    """Standard deviations of w along the eigenvectors of L, half the covariance after M.

    `S S' = (I + 2 L)(I - 2 L)^-1` (theorem 3.2).

    Args:
        values: the eigenvalues of L.

    Raises:
        ValueError: if one of them is 1/2 or more, as then no such proposal has finite variance.
    """
    if values.max() >= 0.5:
        raise ValueError(
            "The variance-optimal proposal exists only where every eigenvalue of the covariance of "
            f"M q^ and M k^ is below 1/2. Received: largest eigenvalue {values.max():.4g}"
        )
    return np.sqrt((1 + 2 * values) / (1 - 2 * values))


def proposal_scale(proposal: str, values: np.ndarray) -> np.ndarray:
    """Standard deviations of w, by one of `PROPOSALS`, along directions of given variance.

    Args:
        proposal: name of the proposal. `"spectral"` is `t(v)`, which always exists.
        values: variances of `M q^ + M k^`, the eigenvalues of its covariance.
    """
    if proposal == "none":
        return np.ones_like(values)
    if proposal == "variance_optimal":
        return variance_optimal_scale(values / 2)
    return np.sqrt(proposal_variance(values))


def spectrum(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, at least zero despite rounding, and eigenvectors as columns.

    The largest entry of each vector is positive. Otherwise rounding would choose the sign, and so
    change what a draw with the same seed gives.
    """
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    largest = np.argmax(np.abs(vectors), axis=0)
    signs = np.sign(vectors[largest, np.arange(len(values))])
    return np.maximum(values, 0), vectors * signs


def _logistic(x: float) -> float:
    return 0.5 * (1 + np.tanh(0.5 * x))
