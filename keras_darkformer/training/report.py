"""What a conversion loses, layer by layer and head by head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from keras_darkformer.checks import positive_integer
from keras_darkformer.layers.core import FeatureAttention, observed
from keras_darkformer.layers.heads import Heads
from keras_darkformer.printed import PrintedDict
from keras_darkformer.training.data import (
    batches,
    check_position_offset,
    dark_layers,
    look,
    position_offsets,
)
from keras_darkformer.training.judge import ARMS, PARTS, Judge
from keras_darkformer.types import Config, Data, Model, Tensor


class ApproximationReport(PrintedDict):
    """How far each layer's attention is from softmax: a dict for code, a table when printed.

    Keys:
        layers: list of dicts, one per layer: name, num_features, feature_map, sliding_window,
            num_sinks, cache_size and heads.
        tokens: number of queries compared, per head and layer.

    A head is a dict:
        relative_error: dict of the median over queries of
            `|output - exact| / |exact|`, for `dark`, for `performer` (identity
            geometry, fresh draw, as many features) and for `uniform`
            (the average of all that is visible, which ignores the logits).
            `performer` is `None` if there are no features.
        kl: dict of the mean divergence from exact attention weights, in nats,
            for the same three; infinite for a window alone.
        mass, exact_mass: dicts of the shares of attention weight on `sinks`, `window`, `kept` keys
            and all others, `far`: here, and for softmax. `None` without a memory.
        far_kl: the part of the divergence that comes from where the far part puts its weight, not
            from how much it has; `None` without a memory or features.
        spectrum: eigenvalues of `Cov(q^) + Cov(k^)`, largest first: the variances that logits are
            made of.
        effective_dims: `(sum v)^2 / sum v^2` of these: `head_dim` if queries and keys are
            isotropic, 1 if all variance is in one direction.
    """

    width = 150

    def summary(self) -> Config:
        """The means of all figures over heads and layers."""
        heads = [head for layer in self["layers"] for head in layer["heads"]]
        means: Config = {key: _means(heads, key, ARMS) for key in ("relative_error", "kl")}
        for key in ("mass", "exact_mass"):
            has_memory = [head for head in heads if head[key] is not None]
            means[key] = _means(has_memory, key, PARTS) if has_memory else None
        for key in ("far_kl", "effective_dims"):
            values = [head[key] for head in heads if head[key] is not None]
            means[key] = float(np.mean(values)) if values else None
        return means

    def __rich__(self) -> Table:
        means = self.summary()
        has_memory = means["mass"] is not None
        table = Table(title=f"Attention against exact softmax, {self['tokens']:,} queries a head")
        columns = ["layer", "head", "m", "map", "error", "Performer", "uniform", "KL"]
        columns += ["KL Performer", "KL uniform", "eff. dims"]
        columns += [*PARTS, "exact far", "far KL"] if has_memory else []
        for column in columns:
            table.add_column(column, justify="left" if column in ("layer", "map") else "right")
        for layer in self["layers"]:
            for index, head in enumerate(layer["heads"]):
                of_layer = [layer["name"], str(index), str(layer["num_features"])]
                table.add_row(*of_layer, layer["feature_map"], *_cells(head, has_memory))
            table.add_section()
        table.add_row("mean", "", "", "", *_cells(means, has_memory))
        table.caption = (
            "error: median of |output - exact| / |exact|; KL in nats; Performer has as many "
            "features, uniform averages all that a query sees"
        )
        if has_memory:
            table.caption += "; sinks, window, kept, far: shares of the weights"
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
                    values = [_number(head[key][arm]) for head in layer["heads"]]
                    axis.scatter(
                        np.full(len(values), index + offset),
                        values,
                        s=8,
                        color=colors[arm],
                        alpha=0.4,
                    )
                means = [_means(layer["heads"], key, (arm,))[arm] for layer in layers]
                means = list(map(_number, means))
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

    The comparison is teacher-forced: each layer gets the inputs it has in the model with softmax
    attention, so errors of earlier layers are not in the figures. Performer's features and plain
    averaging are measured, too, for comparison. The cost is quadratic in the length.

    Args:
        model: a model made by `convert_to_dark`, or one that holds such a model or `DarkAttention`.
        data: as for `calibrate`, but not what the features were fitted to.
        batch_size: int. Rows per batch of data that does not come in batches.
        max_batches: int. Number of batches compared.
        position_offset: as for `calibrate`.
        seed: int. Seed of Performer's draw and of the position offsets.

    Returns:
        An `ApproximationReport`: print it, read it as a dict or `plot` it.

    Raises:
        ValueError: if an argument is out of range, the model has no dark layers or does not call
            all of them, or `data` has no batches.

    Example:

        print(approximation_report(model, held_out_texts))
    """
    positive_integer("max_batches", max_batches)
    layers = dark_layers(model)
    check_position_offset(position_offset, layers.values())
    judges = {id(layer): Judge(layer, seed) for layer in layers.values()}

    def observer(layer: FeatureAttention, heads: Heads) -> Tensor:
        judges[id(layer)].add(heads)
        return heads.exact_output()

    offsets = position_offsets(position_offset, seed)
    for count, inputs in enumerate(batches(model, data, batch_size)):
        if count == max_batches:
            break
        with observed(layers.values(), observer, next(offsets)):
            look(model, inputs)
    if idle := [name for name, layer in layers.items() if not judges[id(layer)].tokens]:
        raise ValueError(
            f"`model` holds dark layers that saw no token of `data`: {', '.join(idle)}. Pass the "
            "part of it that calls all of its dark layers."
        )
    found = [judges[id(layer)].result(name) for name, layer in layers.items()]
    return ApproximationReport(layers=found, tokens=next(iter(judges.values())).tokens)


def _means(heads: list[Config], key: str, names: Sequence[str]) -> Config:
    """Means over heads by name, `None` where no head has a figure."""
    values = {name: [h[key][name] for h in heads if h[key][name] is not None] for name in names}
    return {name: float(np.mean(found)) if found else None for name, found in values.items()}


def _number(x: float | None) -> float:
    return np.nan if x is None else x


def _cells(figures: Config, has_memory: bool) -> list[str]:
    """The figures of a head, or the means over heads, as a table shows them."""

    def cell(x: float | None, digits: int) -> str:
        return "-" if x is None else f"{x:.{digits}f}"

    cells = [cell(figures[key][arm], 2) for key in ("relative_error", "kl") for arm in ARMS]
    cells.append(cell(figures["effective_dims"], 1))
    if has_memory:
        mass, exact_mass = (figures[key] or dict.fromkeys(PARTS) for key in ("mass", "exact_mass"))
        cells += [cell(mass[part], 3) for part in PARTS]
        cells += [cell(exact_mass["far"], 3), cell(figures["far_kl"], 2)]
    return cells
