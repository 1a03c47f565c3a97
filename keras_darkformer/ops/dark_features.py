"""The features themselves, for inspection and for checking estimates."""

from keras import ops

from keras_darkformer.ops.backend import numbers, of_heads
from keras_darkformer.types import Tensor


def apply_geometry(inputs: Tensor, geometry: Tensor) -> Tensor:
    """`M x` in float32, with one geometry for each key/value head.

    Args:
        inputs: float tensor of shape `(b, t, n, h)`, queries or keys.
        geometry: M, of shape `(k, r, h)`, n a multiple of k. Head i uses M of head `i // (n / k)`.

    Returns:
        A float32 tensor of shape `(b, t, n, r)`.
    """
    inputs, geometry = numbers(inputs, geometry)
    return of_heads(ops.cast(inputs, "float32"), ops.cast(geometry, "float32"))


def dark_features(
    inputs: Tensor,
    geometry: Tensor,
    projection: Tensor,
    *,
    log_weight: Tensor = None,
    shift: Tensor = None,
    tilt: Tensor = None,
) -> Tensor:
    """Positive random features phi(x) of the dark kernel, without a stabiliser.

    With `x^ = h^(-1/4) x` and `w_j` the rows of the projection,

        phi_j(x) = m^(-1/2) exp(w_j . M x^ - |M x^|^2 / 2)

    so that `E[phi(q) . phi(k)] = exp(q^' M'M k^)`, the dark kernel. The features are for inspection
    and for checking estimates; large inputs overflow. `dark_attention` computes the stable ratio
    instead.

    Args:
        inputs: float tensor of shape `(b, s, k, h)`, queries or keys.
        geometry: M, of shape `(k, r, h)`.
        projection: W, of shape `(k, m, r)` or `(m, r)`.
        log_weight: optional, of shape `(k, m)`, added to `log phi`.
        shift: optional, of shape `(k, h)`, subtracted from `x^`: the `query_shift` for queries, the
            `key_shift` for keys.
        tilt: optional, of shape `(k, h)`: `tilt . x^` is added to `log phi`; for keys it is the
            `query_shift`. See `dark_attention`.

    Returns:
        A float32 tensor of shape `(b, s, k, m)`.

    Example:

    >>> x = np.random.normal(size=(1, 10, 2, 8))
    >>> geometry = np.stack([np.eye(8)] * 2)
    >>> dark_features(x, geometry, draw_projection(16, 8)).shape
    (1, 10, 2, 16)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
        - [Rethinking Attention with Performers](https://arxiv.org/abs/2009.14794), lemma 1
    """
    inputs, geometry, projection = (
        ops.cast(x, "float32") for x in numbers(inputs, geometry, projection)
    )
    shift, tilt = (None if x is None else ops.cast(x, "float32") for x in (shift, tilt))
    scaled = inputs * inputs.shape[-1] ** -0.25
    projected = apply_geometry(scaled if shift is None else scaled - shift, geometry)
    equation = "bskr,mr->bskm" if len(projection.shape) == 2 else "bskr,kmr->bskm"
    log_features = ops.einsum(equation, projected, projection)
    log_features = log_features - 0.5 * ops.sum(projected**2, axis=-1, keepdims=True)
    if log_weight is not None:
        log_features = log_features + ops.cast(log_weight, "float32")
    if tilt is not None:
        log_features = log_features + ops.sum(scaled * tilt, axis=-1, keepdims=True)
    return ops.exp(log_features) * projection.shape[-2] ** -0.5
