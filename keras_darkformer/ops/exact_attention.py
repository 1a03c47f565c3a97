"""Attention with the dark kernel itself: what the features estimate."""

from keras import ops

from keras_darkformer.ops.attention import output_dtype
from keras_darkformer.ops.backend import numbers, pad, softmax_attention, tensors
from keras_darkformer.ops.checks import check_attention, check_geometry
from keras_darkformer.ops.dark_features import apply_geometry
from keras_darkformer.types import Tensor


def exact_dark_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Tensor = None,
    *,
    causal: bool = False,
    key_mask: Tensor = None,
    attention_mask: Tensor = None,
) -> Tensor:
    """Attention with the dark kernel itself, which the features estimate.

    This is softmax attention between `M q` and `M k`, scaled by `h^(-1/2)`, through
    `keras.ops.dot_product_attention`. It is quadratic in the length, and uses flash attention where
    Keras does. With `M = I` it is ordinary attention.

    Args:
        query: float tensor of shape `(b, t, n, h)`.
        key: float tensor of shape `(b, s, k, h)`, n a multiple of k.
        value: float tensor of shape `(b, s, k, v)`.
        geometry: M, of shape `(k, r, h)`; `None` for the identity.
        causal: bool. Query t attends to keys up to t; t and s must be equal.
        key_mask: optional bool tensor of shape `(b, s)` or `(1, s)`, true = attend.
        attention_mask: optional bool tensor of rank 4, true = attend, that broadcasts to
            `(b, n, t, s)`. All masks given apply together.

    Returns:
        A tensor of shape `(b, t, n, v)` and the inputs' dtype. A query with no key to attend to
        gives zeros and passes no gradient.

    Raises:
        ValueError: if shapes do not fit; the message names the argument.

    Example:

    >>> q, k, v = (np.random.normal(size=(1, 100, 2, 8)) for _ in range(3))
    >>> exact_dark_attention(q, k, v, np.stack([np.eye(8)] * 2), causal=True).shape
    (1, 100, 2, 8)

    References:
        - [Data-Aware Random Feature Kernel for Transformers](https://arxiv.org/abs/2603.04127)
    """
    query, key, value, geometry = numbers(query, key, value, geometry)
    (key_mask,) = tensors(key_mask)
    check_attention(query, key, value, causal=causal, key_mask=key_mask)
    check_geometry("geometry", geometry, *key.shape[2:])
    dtype = output_dtype(query, key, value)
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    visible = _visible(key, causal, key_mask, attention_mask)
    if key_mask is not None:  # zero times a masked value could be NaN
        attended = ops.cast(key_mask, "bool")[:, :, None, None]
        key, value = ops.where(attended, key, 0.0), ops.where(attended, value, 0.0)
    if key.shape[2] == 1 and query.shape[2] > 1:  # TensorFlow does not broadcast one head
        key, value = (ops.repeat(x, query.shape[2], axis=2) for x in (key, value))
        if geometry is not None:
            geometry = ops.repeat(geometry, query.shape[2], axis=0)
    if geometry is not None:
        query, key = apply_geometry(query, geometry), apply_geometry(key, geometry)
    query, key = ops.cast(query, dtype), ops.cast(key, dtype)
    # The backends' fused kernels need the same size for all three.
    width = max(query.shape[-1], value_dim)
    query, key, value = (_widen(x, width) for x in (query, key, ops.cast(value, dtype)))
    scale = head_dim**-0.5
    if visible is None:
        output = softmax_attention(query, key, value, scale=scale, causal=causal)
    else:
        # A row without keys has no softmax: let it see all keys, then set it to zero.
        alive = ops.any(visible, axis=-1, keepdims=True)
        mask = ops.logical_or(visible, ops.logical_not(alive))
        output = softmax_attention(query, key, value, scale=scale, mask=mask)
        output = ops.where(ops.swapaxes(alive, 1, 2), output, 0.0)
    return ops.cast(output[..., :value_dim], dtype)


def exact_dark_attention_scores(
    query: Tensor,
    key: Tensor,
    geometry: Tensor = None,
    *,
    causal: bool = False,
    key_mask: Tensor = None,
    attention_mask: Tensor = None,
) -> Tensor:
    """The weights `exact_dark_attention` gives to the values.

    Args:
        query: float tensor of shape `(b, t, n, h)`.
        key: float tensor of shape `(b, s, k, h)`, n a multiple of k.
        geometry: M, of shape `(k, r, h)`; `None` for the identity.
        causal: bool. Query t attends to keys up to t; t and s must be equal.
        key_mask: optional bool tensor of shape `(b, s)` or `(1, s)`, true = attend.
        attention_mask: optional bool tensor of rank 4, true = attend, that broadcasts to
            `(b, n, t, s)`. All masks given apply together.

    Returns:
        A float32 tensor of shape `(b, n, t, s)`; each row sums to 1, or is zero where there is no
        key to attend to.

    Raises:
        ValueError: if shapes do not fit; the message names the argument.
    """
    query, key, geometry = numbers(query, key, geometry)
    (key_mask,) = tensors(key_mask)
    check_attention(query, key, key, causal=causal, key_mask=key_mask)
    check_geometry("geometry", geometry, *key.shape[2:])
    head_dim, groups = query.shape[-1], query.shape[2] // key.shape[2]
    if geometry is not None:
        query, key = apply_geometry(query, geometry), apply_geometry(key, geometry)
    query, key = ops.cast(query, "float32"), ops.cast(key, "float32")
    logits = ops.einsum("btnr,bsnr->bnts", query, ops.repeat(key, groups, axis=2))
    logits = logits * head_dim**-0.5
    visible = _visible(key, causal, key_mask, attention_mask)
    if visible is None and causal:
        visible = _causal(key)
    if visible is None:
        return ops.softmax(logits)
    alive = ops.any(visible, axis=-1, keepdims=True)
    mask = ops.logical_or(visible, ops.logical_not(alive))
    return ops.where(alive, ops.softmax(ops.where(mask, logits, -1e30)), 0.0)


def _visible(key: Tensor, causal: bool, key_mask: Tensor, attention_mask: Tensor) -> Tensor:
    """All masks as one of rank 4; `None` if `causal` says everything."""
    if key_mask is None and attention_mask is None:
        return None
    masks = []
    if key_mask is not None:
        masks.append(ops.cast(key_mask, "bool")[:, None, None, :])
    if attention_mask is not None:
        masks.append(ops.cast(attention_mask, "bool"))
    if causal:
        masks.append(_causal(key))
    visible = masks[0]
    for mask in masks[1:]:
        visible = ops.logical_and(visible, mask)
    return visible


def _causal(key: Tensor) -> Tensor:
    index = ops.arange(ops.shape(key)[1], dtype="int32")
    return (index[None, :] <= index[:, None])[None, None]


def _widen(x: Tensor, width: int) -> Tensor:
    missing = width - x.shape[-1]
    return pad(x, [(0, 0), (0, 0), (0, 0), (0, missing)]) if missing else x
