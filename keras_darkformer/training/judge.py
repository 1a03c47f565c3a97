"""How far a layer's attention is from softmax, head by head."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_darkformer.fitting import Moments
from keras_darkformer.layers.core import FeatureAttention
from keras_darkformer.layers.feature_maps import FeatureMap
from keras_darkformer.layers.heads import Heads
from keras_darkformer.ops import draw_projection
from keras_darkformer.ops.features import DarkParameters, FoldedFeatures, fold
from keras_darkformer.ops.scores import (
    MemoryPairs,
    exact_logits,
    log_scores,
    log_softmax,
    log_sum_exp,
    memory_pairs,
)
from keras_darkformer.types import Config, Tensor

ARMS = ("dark", "performer", "uniform")
PARTS = ("sinks", "window", "kept", "far")
# Figures by arm or by part: for each batch, a list of one array per head.
ByArm = dict[str, list[Any]]
# A divergence this large comes from the finite number that stands for log(0).
INFINITE = 1e20


class Judge:
    """Collects the figures of one layer, batch by batch.

    Args:
        layer: the dark attention layer.
        seed: int. Seed of Performer's draw.

    Attributes:
        tokens: number of queries seen, per head.
    """

    def __init__(self, layer: FeatureAttention, seed: int) -> None:
        self.map = layer.feature_map
        self.map.ensure_built()
        self.moments = Moments(self.map.num_heads, self.map.head_dim)
        self.performer = _performer(self.map, seed) if self.map.num_features else None
        self.errors: ByArm = {arm: [] for arm in ARMS}
        self.divergences: ByArm = {arm: [] for arm in ARMS}
        self.mass: ByArm = {part: [] for part in PARTS}
        self.exact_mass: ByArm = {part: [] for part in PARTS}
        self.far_kl: list[Any] = []
        self.tokens = 0

    def add(self, heads: Heads) -> None:
        """Adds the figures of a call of the layer."""
        query, key = (ops.cast(x, "float32") for x in (heads.query, heads.key))
        visible = heads.visible
        logits = exact_logits(query, key)
        exact = log_softmax(logits, visible)
        of_features = heads.for_features(self.map)
        memory = self.map.memory
        pairs = memory_pairs(*of_features, memory, heads.key_mask) if memory else None
        scores = {"dark": self.map.log_scores(*of_features, pairs and pairs.exact)}
        if self.performer is not None:
            scores["performer"] = log_scores(query, key, self.performer)
        scores["uniform"] = ops.zeros_like(logits)
        weights = ops.where(visible, ops.exp(exact), 0.0)
        groups = query.shape[2] // key.shape[2]
        value = ops.repeat(ops.cast(heads.value, "float32"), groups, axis=2)
        if heads.key_mask is not None:
            value = ops.where(heads.key_mask[:, :, None, None], value, 0.0)
        target = ops.einsum("bnts,bsnv->bntv", weights, value)
        size = ops.maximum(ops.norm(target, axis=-1), 1e-20)
        counts = np.broadcast_to(
            ops.convert_to_numpy(ops.any(visible, axis=-1)), tuple(logits.shape[:3])
        )
        masks = [None, None]
        if heads.key_mask is not None:
            mask = ops.convert_to_numpy(heads.key_mask)
            masks[1] = mask
            if query.shape[1] == key.shape[1]:
                masks[0] = mask
                counts = counts & mask[:, None, :]
        self.moments.update(ops.convert_to_numpy(query), ops.convert_to_numpy(key), *masks)
        self.tokens += int(counts[:, 0].sum())
        for arm, score in scores.items():
            log_weights = log_softmax(score, visible)
            own = ops.where(visible, ops.exp(log_weights), 0.0)
            output = ops.einsum("bnts,bsnv->bntv", own, value)
            error = ops.norm(output - target, axis=-1) / size
            kl = ops.sum(ops.where(visible, weights * (exact - log_weights), 0.0), axis=-1)
            self.errors[arm].append(_by_head(error, counts))
            self.divergences[arm].append(_by_head(kl, counts))
            if arm == "dark" and pairs is not None:
                self._add_parts(pairs, visible, exact, log_weights, counts)

    def _add_parts(
        self,
        pairs: MemoryPairs,
        visible: Tensor,
        exact: Tensor,
        log_weights: Tensor,
        counts: np.ndarray,
    ) -> None:
        """Adds the shares of the weights by part, from the logarithms of softmax's and ours."""
        far = ops.logical_and(visible, ops.logical_not(pairs.exact))
        weights = ops.where(visible, ops.exp(exact), 0.0)
        own = ops.where(visible, ops.exp(log_weights), 0.0)
        for kept, of in ((self.mass, own), (self.exact_mass, weights)):
            for part, where in (*pairs._asdict().items(), ("far", far)):
                mass = ops.sum(ops.where(where, of, 0.0), axis=-1)
                kept[part].append(_by_head(mass, counts))
        if self.map.num_features:
            shares = log_sum_exp(exact, far) - log_sum_exp(log_weights, far)
            within = weights * (exact - log_weights - shares[..., None])
            far_kl = ops.sum(ops.where(far, within, 0.0), axis=-1)
            self.far_kl.append(_by_head(far_kl, counts))

    def result(self, name: str) -> Config:
        """The layer as `ApproximationReport` has it."""
        feature_map = self.map
        groups = len(self.errors["dark"][0]) // feature_map.num_heads
        total = self.moments.cov.sum(axis=0)
        spectra = np.maximum(np.linalg.eigvalsh(total)[:, ::-1], 0.0)
        heads = []
        for head in range(len(self.errors["dark"][0])):
            spectrum = spectra[head // groups]
            square = float((spectrum**2).sum())
            heads.append(
                {
                    "relative_error": _by_arm(self.errors, head, np.median),
                    "kl": _by_arm(self.divergences, head, _divergence),
                    "mass": _by_arm(self.mass, head, np.mean),
                    "exact_mass": _by_arm(self.exact_mass, head, np.mean),
                    "far_kl": self._far_kl(head),
                    "spectrum": [float(x) for x in spectrum],
                    "effective_dims": float(spectrum.sum() ** 2 / square) if square else 0.0,
                }
            )
        return {
            "name": name,
            "num_features": feature_map.num_features,
            "feature_map": feature_map.kind,
            **feature_map.memory._asdict(),
            "heads": heads,
        }

    def _far_kl(self, head: int) -> float | None:
        """The figure; `None` if the far part is missing, or has no weight because of its offset."""
        if not self.far_kl or not _joined(self.mass["far"], head).any():
            return None
        return float(np.mean(_joined(self.far_kl, head)))


def _performer(feature_map: FeatureMap, seed: int) -> FoldedFeatures:
    """A fresh draw of Performer's features, as many as the map has."""
    projection = draw_projection(feature_map.num_features, feature_map.head_dim, seed=seed)
    parameters = DarkParameters(None, ops.convert_to_tensor(projection))
    return fold(parameters, feature_map.num_heads, feature_map.head_dim)


def _by_head(x: Any, counts: np.ndarray) -> Any:
    """Splits `(b, n, t)` into n arrays of the values that count."""
    x = ops.convert_to_numpy(x)
    return [x[:, head][counts[:, head]] for head in range(x.shape[1])]


def _divergence(values: np.ndarray) -> float:
    """The mean; infinite if keys that softmax gives weight have none at all."""
    mean = float(np.mean(values))
    return mean if mean < INFINITE else float("inf")


def _by_arm(parts: ByArm, head: int, middle: Callable[[np.ndarray], Any]) -> Config | None:
    """A head's figure by arm, `None` for an arm without values; `None` if no arm has any."""
    found = {
        arm: float(middle(_joined(values, head))) if values else None
        for arm, values in parts.items()
    }
    return found if any(value is not None for value in found.values()) else None


def _joined(parts: list[Any], head: int) -> np.ndarray:
    return np.concatenate([part[head] for part in parts])
