"""The formulas in NumPy float64, quadratic and slow: everything else is tested against them."""

from typing import NamedTuple

import numpy as np

from keras_darkformer.memory import Memory
from keras_darkformer.ops.backend import BASE
from keras_darkformer.ops.features import FoldedFeatures

# With an offset below this there is no far part.
LEFT_OUT = -0.5e30


class Gradients(NamedTuple):
    """Gradients of one scalar with respect to arguments of `dark_attention`."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    geometry: np.ndarray


def dark_attention_reference(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    geometry: np.ndarray,
    projection: np.ndarray,
    *,
    query_geometry: np.ndarray | None = None,
    log_weight: np.ndarray | None = None,
    query_shift: np.ndarray | None = None,
    key_shift: np.ndarray | None = None,
    sliding_window: int | None = None,
    num_sinks: int = 0,
    far_offset: np.ndarray | None = None,
    causal: bool = False,
    key_mask: np.ndarray | None = None,
    upstream: np.ndarray | None = None,
) -> tuple[np.ndarray, Gradients | None]:
    """`dark_attention` by its definition, and its gradients derived by hand.

    For one head, with the log-features and shifts b and c of `ops.features.DarkParameters`, and d
    the offset of the far part:

        far:   L_tsj = log phi_j(q_t) + log phi_j(k_s) + q^_t . c - b . c + d
        near:  L_ts = q_t . k_s / sqrt(h),    t - s < W or s one of the first S not masked
        K_ts = sum_j exp L_tsj,    P_ts = K_ts / sum_s K_ts,    O = P V
        dP = dO V',    dK_ts = (dP_ts - sum_s dP_ts P_ts) / sum_s K_ts
        d log phi_j(q_t) = sum_s dK_ts exp L_tsj,  and so for k_s

    Args:
        upstream: `(b, t, n, v)`, the gradient of a scalar with respect to the output; the gradients
            returned are of that scalar. If there is a `query_geometry`, the geometry's is that of
            `M_k` alone.
        The others are those of `dark_attention`.

    Returns:
        `(output, gradients)`, in float64; gradients are `None` without `upstream`.
    """
    query, key, value, geometry, projection = (
        np.asarray(x, "float64") for x in (query, key, value, geometry, projection)
    )
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, kv_heads, value_dim = value.shape[1:]
    projection = np.broadcast_to(projection, (kv_heads, *projection.shape[-2:]))
    tied = query_geometry is None
    geometry_q = geometry if query_geometry is None else np.asarray(query_geometry, "float64")
    weight = _or_zeros(log_weight, kv_heads, projection.shape[1])
    shift_q, shift_k = (_or_zeros(x, kv_heads, head_dim) for x in (query_shift, key_shift))
    offset = _or_zeros(far_offset, num_heads)
    visible = np.ones((batch, num_queries, num_keys), bool)
    if causal:
        visible &= np.tri(num_queries, num_keys, dtype=bool)
    if key_mask is not None:
        visible &= np.asarray(key_mask, bool)[:, None, :]

    real = np.ones((batch, num_keys), bool) if key_mask is None else np.asarray(key_mask, bool)
    sinks = [
        np.flatnonzero(np.broadcast_to(real, (batch, num_keys))[b])[:num_sinks]
        for b in range(batch)
    ]
    output = np.zeros((batch, num_queries, num_heads, value_dim))
    gradients = Gradients(*(np.zeros(x.shape) for x in (query, key, value, geometry)))
    scale = head_dim**-0.25
    for b in range(batch):
        for n in range(num_heads):
            k = n // (num_heads // kv_heads)
            x, y = scale * query[b, :, n], scale * key[b, :, k]
            mq = (x - shift_q[k]) @ geometry_q[k].T
            mk = (y - shift_k[k]) @ geometry[k].T
            half_m = 0.5 * np.log(projection.shape[1])
            log_q = _log_features(mq, projection[k]) + weight[k] - half_m
            log_k = _log_features(mk, projection[k]) + weight[k] - half_m
            log_q = log_q + ((x - shift_q[k]) @ shift_k[k])[:, None] + offset[n]
            log_k = log_k + (y @ shift_q[k])[:, None]
            for t in range(num_queries):
                seen = visible[b, t].copy()
                near = np.arange(num_keys) > t - (sliding_window or 0)
                near[sinks[b]] = True
                if sliding_window is None and not num_sinks:
                    near[:] = False
                elif offset[n] < LEFT_OUT:
                    seen &= near
                if not seen.any():
                    continue
                # One column for the exact kernel, which far keys do not have, and the features.
                logits = np.where(near, y @ x[t], -np.inf)[seen, None]
                log_far = np.where(near[:, None], -np.inf, log_q[t] + log_k)[seen]
                log_products = np.concatenate([logits, log_far], axis=1)
                products = np.exp(log_products - log_products.max())
                kernel = products.sum(axis=1)
                attention = kernel / kernel.sum()
                output[b, t, n] = attention @ value[b, seen, k]
                if upstream is None:
                    continue
                d_output = np.asarray(upstream[b, t, n], "float64")
                d_attention = value[b, seen, k] @ d_output
                d_kernel = (d_attention - d_attention @ attention) / kernel.sum()
                d_log = d_kernel[:, None] * products
                d_logit, d_log_k = d_log[:, 0], d_log[:, 1:]
                d_log_q = d_log_k.sum(axis=0)
                # log phi_j(x) = w_j . M x - |M x|^2 / 2 + ...
                d_mq = d_log_q @ projection[k] - d_log_q.sum() * mq[t]
                d_mk = d_log_k @ projection[k] - d_log_k.sum(1, keepdims=True) * mk[seen]
                gradients.query[b, t, n] += scale * (
                    d_mq @ geometry_q[k] + d_log_q.sum() * shift_k[k] + d_logit @ y[seen]
                )
                gradients.key[b, seen, k] += scale * (
                    d_mk @ geometry[k] + np.outer(d_log_k.sum(1), shift_q[k])
                )
                gradients.key[b, seen, k] += scale * np.outer(d_logit, x[t])
                gradients.value[b, seen, k] += np.outer(attention, d_output)
                gradients.geometry[k] += d_mk.T @ (y[seen] - shift_k[k])
                if tied:
                    gradients.geometry[k] += np.outer(d_mq, x[t] - shift_q[k])
    return output, None if upstream is None else gradients


def _or_zeros(x: np.ndarray | None, *shape: int) -> np.ndarray:
    return np.zeros(shape) if x is None else np.asarray(x, "float64")


def dark_state_reference(
    key: np.ndarray,
    value: np.ndarray,
    geometry: np.ndarray,
    projection: np.ndarray,
    *,
    query_geometry: np.ndarray | None = None,
    log_weight: np.ndarray | None = None,
    query_shift: np.ndarray | None = None,
    key_shift: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over keys of `phi(k) v'` and `phi(k)`, unscaled, in float64.

    With shifts b and c and log-weight l, phi includes what is constant for a query's features, and
    leaves out what is constant for all:

        log phi_j(k) = log phi_k[j](k) + l_j - w_j . M_q b + log(m) / 2 + |M_k c|^2 / 2
    """
    key, value, geometry = (np.asarray(x, "float64") for x in (key, value, geometry))
    kv_heads, _, head_dim = geometry.shape
    projection = np.broadcast_to(projection, (kv_heads, *projection.shape[-2:]))
    geometry_q = geometry if query_geometry is None else np.asarray(query_geometry, "float64")
    weight = _or_zeros(log_weight, kv_heads, projection.shape[1])
    shift_q, shift_k = (_or_zeros(x, kv_heads, head_dim) for x in (query_shift, key_shift))
    log_features = np.zeros((*key.shape[:3], projection.shape[1]))
    for k in range(kv_heads):
        y = head_dim**-0.25 * key[:, :, k]
        log_k = _log_features((y - shift_k[k]) @ geometry[k].T, projection[k]) + weight[k]
        log_k = log_k + (y @ shift_q[k])[..., None]
        constant = weight[k] - projection[k] @ geometry_q[k] @ shift_q[k]
        constant = constant + 0.5 * np.sum((geometry[k] @ shift_k[k]) ** 2)
        log_features[:, :, k] = log_k + constant
    features = np.exp(log_features)
    if key_mask is not None:
        features = features * np.asarray(key_mask, "float64")[:, :, None, None]
    return np.einsum("bskm,bskv->bkmv", features, value), features.sum(axis=1)


