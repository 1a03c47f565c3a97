"""From the parameters of a feature map to log-features of queries and keys.

Letters used in shapes here and in the other modules of `ops`: b batch, t query position, s key
position, n query heads, k key/value heads, g = n / k query heads per key/value head, h head_dim, r
rank, m features, v value dimension.
"""

import math
from typing import NamedTuple

from keras import ops

from keras_darkformer.ops.backend import BASE, affine, reshape
from keras_darkformer.types import Tensor

TO_BASE = 1 / math.log(BASE)


class QueryScale(NamedTuple):
    """The scale that all of a query's features share, with the offset of the far part.

    It cancels if there are only features. Beside an exact memory, whose weights have their own
    scale, it counts:

        log scale(q) = q . f - |q N_q|^2 + e

    Attributes:
        norm_kernel: `N_q`, of shape `(k, h, r)`.
        linear: `f`, of shape `(k, h)`.
        bias: `e`, of shape `(n,)`.
    """

    norm_kernel: Tensor
    linear: Tensor
    bias: Tensor


class FoldedFeatures(NamedTuple):
    """Everything that turns queries and keys into log-features.

    With `A_q`, `A_k`, `a`, `N` and `v` the fields below,

        log phi_q(q) = q A_q
        log phi_k(k) = k A_k + a - |k N|^2 + k v

    in logarithms to the base `backend.BASE`. Attention divides by its own normaliser, so factors
    that all of a query's features share (`|M q^|^2 / 2`, `m^(-1/2)`) cancel; they are in
    `query_scale`.

    A kernel `A` may come as two factors, `(k, h, r)` and `(k, r, m)`, to be applied one after the
    other.

    Attributes:
        query_kernel: `A_q`, of shape `(k, h, m)`, or its factors.
        key_kernel: `A_k`, of shape `(k, h, m)`, or its factors.
        key_bias: `a`, of shape `(k, m)`, or `None` for zeros.
        key_norm_kernel: `N`, of shape `(k, h, r)`, a scalar for that times the identity, or `None`
            for zero.
        key_linear: `v`, of shape `(k, h)`, or `None` for zeros.
        query_scale: `QueryScale`, or `None` if it is not needed or not known. Without it no exact
            memory can share the normaliser.
    """

    query_kernel: Tensor
    key_kernel: Tensor
    key_bias: Tensor = None
    key_norm_kernel: Tensor = None
    key_linear: Tensor = None
    query_scale: QueryScale | None = None

    @property
    def num_heads(self) -> int:
        """Heads k of keys and values."""
        return self._last_factor.shape[0]

    @property
    def num_features(self) -> int:
        """Features m per head."""
        return self._last_factor.shape[-1]

    @property
    def _last_factor(self) -> Tensor:
        return self.key_kernel[1] if isinstance(self.key_kernel, tuple) else self.key_kernel


class DarkParameters(NamedTuple):
    """The parameters of a dark feature map, as `dark_attention` takes them: tensors or `None`.

    With `x = q^ - b` and `y = k^ - c`,

        log phi_q[j](q) = w_j . M_q x - |M_q x|^2 / 2 + l_j - log(m) / 2
        log phi_k[j](k) = w_j . M_k y - |M_k y|^2 / 2 + l_j - log(m) / 2 + b . k^

    `E[phi_q . phi_k] = exp(x' M_q' M_k y + b . k^)`: for `M_q' M_k = I` that is softmax's
    `exp(q^ . k^)` up to a factor of the query, which cancels.

    Attributes:
        geometry: `M_k`, of shape `(k, r, h)`; `None` for the identity.
        projection: W, of shape `(k, m, r)` or `(m, r)`.
        query_geometry: `M_q`, of shape `(k, r, h)`; `None` for `M_k`.
        log_weight: `l`, of shape `(k, m)`.
        query_shift: `b`, of shape `(k, h)`.
        key_shift: `c`, of shape `(k, h)`.
    """

    geometry: Tensor
    projection: Tensor
    query_geometry: Tensor = None
    log_weight: Tensor = None
    query_shift: Tensor = None
    key_shift: Tensor = None

    def in_float32(self) -> "DarkParameters":
        """The same as float32 tensors, W with an axis of heads."""
        fields = [None if x is None else ops.cast(x, "float32") for x in self]
        parameters = DarkParameters(*fields)
        if len(parameters.projection.shape) == 2:
            parameters = parameters._replace(projection=parameters.projection[None])
        return parameters


