import keras
import numpy as np
import pytest
from backends import run
from keras import ops

from keras_darkformer.ops import rotary_embedding


def rotate(inputs, positions, **options):
    return run(lambda *tensors: rotary_embedding(*tensors, **options), inputs, positions)


def rotated_reference(inputs, positions, max_wavelength=10_000.0):
    """Pairs of channels as complex numbers, turned, in float64."""
    half = inputs.shape[-1] // 2
    pairs = inputs[..., :half].astype("float64") + 1j * inputs[..., half:]
    angles = positions[..., None, None] * max_wavelength ** (-np.arange(half) / half)
    turned = pairs * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype("float32")


@pytest.mark.parametrize("head_dim", [2, 8])
@pytest.mark.parametrize("max_wavelength", [10_000.0, 100.0])
def test_rotation_agrees_with_the_formula(head_dim, max_wavelength, rng):
    inputs, positions = normal(rng, 2, 30, 3, head_dim), np.arange(5, 35)
    output = rotate(inputs, positions, max_wavelength=max_wavelength)
    expected = rotated_reference(inputs, positions, max_wavelength)
    np.testing.assert_allclose(output, expected, atol=2e-5)


def test_rows_of_a_batch_may_have_their_own_positions(rng):
    inputs, positions = normal(rng, 2, 10, 3, 8), rng.integers(0, 500, (2, 10))
    expected = rotated_reference(inputs, positions)
    np.testing.assert_allclose(rotate(inputs, positions), expected, atol=2e-4)


def test_position_zero_is_left_as_it_is_and_lengths_are_kept(rng):
    inputs = normal(rng, 1, 40, 2, 8)
    output = rotate(inputs, np.arange(40))
    np.testing.assert_array_equal(output[:, 0], inputs[:, 0])
    lengths = [np.linalg.norm(x, axis=-1) for x in (output, inputs)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_scores_depend_on_differences_of_positions_only(rng):
    query, key = normal(rng, 1, 20, 2, 8), normal(rng, 1, 20, 2, 8)

    def scores(shift):
        positions = np.arange(20) + shift
        return np.einsum("btnh,bsnh->bnts", rotate(query, positions), rotate(key, positions))

    np.testing.assert_allclose(scores(700), scores(0), atol=2e-3)


def test_dtype_of_the_inputs_is_kept(rng):
    inputs = ops.cast(normal(rng, 1, 4, 1, 8), "bfloat16")
    output = rotary_embedding(inputs, np.arange(4))
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"


def test_odd_head_dim_raises():
    with pytest.raises(ValueError, match="head dimension must be even"):
        rotary_embedding(np.zeros((1, 4, 1, 7), "float32"), np.arange(4))