def memory_attention_reference(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    features: FoldedFeatures | None,
    memory: Memory,
    *,
    key_mask: np.ndarray | None = None,
    write_mask: np.ndarray | None = None,
) -> np.ndarray:
    """`ops.attention.attend` with an exact memory, by its definition, in float64.

    In logarithms to the base of `ops.backend`, for query t and key s <= t of one head:

        near(t, s) = q_t . k_s / sqrt(h) / log(base)                 s in the memory at t
        far(t, s) = log sum_j exp(log phi_q[j](q_t) + log phi_k[j](k_s))
                    + q_t f - |q_t N_q|^2 + e                        else
        O_t = sum_s w_ts v_s / sum_s w_ts,    w = base^near or base^far

    `exact_keys` says which keys are in the memory; without features, all others have no weight.
    Queries that see no key give zeros.
    """
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    batch, length, num_heads, head_dim = query.shape
    groups = num_heads // key.shape[2]
    real = np.ones((batch, length), bool) if key_mask is None else np.asarray(key_mask, bool)
    written = real if write_mask is None else real & write_mask
    output = np.zeros((batch, length, num_heads, value.shape[3]))
    for b in range(batch):
        for k in range(key.shape[2]):
            heads = range(k * groups, (k + 1) * groups)
            # Natural logarithms from here on.
            near = np.stack([query[b, :, n] @ key[b, :, k].T for n in heads]) / np.sqrt(head_dim)
            exact = exact_keys(near, real[b], written[b], memory)
            for n in heads:
                logits = near[n - k * groups]
                seen = np.tri(length, dtype=bool) & real[b]
                if features is None or _bias(features, n) < LEFT_OUT:
                    seen &= exact
                else:
                    far = _far_logits(query[b, :, n], key[b, :, k], k, n, features)
                    logits = np.where(exact, logits, far * np.log(BASE))
                for t in np.flatnonzero(seen.any(axis=1)):
                    weights = np.exp(logits[t, seen[t]] - logits[t, seen[t]].max())
                    output[b, t, n] = weights @ value[b, seen[t], k] / weights.sum()
    return output