def fold(
    parameters: DarkParameters, num_heads: int, head_dim: int, *, factored: bool = False
) -> FoldedFeatures:
    """Folds geometry M, projection W and shifts into one matrix per head, in float32.

    `w . M x^ = x . (h^(-1/4) M' w')`: one product of size `h x m` per token instead of `h x r` and
    `r x m`.

    Args:
        parameters: `DarkParameters`.
        num_heads: int, k.
        head_dim: int, h.
        factored: bool. Whether to leave M and W apart, for so few tokens that folding would cost
            more than everything else.
    """
    parameters = parameters.in_float32()
    geometry, projection, query_geometry, log_weight, query_shift, key_shift = parameters
    scale = head_dim**-0.25
    projection = ops.broadcast_to(projection, (num_heads, *projection.shape[1:]))
    weights = ops.swapaxes(projection, 1, 2) * TO_BASE  # (k, r, m)
    key_kernel = _chain(geometry, weights, scale, factored)
    query_kernel = (
        key_kernel if query_geometry is None else _chain(query_geometry, weights, scale, factored)
    )
    norm_scale = scale * math.sqrt(0.5 * TO_BASE)
    if geometry is None:
        norm_kernel = ops.convert_to_tensor(norm_scale, dtype="float32")
    else:
        norm_kernel = ops.swapaxes(geometry, 1, 2) * norm_scale

    # In the ratio, a weight added to both log-features equals twice that weight added to the key's
    # alone. What is constant for a query moves there too.
    bias = None if log_weight is None else log_weight * (2 * TO_BASE)
    linear = None
    if query_shift is not None or key_shift is not None:
        query_shift, key_shift = _shifts(parameters, num_heads, head_dim)
        shifted_key = _transform(key_shift, geometry)
        shifted_query = _transform(
            query_shift, geometry if query_geometry is None else query_geometry
        )
        constant = ((shifted_key + shifted_query)[:, None, :] @ weights)[:, 0]
        bias = -constant if bias is None else bias - constant
        # -|M (k^ - c)|^2 / 2 + b . k^, without its second-order part
        linear = query_shift + _transform_back(shifted_key, geometry)
        linear = linear * (scale * TO_BASE)
        if not factored and geometry is not None:
            key_kernel, linear = key_kernel + linear[..., None], None
    return FoldedFeatures(query_kernel, key_kernel, bias, norm_kernel, linear)


