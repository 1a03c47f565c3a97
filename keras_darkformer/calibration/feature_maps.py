"""Calibration of a whole feature map: from statistics of a layer to the map's weights."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from keras_darkformer.calibration.clusters import clusters
from keras_darkformer.calibration.geometries import (
    proposal_variance,
    spectral,
    spectral_multipliers,
    spectral_proposal,
    uniform_multiplier,
    variance_optimal_proposal,
    whitening,
)
from keras_darkformer.calibration.judge import (
    adaptive_budget,
    held_out_error,
    position_folds,
    sequence_folds,
)
from keras_darkformer.calibration.moments import Moments
from keras_darkformer.calibration.projections import DarkParameters, Projections, fold_dark
from keras_darkformer.calibration.refine import best_draw, refine_clusters, refine_dark
from keras_darkformer.calibration.sample import LayerStatistics, Sample
from keras_darkformer.checks import one_of
from keras_darkformer.ops import draw_projection, proposal_log_weight

BUDGETS = ("uniform", "adaptive")
METHODS = ("identity", "scale", "whitening", "spectral", "clusters", "auto")
PROPOSALS = ("none", "variance_optimal", "spectral")
# The log-weight of features that only fill up a head's share of a tensor.
UNUSED = -1e4
# What a head may have of the features that each has by `uniform`.
SHARES = (0.25, 0.5, 1.0, 1.5, 2.0)
# Posterior sharpness of clusters, chosen between by held-out error.
TAUS = (0.15, 0.3)


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
    """What `calibrate` was asked for.

    Attributes:
        method: one of `METHODS`.
        proposal: one of `PROPOSALS`, or `None` for the method's own.
        center: whether to centre queries and keys; `None` for the method's own.
        refine: whether to fit to a sample beyond the closed forms.
        budget: one of `BUDGETS`.
        seed: of draws.
    """

    method: str = "spectral"
    proposal: str | None = None
    center: bool | None = None
    refine: bool = True
    budget: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        one_of("method", self.method, METHODS)
        one_of("budget", self.budget, BUDGETS)
        if self.proposal is not None:
            one_of("proposal", self.proposal, PROPOSALS)

    def of_layer(self, number: int) -> "CalibrationOptions":
        """The same with a seed of the layer's own."""
        seed = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
        return dataclasses.replace(self, seed=int(seed))

    def of_method(self, method: str) -> "CalibrationOptions":
        """The same with another method and its own defaults for what was left open."""
        proposal, center = self.proposal, self.center
        if proposal is None:
            proposal = "spectral" if method in ("scale", "spectral") else "none"
        if center is None:
            center = method in ("scale", "spectral")
        return dataclasses.replace(self, method=method, proposal=proposal, center=center)

    def check(self, feature_map: Any) -> None:
        """Raises a ValueError if the map can't be calibrated this way."""
        if self.proposal is not None and self.method in ("clusters", "auto"):
            raise ValueError(
                "`proposal` is for features that are drawn by a given method. Received: "
                f'method="{self.method}", proposal="{self.proposal}"'
            )
        if self.method == "clusters" and feature_map.sliding_window is not None:
            raise ValueError(
                '`method="clusters"` does not go with a `sliding_window`: its features know the '
                "kernel up to a factor of the query only, so they can't share a normaliser with "
                'the exact kernel. Use "spectral".'
            )
        if self.method == "whitening" and feature_map.rope_geometry == "planes":
            raise ValueError(
                '`method="whitening"` needs a geometry of any shape, not one scalar per rotary '
                'plane (`rope_geometry="planes"`).'
            )
        if self.budget == "adaptive" and feature_map.rope_geometry != "after":
            raise ValueError(
                '`budget="adaptive"` needs `rope_geometry="after"`. Received: '
                f'rope_geometry="{feature_map.rope_geometry}"'
            )

    def needs_sample(self, feature_map: Any) -> bool:
        """Whether moments alone do not do."""
        if self.method in ("clusters", "auto") or self.budget == "adaptive":
            return True
        after = feature_map.rope_geometry == "after"
        return self.refine and after and self.method == "spectral"


class Fit(NamedTuple):
    """Weights for a feature map.

    Attributes:
        form: the form of the map they are for.
        weights: arrays by the names of the map's weights.
        num_features: features per head they have room for.
    """

    form: str
    weights: dict[str, np.ndarray]
    num_features: int

    def assign(self, feature_map: Any) -> None:
        """Gives the map its weights."""
        feature_map.set_form(self.form, self.num_features)
        for name, value in self.weights.items():
            getattr(feature_map, name).assign(value.astype("float32"))