def exact_keys(
    near: np.ndarray, real: np.ndarray, written: np.ndarray, memory: Memory
) -> np.ndarray:
    """Which keys each query of one key/value head attends to exactly, bool `(t, s)`.

    The sinks are the first `num_sinks` tokens that are written. Other keys are in the window for
    `sliding_window` tokens. Then they compete with the kept keys: of the keys that have left the
    window, the `cache_size` that received most attention in it stay in the memory. This attention
    is over sinks and window alone. A key that is not, or no longer, among the kept ones has left
    for good.

    Tokens that are not written, or that leave the window after the last written token, do not
    compete. The attention of tokens that are not written does not count.

    Args:
        near: softmax's logits, `(g, t, s)`.
        real: bool, `(s,)`: which tokens are not masked.
        written: bool, `(s,)`: which of these enter the state.
        memory: `Memory`.
    """
    window, length = memory.window, len(real)
    count = np.max(np.flatnonzero(written), initial=-1) + 1
    sinks = np.flatnonzero(written)[: memory.num_sinks]
    others = real.copy()
    others[sinks] = False
    received, kept = np.zeros(length), set[int]()
    exact = np.zeros((length, length), bool)
    for t in range(length):
        if t >= window and others[t - window] and written[t - window] and t < count:
            kept.add(t - window)
            if len(kept) > memory.cache_size:
                kept.remove(min(kept, key=lambda s: (received[s], s)))
        recent = np.arange(max(0, t - window + 1), t + 1) if window else np.arange(0)
        recent = recent[others[recent]]
        local = [*sinks[sinks <= t], *recent]
        exact[t, [*local, *kept]] = True
        if written[t] and local:
            weights = np.exp(near[:, t, local] - near[:, t, local].max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            received[local] += weights.sum(axis=0)
    return exact


def _bias(features: FoldedFeatures, n: int) -> float:
    """What is added to the logarithms of a query head's far part."""
    assert features.query_scale is not None
    return float(features.query_scale.bias[n])


def _far_logits(
    query: np.ndarray, key: np.ndarray, k: int, n: int, features: FoldedFeatures
) -> np.ndarray:
    """`far(t, s)` of queries `(t, h)` and keys `(s, h)`, to the base of `ops.backend`."""
    log_q = query @ features.query_kernel[k]
    log_k = key @ features.key_kernel[k]
    if features.key_bias is not None:
        log_k = log_k + features.key_bias[k]
    if features.key_linear is not None:
        log_k = log_k + (key @ features.key_linear[k])[:, None]
    log_k = log_k - np.sum((key @ features.key_norm_kernel[k]) ** 2, axis=1, keepdims=True)
    products = (log_q[:, None] + log_k) * np.log(BASE)
    largest = products.max(axis=-1)
    far = largest + np.log(np.exp(products - largest[..., None]).sum(axis=-1))
    assert features.query_scale is not None
    norm_kernel, linear, bias = features.query_scale
    scale = query @ linear[k] - np.sum((query @ norm_kernel[k]) ** 2, axis=1)
    return far / np.log(BASE) + scale[:, None] + bias[n]


def _log_features(projected: np.ndarray, projection: np.ndarray) -> np.ndarray:
    return projected @ projection.T - 0.5 * (projected**2).sum(axis=-1, keepdims=True)
