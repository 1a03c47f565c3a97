"""Synthetic queries and keys whose logits come from few directions, and what rotates them."""

import numpy as np


def anisotropic(
    batch=4, length=32, heads=(1, 1), head_dim=8, seed=0, scale=1.0, directions=2, small=0.3
):
    """Query `(b, t, n, h)` and key `(b, t, k, h)`, float32.

    Along `directions` directions of a random basis they are `scale` large,
    along the others `small` of that. Their means are not zero.
    """
    basis = np.linalg.qr(np.random.default_rng(99).standard_normal((head_dim, head_dim)))[0]
    size = np.where(np.arange(head_dim) < directions, 2.0, small) * scale
    rng = np.random.default_rng([seed, 17])
    query, key = (rng.standard_normal((batch, length, n, head_dim)) for n in heads)
    mean = rng.standard_normal((2, head_dim)) * 0.5 * scale
    return tuple(
        ((x * size) @ basis.T + m).astype("float32")
        for x, m in zip((query, key), mean, strict=True)
    )


def rotated(x, start=0, layout=None):
    """Rotary positions: members p and p + h / 2 of plane p turn; a layout shuffles the result."""
    half = x.shape[-1] // 2
    positions = start + np.arange(x.shape[1])[:, None, None]
    turns = np.exp(1j * positions * 20.0 ** (-np.arange(half) / half))
    planes = (x[..., :half] + 1j * x[..., half:]) * turns
    turned = np.concatenate([planes.real, planes.imag], axis=-1).astype("float32")
    return turned if layout is None else turned[..., layout]