def fit_feature_map(
    feature_map: Any, statistics: LayerStatistics, options: CalibrationOptions
) -> Fit:
    """Weights fitted to what was seen of a layer.

    Raises:
        ValueError: if nothing was seen, or the proposal does not exist.
    """
    moments = statistics.moments
    if not moments.query_count or not moments.key_count:
        raise ValueError("Every query or every key was masked: there is nothing to fit.")
    if options.method == "auto":
        options = dataclasses.replace(options, method=_choose(feature_map, statistics, options))
    options = options.of_method(options.method)
    sample = statistics.sample
    sizes = [feature_map.num_features] * feature_map.num_heads
    if options.budget == "adaptive":
        assert sample is not None
        sizes = _budget(feature_map, sample, options)
    if options.method == "clusters":
        assert sample is not None
        return _free_fit(sample, options, sizes)
    if feature_map.rope_geometry != "after":
        return _rotary_fit(feature_map, statistics, options)
    heads = []
    for head, size in enumerate(sizes):
        arrays = None if sample is None else sample.of_head(head)
        of_head = _of_head(moments, head)
        heads.append(_dark_head(feature_map, of_head, arrays, options, head, size))
    return _dark_fit(feature_map, heads, options)


class HeadMoments(NamedTuple):
    """Means and covariances of `q^` and `k^` of one head."""

    query_mean: np.ndarray
    key_mean: np.ndarray
    query_cov: np.ndarray
    key_cov: np.ndarray

    def uncentred(self) -> "HeadMoments":
        """The same about the origin: what features of raw queries and keys meet."""
        total = self.query_mean + self.key_mean
        zero = np.zeros_like(total)
        # E[z z'] of z = q^ + k^ is all that proposals ask of the covariances.
        return HeadMoments(zero, zero, self.query_cov + np.outer(total, total), self.key_cov)


def _of_head(moments: Moments, head: int) -> HeadMoments:
    return HeadMoments(
        moments.query_mean[head],
        moments.key_mean[head],
        moments.query_cov[head],
        moments.key_cov[head],
    )


class DarkHead(NamedTuple):
    """A drawn feature map of one head, and the proposal it was drawn from."""

    parameters: DarkParameters
    proposal_scale: np.ndarray


def _dark_head(
    feature_map: Any,
    moments: HeadMoments,
    arrays: dict[str, Any] | None,
    options: CalibrationOptions,
    head: int,
    m: int,
) -> DarkHead:
    if not options.center:
        moments = moments.uncentred()
    rank = feature_map.rank
    geometry, scale = _geometry(moments, m, rank, options)
    rng = np.random.default_rng([options.seed, head])

    def draw() -> DarkParameters:
        standard = draw_projection(m, rank, kind=feature_map.projection_kind, seed=rng)
        projection = scale * standard.astype("float64")
        log_weight = proposal_log_weight(projection, scale).astype("float64")
        return DarkParameters(
            geometry, projection, log_weight, moments.query_mean, moments.key_mean
        )

    if arrays is None or not options.refine or options.method != "spectral":
        return DarkHead(draw(), scale)
    dark = refine_dark(best_draw(draw, **arrays), **arrays, seed=options.seed)
    return DarkHead(dark, scale)


def _geometry(
    moments: HeadMoments, num_features: int, rank: int, options: CalibrationOptions
) -> tuple[np.ndarray, np.ndarray]:
    """M `(r, h)` and the proposal's standard deviations along its rows."""
    method = options.method
    if method == "identity":
        geometry = np.eye(len(moments.query_cov))
    elif method == "whitening":
        geometry = whitening(moments.query_cov, moments.key_cov)
    else:
        fit = spectral if method == "spectral" else uniform_multiplier
        geometry = fit(moments.query_cov, moments.key_cov, num_features)
    if options.proposal == "none" and rank == len(geometry):
        return geometry, np.ones(rank)
    # Along the eigenvectors of what M makes of the data the proposal is diagonal.
    if options.proposal == "variance_optimal":
        pooled = geometry @ (moments.query_cov + moments.key_cov) @ geometry.T / 2
        rotation, scale = variance_optimal_proposal(pooled)
    else:
        rotation, scale = spectral_proposal(geometry, moments.query_cov, moments.key_cov)
    if options.proposal == "none":
        scale = np.ones_like(scale)
    # A smaller rank keeps the directions of largest variance, which come last.
    return (rotation.T @ geometry)[-rank:], scale[-rank:]


