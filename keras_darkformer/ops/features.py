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

    With `A_q`, `A_k`, `a`, `N` and `v` the fields below,

        log phi_q(q) = q A_q
        log phi_k(k) = k A_k + a - |k N|^2 + k v

    in logarithms to the base `backend.BASE`. Attention divides by its own
    normaliser, so whatever a query's features have in common (`|M q^|^2 / 2`,
    `m^(-1/2)`) cancels and is left out.

    A kernel `A` may come as two factors, `(k, h, r)` and `(k, r, m)`, to be
    applied one after the other.

    Attributes:
        query_kernel: `A_q`, of shape `(k, h, m)`, or its factors.
        key_kernel: `A_k`, of shape `(k, h, m)`, or its factors.
        key_bias: `a`, of shape `(k, m)`, or `None` for zeros.
        key_norm_kernel: `N`, of shape `(k, h, r)`, a scalar for that times
            the identity, or `None` for zero.
        key_linear: `v`, of shape `(k, h)`, or `None` for zeros.
    """

    query_kernel: Any
    key_kernel: Any
    key_bias: Any = None
    key_norm_kernel: Any = None
    key_linear: Any = None

    @property
    def num_heads(self) -> int:
        """Heads k of keys and values."""
        return self._last_factor.shape[0]

    @property
    def num_features(self) -> int:
        """Features m per head."""
        return self._last_factor.shape[-1]

    @property
    def _last_factor(self) -> Any:
        return self.key_kernel[1] if isinstance(self.key_kernel, tuple) else self.key_kernel


class FeatureMap(NamedTuple):
    """The parameters of a map, as `dark_attention` takes them: tensors or `None`.

    With `x = q^ - b` and `y = k^ - c`,

        log phi_q[j](q) = w_j . M_q x - |M_q x|^2 / 2 + l_j - log(m) / 2
        log phi_k[j](k) = w_j . M_k y - |M_k y|^2 / 2 + l_j - log(m) / 2 + b . k^

    `E[phi_q . phi_k] = exp(x' M_q' M_k y + b . k^)`: for `M_q' M_k = I` that is
    softmax's `exp(q^ . k^)` but for a factor of the query, which cancels.

    Attributes:
        geometry: `M_k`, of shape `(k, r, h)`; `None` for the identity.
        projection: W, of shape `(k, m, r)` or `(m, r)`.
        query_geometry: `M_q`, of shape `(k, r, h)`; `None` for `M_k`.
        log_weight: `l`, of shape `(k, m)`.
        query_shift: `b`, of shape `(k, h)`.
        key_shift: `c`, of shape `(k, h)`.
    """

    geometry: Any
    projection: Any
    query_geometry: Any = None
    log_weight: Any = None
    query_shift: Any = None
    key_shift: Any = None

    def in_float32(self) -> "FeatureMap":
        """The same as float32 tensors, W with an axis of heads."""
        fields = [None if x is None else ops.cast(x, "float32") for x in self]
        feature_map = FeatureMap(*fields)
        if len(feature_map.projection.shape) == 2:
            feature_map = feature_map._replace(projection=feature_map.projection[None])
        return feature_map


def fold_projections(
    feature_map: FeatureMap, num_heads: int, head_dim: int, *, factored: bool = False
) -> FeatureProjections:
    """Folds geometry M, projection W and shifts into one matrix per head, in float32.

    `w . M x^ = x . (h^(-1/4) M' w')`: one product of size `h x m` a token
    instead of `h x r` and `r x m`.

    Args:
        feature_map: `FeatureMap`.
        num_heads: int, k.
        head_dim: int, h.
        factored: bool. Leave M and W apart: for so few tokens that folding
            would cost more than all the rest.
    """
    feature_map = feature_map.in_float32()
    geometry, projection, query_geometry, log_weight, query_shift, key_shift = feature_map
    scale, to_base = head_dim**-0.25, 1 / math.log(BASE)
    projection = ops.broadcast_to(projection, (num_heads, *projection.shape[1:]))
    weights = ops.swapaxes(projection, 1, 2) * to_base  # (k, r, m)
    key_kernel = _chain(geometry, weights, scale, factored)
    query_kernel = (
        key_kernel if query_geometry is None else _chain(query_geometry, weights, scale, factored)
    )
    norm_scale = scale * math.sqrt(0.5 * to_base)
    if geometry is None:
        norm_kernel = ops.convert_to_tensor(norm_scale, dtype="float32")
    else:
        norm_kernel = ops.swapaxes(geometry, 1, 2) * norm_scale

    # A weight added to both log-features is, in the ratio, twice that weight
    # added to the key's alone; what is constant to a query moves there too.
    bias = None if log_weight is None else log_weight * (2 * to_base)
    linear = None
    if query_shift is not None or key_shift is not None:
        zeros = ops.zeros((num_heads, head_dim), dtype="float32")
        query_shift = zeros if query_shift is None else query_shift
        key_shift = zeros if key_shift is None else key_shift
        shifted_key = _transform(key_shift, geometry)
        shifted_query = _transform(
            query_shift, geometry if query_geometry is None else query_geometry
        )
        constant = ops.einsum("kr,krm->km", shifted_key + shifted_query, weights)
        bias = -constant if bias is None else bias - constant
        # -|M (k^ - c)|^2 / 2 + b . k^, less its part of second order
        linear = query_shift + _transform_back(shifted_key, geometry)
        linear = linear * (scale * to_base)
        if not factored and geometry is not None:
            key_kernel, linear = key_kernel + linear[..., None], None
    return FeatureProjections(query_kernel, key_kernel, bias, norm_kernel, linear)


def _chain(geometry: Any, weights: Any, scale: float, factored: bool) -> Any:
    """`h^(-1/4) M' W'`, or its factors."""
    if geometry is None:
        return weights * scale
    if factored:
        return ops.swapaxes(geometry, 1, 2) * scale, weights
    return ops.einsum("krh,krm->khm", geometry, weights) * scale


def _transform(vector: Any, geometry: Any) -> Any:
    """`M x` of one vector per head."""
    return vector if geometry is None else ops.einsum("krh,kh->kr", geometry, vector)


def _transform_back(vector: Any, geometry: Any) -> Any:
    """`M' x` of one vector per head."""
    return vector if geometry is None else ops.einsum("krh,kr->kh", geometry, vector)


def direct_projections(query_kernel: Any, key_kernel: Any, key_bias: Any) -> FeatureProjections:
    """Of features without geometry and norm: `phi_q = exp(q A_q)`, `phi_k = exp(k A_k + a)`."""
    fields = (ops.cast(x, "float32") for x in (query_kernel, key_kernel, key_bias))
    return FeatureProjections(*(x * (1 / math.log(BASE)) for x in fields))


class Window(NamedTuple):
    """A sliding window of the exact kernel, and the scale that features share with it.

    Logarithms of the weights, to the base `backend.BASE`, with `N_q`, `f` and
    `e` the fields below: within the window that of softmax,

        near(t, s) = q_t . k_s / sqrt(h),    0 <= t - s < size

    and behind it those of the features with what cancels without a window,

        far(t, s) = log sum_j phi_q[j](q_t) phi_k[j](k_s) + q_t . f - |q_t N_q|^2 + e

    Attributes:
        size: Tokens a query meets exactly, itself among them.
        norm_kernel: `N_q`, of shape `(k, h, r)`.
        kernel: `f`, of shape `(k, h)`.
        bias: `e`, of shape `(n,)`.
        only: Whether there is no far part at all.
    """

    size: int
    norm_kernel: Any
    kernel: Any
    bias: Any
    only: bool = False


def fold_window(
    feature_map: FeatureMap,
    num_heads: int,
    head_dim: int,
    num_query_heads: int,
    size: int,
    far_offset: Any,
    *,
    only: bool,
) -> Window:
    """What `fold_projections` leaves out because it cancels without a window.

    The window holds `q^ . k^`. For the far part that is
    `x . y + b . k^ + (q^ . c - b . c)`: the last term, and the query's norm,
    go here.
    """
    feature_map = feature_map.in_float32()
    geometry, projection, query_geometry, _, query_shift, key_shift = feature_map
    scale, to_base = head_dim**-0.25, 1 / math.log(BASE)
    if geometry is None:
        geometry = ops.broadcast_to(
            ops.eye(head_dim, dtype="float32"), (num_heads, head_dim, head_dim)
        )
    if query_geometry is None:
        query_geometry = geometry
    zeros = ops.zeros((num_heads, head_dim), dtype="float32")
    query_shift = zeros if query_shift is None else query_shift
    key_shift = zeros if key_shift is None else key_shift
    shifted_query = _transform(query_shift, query_geometry)
    shifted_key = _transform(key_shift, geometry)
    kernel = _transform_back(shifted_query, query_geometry) + key_shift
    bias = (
        -0.5 * ops.sum(shifted_query**2 + shifted_key**2, axis=-1)
        - ops.sum(query_shift * key_shift, axis=-1)
        - math.log(projection.shape[-2])
    )
    bias = ops.repeat(bias, num_query_heads // num_heads, axis=0)
    if far_offset is not None:
        bias = bias + ops.cast(far_offset, "float32")
    return Window(
        size=size,
        norm_kernel=ops.swapaxes(query_geometry, 1, 2) * (scale * math.sqrt(0.5 * to_base)),
        kernel=kernel * (scale * to_base),
        bias=bias * to_base,
        only=only,
    )


def log_query_features(query: Any, projections: FeatureProjections) -> Any:
    """`(b, k, x, h) -> (b, k, x, m)`, up to one constant per query."""
    kernel = projections.query_kernel
    if isinstance(kernel, tuple):
        return _project(_project(query, kernel[0]), kernel[1])
    return _project(query, kernel)


def log_key_features(key: Any, projections: FeatureProjections) -> tuple[Any, Any]:
    """`(b, k, x, h) -> (b, k, x, m), (b, k, x)`: the log-features are the sum of both."""
    _, kernel, bias, norm_kernel, linear = projections
    if isinstance(kernel, tuple):
        projected = _project(key, kernel[0])
        log_features = _project(projected, kernel[1])
        # The norm is that of what has been computed already.
        log_scale = ops.sum(projected * projected, axis=-1) * (-0.5 / math.log(BASE))
    else:
        log_features = _project(key, kernel)
        log_scale = -_norm(key, norm_kernel)
    if bias is not None:
        log_features = log_features + bias[:, None, :]
    if linear is not None:
        log_scale = log_scale + _project(key, linear[..., None])[..., 0]
    return log_features, log_scale


def log_query_scale(query: Any, window: Window) -> Any:
    """`(b, k, t * g, h) -> (b, k, t * g)`: what `log_query_features` leaves out."""
    shape = tuple(ops.shape(query))[:3]
    scale = _project(query, window.kernel[..., None])[..., 0] - _norm(query, window.norm_kernel)
    by_group = reshape(window.bias, (shape[1], 1, -1))
    scale = reshape(scale, (*shape[:2], -1, by_group.shape[-1])) + by_group
    return reshape(scale, shape)


def _norm(inputs: Any, norm_kernel: Any) -> Any:
    """`|x N|^2`, `(b, k, x, h) -> (b, k, x)`."""
    if norm_kernel is None:
        return ops.zeros_like(inputs[..., 0])
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


def dark_features(
    inputs: Any,
    geometry: Any,
    projection: Any,
    *,
    log_weight: Any = None,
    shift: Any = None,
    tilt: Any = None,
) -> Any:
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
        shift: optional, of shape `(k, h)`, taken from `x^`: of queries their
            `query_shift`, of keys their `key_shift`.
        tilt: optional, of shape `(k, h)`: `tilt . x^` is added to `log phi`;
            of keys the `query_shift`. See `dark_attention`.

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
    inputs, geometry = ops.cast(inputs, "float32"), ops.cast(geometry, "float32")
    projection = ops.cast(projection, "float32")
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
