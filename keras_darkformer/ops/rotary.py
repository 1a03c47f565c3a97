"""Rotary position embedding, for layers that must not depend on KerasHub."""

from keras import ops

from keras_darkformer.ops.backend import numbers
from keras_darkformer.types import Tensor


def rotary_embedding(inputs: Tensor, positions: Tensor, max_wavelength: float = 10_000.0) -> Tensor:
    """Rotates pairs of channels by angles proportional to the position.

    Channel i is paired with channel i + h/2, and the pair is rotated by
    `position * max_wavelength^(-2i / h)`. The scores of rotated queries and keys then depend only
    on the difference of their positions.

    Args:
        inputs: float tensor of shape `(b, t, n, h)`, h even.
        positions: int or float tensor of shape `(t,)` or `(b, t)`.
        max_wavelength: float. About the tokens per turn of the slowest pair, divided by 2 pi.

    Returns:
        A tensor of the shape and dtype of `inputs`.

    Raises:
        ValueError: if the last dimension is odd.

    References:
        - [RoFormer](https://arxiv.org/abs/2104.09864), equation 34
    """
    inputs, positions = numbers(inputs, positions)
    head_dim = inputs.shape[-1]
    if head_dim % 2:
        raise ValueError(
            "Rotary embedding pairs channels: the head dimension must be even. "
            f"Received: {head_dim}"
        )
    exponent = ops.arange(head_dim // 2, dtype="float32") * (-2.0 / head_dim)
    frequencies = ops.power(float(max_wavelength), exponent)
    angles = ops.cast(positions, "float32")[..., None, None] * frequencies
    cos, sin = ops.cos(angles), ops.sin(angles)  # ([b,] t, 1, h / 2)
    first, second = ops.split(ops.cast(inputs, "float32"), 2, axis=-1)
    rotated = ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return ops.cast(rotated, inputs.dtype)
