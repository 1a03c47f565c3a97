"""Positive random features of the dark kernel, and their folded projections.

Letters used in shapes here and in the other modules of `ops`:
b batch, t query position, s key position, n query heads, k key/value heads,
g = n / k query heads per key/value head, h head_dim, r rank, m features,
v value dimension.
"""

import math
from typing import Any, NamedTuple

from keras import ops

from keras_darkformer.ops.backend import BASE, reshape


class FeatureProjections(NamedTuple):
    """Everything that turns queries and keys into log-features.

    With `A_q`, `A_k`, `a` and `N` the fields below,

        log phi_q(q) = q A_q
        log phi_k(k) = k A_k + a - |k N|^2

    in logarithms to the base `backend.BASE`. Attention divides by its own
    normaliser, so whatever a query's features have in common (`|M q^|^2 / 2`,
    `m^(-1/2)`) cancels and is left out.

    Attributes:
        query_kernel: `A_q`, of shape `(k, h, m)`.
        key_kernel: `A_k`, of shape `(k, h, m)`.
        key_bias: `a`, of shape `(k, m)`, or `None` for zeros.
        key_norm_kernel: `N`, of shape `(k, h, r)`, or a scalar for that times
            the identity.
    """

    query_kernel: Any
    key_kernel: Any
    key_bias: Any
    key_norm_kernel: Any


class Window(NamedTuple):
    """The last W keys seen by the exact softmax kernel, and how features compare with it.

    Attention over features alone leaves out what the features of a query have
    in common, since it cancels. Beside exact weights it does not: query q of
    head n then weighs a key that features stand for by

        sum_j exp(log phi_q[j](q) + log phi_k[j](k)) exp(q f - |q N|^2 + e_n)

    in logarithms to the base `backend.BASE`, all of them float32.

    Attributes:
        size: W, int. Query t sees the keys t - W + 1 to t exactly.
        norm_kernel: `N`, of shape `(k, h, r)`, or a scalar for that times the
            identity.
        kernel: `f`, of shape `(k, h)`.
        bias: `e`, of shape `(n,)`.
        only: bool. Nothing further back is seen; the other fields, and
            projections, may be `None`.
    """

    size: int
    norm_kernel: Any
    kernel: Any
    bias: Any
    only: bool = False


def fold_projections(geometry: Any, projection: Any, log_weight: Any = None) -> FeatureProjections:
    """Folds geometry M and projection W into one matrix per head, in float32.

    `w . M x^ = x . (h^(-1/4) M' w')`: one product of size `h x m` a token
    instead of `h x r` and `r x m`.
    """
    scale = geometry.shape[-1] ** -0.25
    geometry = ops.cast(geometry, "float32")
    projection = ops.cast(projection, "float32")
    equation = "krh,mr->khm" if len(projection.shape) == 2 else "krh,kmr->khm"
    kernel = ops.einsum(equation, geometry, projection) * (scale / math.log(BASE))
    norm_kernel = ops.transpose(geometry, (0, 2, 1)) * (scale * math.sqrt(0.5 / math.log(BASE)))
    return FeatureProjections(kernel, kernel, _key_bias(log_weight), norm_kernel)


def plain_projections(
    projection: Any, num_heads: int, head_dim: int, log_weight: Any = None
) -> FeatureProjections:
    """The same for inputs that geometry has been applied to: W alone.

    Args:
        projection: `(k, m, r)` or `(m, r)`.
        num_heads: int, k.
        head_dim: int, the h of `x^ = h^(-1/4) x`.
        log_weight: `(k, m)` or `None`.
    """
    scale = head_dim**-0.25
    kernel = ops.swapaxes(ops.cast(projection, "float32"), -1, -2) * (scale / math.log(BASE))
    kernel = ops.broadcast_to(kernel, (num_heads, *kernel.shape[-2:]))
    norm_kernel = ops.convert_to_tensor(scale * math.sqrt(0.5 / math.log(BASE)), dtype="float32")
    return FeatureProjections(kernel, kernel, _key_bias(log_weight), norm_kernel)


def _key_bias(log_weight: Any) -> Any:
    # A weight added to both log-features is, in the ratio, twice that weight
    # added to the key's alone.
    return None if log_weight is None else ops.cast(log_weight, "float32") * (2 / math.log(BASE))


