"""Attention and its figures in float64, from the weights of a feature map."""

import math

import numpy as np
from backends import to_numpy


def weights_of(feature_map):
    """float64 arrays by the names of the weights."""
    return {w.name: to_numpy(w.value).astype("float64") for w in feature_map.weights}


def visible_pairs(mask, length):
    """`(b, 1, t, s)`: causal, without padding."""
    causal = np.tri(length, dtype=bool)[None, None]
    return causal if mask is None else causal & np.asarray(mask, bool)[:, None, None, :]


def softmax_scores(query, key):
    """`(b, n, t, s)`."""
    return _pairs(query, _per_query(key, query)) / math.sqrt(query.shape[-1])


def feature_scores(feature_map, query, key):
    """Log-weights of the features and, with a window, of softmax within it; no mask.

    With a window both are `log exp(q^ . k^)` but for a factor of the query,
    far ones estimated.
    """
    w, query, key = weights_of(feature_map), query.astype("float64"), key.astype("float64")
    groups = query.shape[2] // key.shape[2]
    each = {
        name: value if name == "far_offset" else np.repeat(value, groups, axis=0)
        for name, value in w.items()
    }
    key = _per_query(key, query)
    if "query_kernel" in w:
        log_query = np.einsum("btnh,nhm->bntm", query, each["query_kernel"])
        log_key = np.einsum("bsnh,nhm->bnsm", key, each["key_kernel"])
        return _log_products(log_query, log_key + each["key_bias"][:, None])
    head_dim, m = query.shape[-1], feature_map.num_features
    x, y = query * head_dim**-0.25, key * head_dim**-0.25
    b = each.get("query_shift", np.zeros((1, head_dim)))
    c = each.get("key_shift", np.zeros((1, head_dim)))
    scale = each.get("log_weight", np.zeros((1, m)))[:, None] - math.log(m) / 2

    def log_features(x, geometry):
        moved = np.einsum("btnh,nrh->bntr", x, geometry)
        norm = 0.5 * (moved**2).sum(-1, keepdims=True)
        return np.einsum("bntr,nmr->bntm", moved, each["projection"]) - norm + scale

    tilt = np.einsum("bsnh,nh->bns", y - c, np.broadcast_to(b, (y.shape[2], head_dim)))
    geometry = each["geometry"]
    log_query = log_features(x - b, each.get("query_geometry", geometry))
    log_key = log_features(y - c, geometry) + tilt[..., None]
    far = _log_products(log_query, log_key)
    if not feature_map.memory:
        return far
    shift = np.einsum("btnh,nh->bnt", x, np.broadcast_to(c, (x.shape[2], head_dim)))
    near = _pairs(x, y) - shift[..., None]
    far = far + each["far_offset"][:, None, None]
    return np.where(behind(feature_map.memory.window, x.shape[1]), far, near)


def behind(window, length):
    """Which keys the window of each query has left behind."""
    index = np.arange(length)
    return index[:, None] - index[None, :] >= window


def softmax(scores, visible):
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True, where=visible, initial=-1e300))
    return weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


def divergence(exact, ours):
    """KL of weights along the last axis."""
    ratio = np.log(np.maximum(exact, 1e-300) / np.maximum(ours, 1e-300))
    return (exact * ratio).sum(-1)


def attended(weights, value):
    """`(b, n, t, v)`."""
    groups = weights.shape[1] // value.shape[2]
    return np.einsum("bnts,bsnv->bntv", weights, np.repeat(value, groups, axis=2))


def _per_query(key, query):
    return np.repeat(key, query.shape[2] // key.shape[2], axis=2)


def _pairs(query, key):
    return np.einsum("btnh,bsnh->bnts", query.astype("float64"), key.astype("float64"))


def _log_products(log_query, log_key):
    both = log_query[..., :, None, :] + log_key[..., None, :, :]
    peak = both.max(-1)
    return peak + np.log(np.exp(both - peak[..., None]).sum(-1))
