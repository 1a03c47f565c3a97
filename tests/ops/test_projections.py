import numpy as np
import pytest
from backends import numpy_only

from keras_darkformer.ops import draw_projection

numpy_only()

kinds = pytest.mark.parametrize("kind", ["orthogonal", "gaussian"])


@kinds
@pytest.mark.parametrize(("num_features", "dim"), [(1, 1), (5, 8), (16, 8), (21, 8)])
def test_projection_is_a_float32_array_of_features_by_dim(kind, num_features, dim):
    projection = draw_projection(num_features, dim, kind=kind, seed=0)
    assert isinstance(projection, np.ndarray)
    assert projection.shape == (num_features, dim)
    assert projection.dtype == "float32"
    assert np.isfinite(projection).all()


@kinds
@pytest.mark.parametrize("seed", [7, [1, 2]], ids=str)
def test_one_seed_gives_one_draw(kind, seed):
    first, second = (draw_projection(20, 8, kind=kind, seed=seed) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@kinds
@pytest.mark.parametrize("seeds", [(0, 1), ([1, 2], [2, 1]), (None, None)], ids=str)
def test_different_seeds_give_different_draws(kind, seeds):
    first, second = (draw_projection(20, 8, kind=kind, seed=seed) for seed in seeds)
    assert (first != second).all()


@kinds
def test_generator_is_advanced(kind, rng):
    first, second = (draw_projection(20, 8, kind=kind, seed=rng) for _ in range(2))
    assert (first != second).all()
    np.testing.assert_array_equal(first, draw_projection(20, 8, kind=kind, seed=0))


KNOWN = {
    "orthogonal": [[0.27894062, -1.42081904], [0.61294234, 0.12033518], [-0.88736427, 2.16014409]],
    "gaussian": [[0.12573022, -0.13210486], [0.64042264, 0.10490011], [-0.53566939, 0.36159506]],
}


@kinds
def test_draw_of_a_seed_stays_the_same(kind):
    np.testing.assert_allclose(draw_projection(3, 2, kind=kind, seed=0), KNOWN[kind], atol=1e-6)


def test_orthogonal_rows_are_orthogonal_within_blocks_of_dim():
    dim, blocks = 8, 3
    projection = draw_projection(dim * blocks - 2, dim, seed=0).astype("float64")
    for start in range(0, len(projection), dim):
        block = projection[start : start + dim]
        products = block @ block.T
        np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-5)
    # Blocks are drawn independently of one another.
    assert np.abs(projection[:dim] @ projection[dim : 2 * dim].T).min() > 1e-4


# 5 standard errors, here and below: a draw without fault passes with probability
# above 0.9999, and the seeds are fixed.


@kinds
def test_squared_row_norms_are_distributed_as_those_of_gaussian_vectors(kind):
    num_features, dim = 20_000, 16
    squares = np.sum(draw_projection(num_features, dim, kind=kind, seed=0) ** 2, axis=1)
    # Chi-squared: mean d, variance 2 d, fourth central moment 12 d (d + 4).
    mean_error = np.sqrt(2 * dim / num_features)
    variance_error = np.sqrt((12 * dim * (dim + 4) - (2 * dim) ** 2) / num_features)
    assert abs(squares.mean() - dim) < 5 * mean_error
    assert abs(squares.var() - 2 * dim) < 5 * variance_error


@kinds
def test_rows_have_mean_zero_and_covariance_identity(kind):
    num_features, dim = 20_000, 16
    projection = draw_projection(num_features, dim, kind=kind, seed=0)
    assert np.abs(projection.mean(axis=0)).max() < 5 * num_features**-0.5
    covariance = projection.T @ projection / num_features
    assert np.abs(covariance - np.eye(dim)).max() < 5 * np.sqrt(2 / num_features)


@pytest.mark.parametrize("size", [0, -1, 2.0, "4", None], ids=repr)
@pytest.mark.parametrize("name", ["num_features", "dim"])
def test_size_that_is_no_positive_integer_raises(name, size):
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer"):
        draw_projection(**{"num_features": 4, "dim": 4} | {name: size})


def test_unknown_kind_raises():
    with pytest.raises(ValueError, match="`kind` must be one of"):
        draw_projection(4, 4, kind="hadamard")