def _dark_fit(feature_map: Any, heads: list[DarkHead], options: CalibrationOptions) -> Fit:
    most = max(len(head.parameters.projection) for head in heads)
    heads = [head._replace(parameters=_padded(head.parameters, most)) for head in heads]

    def stacked(name: str) -> np.ndarray:
        return np.stack([getattr(head.parameters, name) for head in heads])

    weights = {"geometry": stacked("geometry"), "projection": stacked("projection")}
    if not feature_map.tie_geometry:
        weights["query_geometry"] = weights["geometry"]
    weighted = stacked("log_weight").any()  # by a proposal or by refining
    if not weighted and options.proposal == "none" and not options.center:
        return Fit("random", weights, most)
    for name in ("log_weight", "query_shift", "key_shift"):
        weights[name] = stacked(name)
    weights["proposal"] = np.stack([head.proposal_scale for head in heads])
    return Fit("centered", weights, most)


def _padded(dark: DarkParameters, num_features: int) -> DarkParameters:
    """The same features, and others that weigh nothing."""
    own, rank = dark.projection.shape
    missing = num_features - own
    if not missing:
        return dark
    # Every feature is divided by the root of the number of all.
    log_weight = dark.log_weight + 0.5 * np.log(num_features / own)
    return dark._replace(
        projection=np.concatenate([dark.projection, np.zeros((missing, rank))]),
        log_weight=np.concatenate([log_weight, np.full(missing, UNUSED)]),
    )


def _rotary_fit(feature_map: Any, statistics: LayerStatistics, options: CalibrationOptions) -> Fit:
    """Of a geometry that sits before the rotation: the features then see rotated vectors.

    A rotation mixes the two members of a plane, so what is left of them is one
    variance, and the proposal is one scale, per plane.
    """
    heads, layout, m = [], statistics.layout, feature_map.num_features
    half = feature_map.head_dim // 2
    for head in range(feature_map.num_heads):
        rotated = _of_head(statistics.moments, head)
        if not options.center:
            rotated = rotated.uncentred()
        if feature_map.rope_geometry == "planes":
            total = np.diag(rotated.query_cov + rotated.key_cov)
            unshuffled = np.empty_like(total)
            unshuffled[layout] = total
            planes = unshuffled.reshape(2, half).mean(axis=0)
            if options.method == "identity":
                multipliers = np.ones(half)
            else:
                both = np.concatenate([planes, planes])
                multipliers = spectral_multipliers(both, m, one_for_all=options.method == "scale")[
                    :half
                ]
            geometry = multipliers
            variances = multipliers**2 * planes
            shift = np.concatenate([multipliers, multipliers])[layout]
            shifts = shift * rotated.query_mean, shift * rotated.key_mean
        else:
            assert statistics.unrotated is not None
            raw = _of_head(statistics.unrotated, head)
            values, vectors = np.linalg.eigh(raw.query_cov + raw.key_cov)
            if options.method == "identity":
                geometry = np.eye(feature_map.head_dim)
            elif options.method == "whitening":
                geometry = whitening(raw.query_cov, raw.key_cov)
            else:
                multipliers = spectral_multipliers(
                    np.maximum(values, 0.0), m, one_for_all=options.method == "scale"
                )
                # Symmetric: where nothing is damped it is the identity, which rotations pass.
                geometry = (vectors * multipliers) @ vectors.T
            second = raw.query_cov + raw.key_cov
            for mean in (raw.query_mean, raw.key_mean):  # slow planes keep their means
                second = second + np.outer(mean, mean)
            energy = np.diag(geometry @ second @ geometry.T)
            variances = energy.reshape(2, half).mean(axis=0)
            shifts = (np.zeros(feature_map.head_dim),) * 2
        scale = np.ones(2 * half)
        if options.proposal == "spectral":
            scale = np.sqrt(proposal_variance(np.concatenate([variances] * 2)))[layout]
        elif options.proposal == "variance_optimal":
            both = np.diag(np.concatenate([variances] * 2)[layout] / 2)
            variance_optimal_proposal(both)  # refuses where it does not exist
            scale = np.sqrt((1 + 2 * np.diag(both)) / (1 - 2 * np.diag(both)))
        rng = np.random.default_rng([options.seed, head])
        standard = draw_projection(m, 2 * half, kind=feature_map.projection_kind, seed=rng)
        projection = scale * standard.astype("float64")
        log_weight = proposal_log_weight(projection, scale)
        heads.append(DarkHead(DarkParameters(geometry, projection, log_weight, *shifts), scale))
    return _dark_fit(feature_map, heads, options)