def log_query_features(query: Any, projections: FeatureProjections) -> Any:
    """`(b, k, x, h) -> (b, k, x, m)`, up to one constant per query."""
    return _project(query, projections.query_kernel)


def log_key_features(key: Any, projections: FeatureProjections) -> tuple[Any, Any]:
    """`(b, k, x, h) -> (b, k, x, m), (b, k, x)`: the log-features are the sum of both."""
    _, kernel, bias, norm_kernel = projections
    log_features = _project(key, kernel)
    if bias is not None:
        log_features = log_features + bias[:, None, :]
    return log_features, -_norm(key, norm_kernel)


def log_query_scale(query: Any, window: Window) -> Any:
    """`(b, k, t * g, h) -> (b, k, t * g)`: what `log_query_features` leaves out."""
    shape = tuple(ops.shape(query))[:3]
    scale = _project(query, window.kernel[..., None])[..., 0] - _norm(query, window.norm_kernel)
    by_group = reshape(window.bias, (shape[1], 1, -1))
    scale = reshape(scale, (*shape[:2], -1, by_group.shape[-1])) + by_group
    return reshape(scale, shape)


def _norm(inputs: Any, norm_kernel: Any) -> Any:
    """`|x N|^2`, `(b, k, x, h) -> (b, k, x)`."""
    if len(norm_kernel.shape) == 0:
        return ops.sum(inputs * inputs, axis=-1) * (norm_kernel * norm_kernel)
    projected = _project(inputs, norm_kernel)
    return ops.sum(projected * projected, axis=-1)


def _project(inputs: Any, kernel: Any) -> Any:
    """`(b, k, x, h)` times `(k, h, m)`, head by head."""
    if kernel.shape[0] == 1:
        # One head is one plain product. Broadcast over the batch instead, it
        # comes out wrong on TensorFlow's CPU (oneDNN, TensorFlow 2.21).
        shape = tuple(ops.shape(inputs))
        outputs = reshape(inputs, (-1, shape[-1])) @ kernel[0]
        return reshape(outputs, (*shape[:-1], kernel.shape[-1]))
    return inputs @ kernel


def apply_geometry(inputs: Any, geometry: Any) -> Any:
    """`M x` in float32: `(b, t, n, h) -> (b, t, n, r)`, head i by M of head i // (n / k)."""
    shape = tuple(ops.shape(inputs))
    kv_heads, rank, head_dim = geometry.shape
    inputs = reshape(inputs, (*shape[:2], kv_heads, shape[2] // kv_heads, head_dim))
    outputs = ops.einsum(
        "btkgh,krh->btkgr", ops.cast(inputs, "float32"), ops.cast(geometry, "float32")
    )
    return reshape(outputs, (*shape[:3], rank))


def dark_features(inputs: Any, geometry: Any, projection: Any, *, log_weight: Any = None) -> Any:
    """Positive random features phi(x) of the dark kernel, without a stabiliser.

    With `x^ = h^(-1/4) x` and `w_j` the rows of the projection,

        phi_j(x) = m^(-1/2) exp(w_j . M x^ - |M x^|^2 / 2)

    so that `E[phi(q) . phi(k)] = exp(q^' M'M k^)`, the dark kernel. These are
    the features themselves, to look at and to check estimates with; large
    inputs overflow. `dark_attention` computes the stable ratio instead.

    Args:
        inputs: float tensor of shape `(b, s, k, h)`, queries or keys.
        geometry: M, of shape `(k, r, h)`.
        projection: W, of shape `(k, m, r)` or `(m, r)`.
        log_weight: optional, of shape `(k, m)`, added to `log phi`.

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
    geometry = ops.convert_to_tensor(geometry)
    projections = fold_projections(geometry, projection)
    inputs = ops.transpose(ops.cast(inputs, "float32"), (0, 2, 1, 3))
    logits, log_scale = log_key_features(inputs, projections)
    log_features = (logits + log_scale[..., None]) * math.log(BASE)
    if log_weight is not None:
        log_features = log_features + ops.cast(log_weight, "float32")[:, None, :]
    num_features = projections.key_kernel.shape[-1]
    return ops.transpose(ops.exp(log_features) * num_features**-0.5, (0, 2, 1, 3))