def fold_query_scale(
    parameters: DarkParameters,
    num_heads: int,
    head_dim: int,
    num_query_heads: int,
    far_offset: Tensor,
) -> QueryScale:
    """What `fold` leaves out because it cancels without an exact memory.

    The logits of the memory are `q^ . k^`. In terms of the features, that is
    `x . y + b . k^ + (q^ . c - b . c)`. The last term and the query's norm go here.
    """
    parameters = parameters.in_float32()
    geometry, query_geometry = parameters.geometry, parameters.query_geometry
    scale = head_dim**-0.25
    if geometry is None:
        geometry = ops.broadcast_to(
            ops.eye(head_dim, dtype="float32"), (num_heads, head_dim, head_dim)
        )
    if query_geometry is None:
        query_geometry = geometry
    query_shift, key_shift = _shifts(parameters, num_heads, head_dim)
    shifted_query = _transform(query_shift, query_geometry)
    shifted_key = _transform(key_shift, geometry)
    linear = _transform_back(shifted_query, query_geometry) + key_shift
    bias = (
        -0.5 * ops.sum(shifted_query**2 + shifted_key**2, axis=-1)
        - ops.sum(query_shift * key_shift, axis=-1)
        - math.log(parameters.projection.shape[-2])
    )
    bias = ops.repeat(bias, num_query_heads // num_heads, axis=0)
    if far_offset is not None:
        bias = bias + ops.cast(far_offset, "float32")
    return QueryScale(
        norm_kernel=ops.swapaxes(query_geometry, 1, 2) * (scale * math.sqrt(0.5 * TO_BASE)),
        linear=linear * (scale * TO_BASE),
        bias=bias * TO_BASE,
    )


def fold_exponential(query_kernel: Tensor, key_kernel: Tensor, key_bias: Tensor) -> FoldedFeatures:
    """Folds features without geometry or norm, `phi_q = exp(q A_q)`, `phi_k = exp(k A_k + a)`."""
    fields = (ops.cast(x, "float32") for x in (query_kernel, key_kernel, key_bias))
    return FoldedFeatures(*(x * TO_BASE for x in fields))


def _shifts(parameters: DarkParameters, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Shifts of queries and keys, zeros where there are none."""
    query_shift, key_shift = parameters.query_shift, parameters.key_shift
    if query_shift is None or key_shift is None:
        zeros = ops.zeros((num_heads, head_dim), dtype="float32")
        query_shift = zeros if query_shift is None else query_shift
        key_shift = zeros if key_shift is None else key_shift
    return query_shift, key_shift


def _chain(geometry: Tensor, weights: Tensor, scale: float, factored: bool) -> Tensor:
    """`h^(-1/4) M' W'`, or its factors."""
    if geometry is None:
        return weights * scale
    if factored:
        return ops.swapaxes(geometry, 1, 2) * scale, weights
    return (ops.swapaxes(geometry, 1, 2) @ weights) * scale


def _transform(vector: Tensor, geometry: Tensor) -> Tensor:
    """`M x` of one vector per head."""
    return vector if geometry is None else (geometry @ vector[..., None])[..., 0]


def _transform_back(vector: Tensor, geometry: Tensor) -> Tensor:
    """`M' x` of one vector per head."""
    return vector if geometry is None else (vector[:, None, :] @ geometry)[:, 0]


def log_query_features(query: Tensor, features: FoldedFeatures) -> Tensor:
    """`(b, k, x, h) -> (b, k, x, m)`, up to one constant per query."""
    kernel = features.query_kernel
    if isinstance(kernel, tuple):
        return _project(_project(query, kernel[0]), kernel[1])
    return _project(query, kernel)


def log_key_features(key: Tensor, features: FoldedFeatures) -> tuple[Tensor, Tensor]:
    """`(b, k, x, h) -> (b, k, x, m), (b, k, x)`: the log-features are the sum of both."""
    kernel, bias, linear = features.key_kernel, features.key_bias, features.key_linear
    if isinstance(kernel, tuple):
        projected = _project(key, kernel[0])
        log_features = _project(projected, kernel[1])
        # The norm is that of the projection computed above.
        log_scale = ops.sum(projected * projected, axis=-1) * (-0.5 * TO_BASE)
    else:
        log_features = _project(key, kernel, bias)
        log_scale, bias = -_norm(key, features.key_norm_kernel), None
    if bias is not None:
        log_features = log_features + bias[:, None, :]
    if linear is not None:
        log_scale = log_scale + _project(key, linear[..., None])[..., 0]
    return log_features, log_scale


def log_query_scale(query: Tensor, query_scale: QueryScale) -> Tensor:
    """`(b, k, t * g, h) -> (b, k, t * g)`: what `log_query_features` leaves out."""
    shape = tuple(ops.shape(query))[:3]
    linear = _project(query, query_scale.linear[..., None])[..., 0]
    scale = linear - _norm(query, query_scale.norm_kernel)
    groups = query_scale.bias.shape[0] // query_scale.linear.shape[0]
    by_group = reshape(query_scale.bias, (shape[1], 1, groups))
    scale = reshape(scale, (*shape[:2], shape[2] // groups, groups)) + by_group
    return reshape(scale, shape)


def _norm(inputs: Tensor, norm_kernel: Tensor) -> Tensor:
    """`|x N|^2`, `(b, k, x, h) -> (b, k, x)`."""
    if norm_kernel is None:
        return ops.zeros_like(inputs[..., 0])
    if len(norm_kernel.shape) == 0:
        return ops.sum(inputs * inputs, axis=-1) * (norm_kernel * norm_kernel)
    projected = _project(inputs, norm_kernel)
    return ops.sum(projected * projected, axis=-1)


def _project(inputs: Tensor, kernel: Tensor, bias: Tensor = None) -> Tensor:
    """`(b, k, x, h)` times `(k, h, m)`, plus `(k, m)` or nothing, head by head."""
    if kernel.shape[0] == 1:
        # With one head this is a plain product. Broadcast over the batch, it comes out wrong on
        # TensorFlow's CPU (oneDNN, TensorFlow 2.21).
        shape = tuple(ops.shape(inputs))
        outputs = affine(reshape(inputs, (-1, shape[-1])), kernel[0], bias)
        return reshape(outputs, (*shape[:-1], kernel.shape[-1]))
    return affine(inputs, kernel, None if bias is None else bias[:, None, :])