def _free_fit(sample: Sample, options: CalibrationOptions, sizes: list[int]) -> Fit:
    heads = [_cluster_head(sample.of_head(head), size, options) for head, size in enumerate(sizes)]
    most = max(sizes)
    weights = {}
    for name, unused in (("query_kernel", 0.0), ("key_kernel", 0.0), ("key_bias", 2 * UNUSED)):
        rows = []
        for head in heads:
            value = getattr(head, name)
            padding = [(0, 0)] * (value.ndim - 1) + [(0, most - value.shape[-1])]
            rows.append(np.pad(value, padding, constant_values=unused))
        weights[name] = np.stack(rows)
    return Fit("free", weights, most)


def _cluster_head(
    arrays: dict[str, Any], num_features: int, options: CalibrationOptions
) -> Projections:
    def fit(tau: float) -> Callable[..., Projections]:
        def fitted(query: Any, key: Any, query_mask: Any, key_mask: Any) -> Projections:
            masks = {"query_mask": query_mask, "key_mask": key_mask}
            return clusters(
                query,
                key,
                num_features,
                tau,
                **masks,
                causal=arrays["causal"],
                seed=options.seed,
            )

        return fitted

    tau = TAUS[0]
    if arrays["query"].shape[1] == arrays["key"].shape[1]:
        folds = sequence_folds(*arrays["query"].shape[:2])
        tau = min(TAUS, key=lambda tau: held_out_error(fit(tau), **arrays, folds=folds))
    found = fit(tau)(*(arrays[x] for x in ("query", "key", "query_mask", "key_mask")))
    if options.refine:
        found = refine_clusters(found, **arrays, seed=options.seed)
    return found


def _choose(feature_map: Any, statistics: LayerStatistics, options: CalibrationOptions) -> str:
    """The method of the lowest error at positions and in sequences it was not fitted to."""
    sample = statistics.sample
    assert sample is not None
    if feature_map.rope_geometry != "after" or sample.query.shape[1] != sample.key.shape[1]:
        return "spectral"
    candidates = [x for x in METHODS if x != "auto"]
    if feature_map.sliding_window is not None:
        candidates.remove("clusters")
    errors = dict.fromkeys(candidates, 0.0)
    for head in range(feature_map.num_heads):
        arrays = sample.of_head(head)
        folds = position_folds(*arrays["query"].shape[:2])
        for method in candidates:
            of_method = options.of_method(method)

            def fit(
                query: Any,
                key: Any,
                query_mask: Any,
                key_mask: Any,
                of_method: CalibrationOptions = of_method,
                causal: bool = sample.causal,
                head: int = head,
            ) -> Projections:
                part = {
                    "query": query,
                    "key": key,
                    "query_mask": query_mask,
                    "key_mask": key_mask,
                    "causal": causal,
                }
                if of_method.method == "clusters":
                    return _cluster_head(part, feature_map.num_features, of_method)
                found = _dark_part(feature_map, part, of_method, head, feature_map.num_features)
                return fold_dark(found.parameters)

            errors[method] += held_out_error(fit, **arrays, folds=folds)
    return min(errors, key=errors.__getitem__)


def _dark_part(
    feature_map: Any, part: dict[str, Any], options: CalibrationOptions, head: int, size: int
) -> DarkHead:
    """A fit to some of a head's sample."""
    moments = Moments(1, part["query"].shape[-1])
    masks = part["query_mask"], part["key_mask"]
    moments.update(part["query"], part["key"][:, :, None], *masks)
    return _dark_head(feature_map, _of_head(moments, 0), part, options, head, size)


def _budget(feature_map: Any, sample: Sample, options: CalibrationOptions) -> list[int]:
    """Features per head, as many in all as `uniform` has, by held-out error."""
    if sample.query.shape[1] != sample.key.shape[1]:
        raise ValueError('`budget="adaptive"` needs as many queries as keys.')
    uniform = feature_map.num_features
    sizes = sorted({max(1, round(share * uniform)) for share in SHARES})
    closed = dataclasses.replace(options, refine=False)
    errors = np.zeros((feature_map.num_heads, len(sizes)))
    for head in range(feature_map.num_heads):
        arrays = sample.of_head(head)
        folds = sequence_folds(*arrays["query"].shape[:2])
        for column, size in enumerate(sizes):

            def fit(
                query: Any,
                key: Any,
                query_mask: Any,
                key_mask: Any,
                head: int = head,
                size: int = size,
            ) -> Projections:
                part = {
                    "query": query,
                    "key": key,
                    "query_mask": query_mask,
                    "key_mask": key_mask,
                    "causal": sample.causal,
                }
                if closed.method == "clusters":
                    return _cluster_head(part, size, closed)
                return fold_dark(_dark_part(feature_map, part, closed, head, size).parameters)

            errors[head, column] = held_out_error(fit, **arrays, folds=folds)
    total = uniform * feature_map.num_heads
    return [int(size) for size in adaptive_budget(errors, sizes, total)]
