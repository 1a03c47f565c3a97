"""What a conversion loses, layer by layer and head by head."""

from typing import Any

import numpy as np
from keras import ops
from rich.table import Table

from keras_darkformer.checks import positive_integer
from keras_darkformer.fitting import Moments
from keras_darkformer.layers.core import FeatureAttention, observed
from keras_darkformer.layers.heads import Heads
from keras_darkformer.ops import draw_projection
from keras_darkformer.ops.features import DarkParameters, fold
from keras_darkformer.ops.scores import exact_logits, log_scores, log_softmax
from keras_darkformer.printed import PrintedDict
from keras_darkformer.training.data import (
    batches,
    check_position_offset,
    dark_layers,
    position_offsets,
    run,
)
from keras_darkformer.types import Config, Data, Model, Tensor

ARMS = ("dark", "performer", "uniform")
# A divergence this large comes of the finite number that stands for log(0).
INFINITE = 1e20


class ApproximationReport(PrintedDict):
    """How far each layer's attention is from softmax: a dict for code, a table when printed.

    Keys:
        layers: list of dicts, one a layer: name, num_features, feature_map, sliding_window and
            heads.
        tokens: queries looked at per head and layer.

    A head is a dict:
        relative_error: dict of the median over queries of
            `|output - exact| / |exact|`, for `dark`, for `performer` (identity
            geometry, fresh draw, as many features) and for `uniform`
            (averaging what is visible: what knows nothing of the logits).
        kl: dict of the mean divergence from exact attention weights, in nats,
            for the same three; infinite for a window alone.
        far_mass, exact_far_mass: share of the weights behind the sliding
            window, here and of softmax; `None` without a window.
        spectrum: eigenvalues of `Cov(q^) + Cov(k^)`, falling: the variances
            that logits are made of.
        effective_dims: `(sum v)^2 / sum v^2` of these: `head_dim` where queries
            and keys are isotropic, 1 where all is in one direction.
    """

    width = 120

    def summary(self) -> Config:
        """Means over heads and layers of all that is a number."""
        heads = [head for layer in self["layers"] for head in layer["heads"]]
        means: Config = {
            key: {arm: float(np.mean([head[key][arm] for head in heads])) for arm in ARMS}
            for key in ("relative_error", "kl")
        }
        for key in ("far_mass", "exact_far_mass"):
            values = [head[key] for head in heads if head[key] is not None]
            means[key] = float(np.mean(values)) if values else None
        means["effective_dims"] = float(np.mean([head["effective_dims"] for head in heads]))
        return means

    def __rich__(self) -> Table:
        means = self.summary()
        has_memory = means["far_mass"] is not None
        table = Table(title=f"Attention against exact softmax, {self['tokens']:,} queries a head")
        columns = ["layer", "head", "m", "map", "error", "Performer", "uniform", "KL"]
        columns += ["KL Performer", "KL uniform", "eff. dims"]
        columns += ["far mass", "exact"] if has_memory else []
        for column in columns:
            table.add_column(column, justify="left" if column in ("layer", "map") else "right")
        for layer in self["layers"]:
            for index, head in enumerate(layer["heads"]):
                cells = [
                    layer["name"],
                    str(index),
                    str(layer["num_features"]),
                    layer["feature_map"],
                ]
                for key in ("relative_error", "kl"):
                    cells += [f"{head[key][arm]:.2f}" for arm in ARMS]
                cells.append(f"{head['effective_dims']:.1f}")
                if has_memory:
                    for key in ("far_mass", "exact_far_mass"):
                        cells.append("-" if head[key] is None else f"{head[key]:.3f}")
                table.add_row(*cells)
            table.add_section()
        table.add_row(
            "mean",
            "",
            "",
            "",
            *(f"{means[key][arm]:.2f}" for key in ("relative_error", "kl") for arm in ARMS),
            f"{means['effective_dims']:.1f}",
            *(
                f"{means[key]:.3f}"
                for key in ("far_mass", "exact_far_mass")
                if has_memory and means[key] is not None
            ),
        )
        table.caption = (
            "error: median of |output - exact| / |exact|; KL in nats; Performer has as many "
            "features, uniform averages all that a query sees"
        )
        return table

    def plot(self, path: Any = None) -> Any:
        """Errors and spectra by layer, as a matplotlib figure.

        Args:
            path: a file to save it to, or `None`.

        Returns:
            The figure.
        """
        from matplotlib.figure import Figure

        layers = self["layers"]
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        errors, divergence, spectra = figure.subplots(1, 3)
        positions = np.arange(len(layers))
        colors = {"dark": "tab:blue", "performer": "tab:orange", "uniform": "tab:gray"}
        names = {"dark": "this model", "performer": "Performer", "uniform": "uniform"}
        for axis, key in ((errors, "relative_error"), (divergence, "kl")):
            for offset, arm in zip((-0.25, 0.0, 0.25), ARMS, strict=True):
                for index, layer in enumerate(layers):
                    values = [head[key][arm] for head in layer["heads"]]
                    axis.scatter(
                        np.full(len(values), index + offset),
                        values,
                        s=8,
                        color=colors[arm],
                        alpha=0.4,
                    )
                means = [np.mean([head[key][arm] for head in layer["heads"]]) for layer in layers]
                axis.scatter(
                    positions + offset, means, s=60, marker="_", color=colors[arm], label=names[arm]
                )
            axis.set_xticks(positions, [layer["name"].removeprefix("layer_") for layer in layers])
            axis.set_xlabel("layer")
            axis.set_ylim(bottom=0)
        errors.set_title("relative error of outputs")
        divergence.set_title("KL from exact weights, nats")
        errors.legend(fontsize=8)
        for index, layer in enumerate(layers):
            spectrum = np.mean([head["spectrum"] for head in layer["heads"]], axis=0)
            shade = index / max(1, len(layers) - 1)
            spectra.plot(
                np.arange(1, len(spectrum) + 1),
                np.maximum(spectrum, 1e-6),
                color=(0.1, 0.3 + 0.5 * shade, 0.8 - 0.6 * shade),
                label=layer["name"].removeprefix("layer_")
                if index in (0, len(layers) - 1)
                else None,
            )
        spectra.set(yscale="log", xlabel="direction", title="variance of queries and keys")
        spectra.legend(title="layer", fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def approximation_report(
    model: Model,
    data: Data,
    *,
    batch_size: int = 8,
    max_batches: int = 8,
    position_offset: int | tuple[int, int] | None = None,
    seed: int = 0,
) -> ApproximationReport:
    """Compares every dark layer's attention with exact softmax of the same queries and keys.

    Teacher-forced: each layer gets what it gets in the model with softmax attention, so errors of
    earlier layers are not in the figures. Beside the model's own features stand Performer's and
    plain averaging. Quadratic in the length.

    Args:
        model: made by `convert_to_dark`, or with `DarkAttention` layers.
        data: as for `calibrate`; text the features were not fitted to.
        batch_size: int. For data without batches.
        max_batches: int. Batches looked at.
        position_offset: as for `calibrate`.
        seed: int. Of Performer's draw and of position offsets.

    Returns:
        An `ApproximationReport`: print it, read it as a dict or `plot` it.

    Raises:
        ValueError: if the model has no dark layers or `data` no batches.

    Example:

        print(approximation_report(model, held_out_texts))
    """
    positive_integer("max_batches", max_batches)
    layers = dark_layers(model)
    check_position_offset(position_offset, layers.values())
    judges = {id(layer): _Judge(layer, seed) for layer in layers.values()}

    def observer(layer: FeatureAttention, heads: Heads) -> Tensor:
        judges[id(layer)].add(heads)
        return heads.exact_output()

    offsets = position_offsets(position_offset, seed)
    for count, inputs in enumerate(batches(model, data, batch_size)):
        if count == max_batches:
            break
        with observed(layers.values(), observer, next(offsets)):
            run(model, inputs)
    found = [judges[id(layer)].result(name) for name, layer in layers.items()]
    return ApproximationReport(layers=found, tokens=next(iter(judges.values())).tokens)


class _Judge:
    """Figures of one layer, batch by batch."""

    def __init__(self, layer: FeatureAttention, seed: int) -> None:
        self.map = layer.feature_map
        self.map.ensure_built()
        self.moments = Moments(self.map.num_heads, self.map.head_dim)
        projection = draw_projection(self.map.num_features, self.map.head_dim, seed=seed)
        self.performer = fold(
            DarkParameters(None, ops.convert_to_tensor(projection)),
            self.map.num_heads,
            self.map.head_dim,
        )
        self.errors: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
        self.divergences: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
        self.far: list[np.ndarray] = []
        self.exact_far: list[np.ndarray] = []
        self.tokens = 0

    def add(self, heads: Heads) -> None:
        query, key = (ops.cast(x, "float32") for x in (heads.query, heads.key))
        visible = heads.visible
        logits = exact_logits(query, key)
        exact = log_softmax(logits, visible)
        of_features = heads.for_features(self.map)
        pairs = self.map.exact_pairs(*of_features, heads.key_mask)
        scores = {
            "dark": self.map.log_scores(*of_features, pairs),
            "performer": log_scores(query, key, self.performer),
            "uniform": ops.zeros_like(logits),
        }
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
                for kept, of in ((self.far, own), (self.exact_far, weights)):
                    kept.append(_by_head(ops.sum(ops.where(pairs, 0.0, of), axis=-1), counts))

    def result(self, name: str) -> Config:
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
                    "relative_error": {
                        arm: float(np.median(_joined(self.errors[arm], head))) for arm in ARMS
                    },
                    "kl": {arm: _divergence(_joined(self.divergences[arm], head)) for arm in ARMS},
                    "far_mass": _mean(self.far, head),
                    "exact_far_mass": _mean(self.exact_far, head),
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


def _by_head(x: Any, counts: np.ndarray) -> Any:
    """`(b, n, t)` as a list of n arrays of what counts."""
    x = ops.convert_to_numpy(x)
    return [x[:, head][counts[:, head]] for head in range(x.shape[1])]


def _divergence(values: np.ndarray) -> float:
    """Their mean; infinite where weights that softmax gives are missing altogether."""
    mean = float(np.mean(values))
    return mean if mean < INFINITE else float("inf")


def _joined(parts: list[Any], head: int) -> np.ndarray:
    return np.concatenate([part[head] for part in parts])


def _mean(parts: list[Any], head: int) -> float | None:
    return float(np.mean(_joined(parts, head))) if parts else None
