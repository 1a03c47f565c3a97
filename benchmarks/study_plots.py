"""Draws results/study.png, study_features.png and study_variance.png from their JSON.

python benchmarks/study_plots.py
"""

import numpy as np
from common import RESULTS
from formats import load
from plots import plt, save
from study_tables import NUM_FEATURES, REGIMES, run_of, runs

COLOURS = {  # Okabe and Ito's
    "exact": "#000000",
    "DARKFormer": "#0072B2",
    "Performer": "#D55E00",
    "learned features": "#CC79A7",
    "uniform": "#999999",
    "calibrated": "#009E73",
}


def draw(path):
    """Loss and spikes against the rate."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for column, regime in enumerate(REGIMES.values()):
        for run in runs(regime=regime, num_features=NUM_FEATURES["h64"]):
            if run["arm"] not in COLOURS:
                continue
            loss = np.array(run["loss"], "float64")
            line = {"color": COLOURS[run["arm"]], "label": run["arm"], "marker": "o", "ms": 4}
            axis = axes[0, column]
            axis.plot(run["rates"], loss.mean(axis=1), **line)
            axis.fill_between(
                run["rates"], loss.min(1), loss.max(1), color=line["color"], alpha=0.15
            )
            spikes = 1000 * np.mean(run["spikes"], axis=1) / run["steps"]
            axes[1, column].plot(run["rates"], spikes, **line)
        axes[0, column].set(xscale="log", title=regime, xlabel="learning rate", ylabel="test loss")
        axes[1, column].set(
            xscale="log", yscale="symlog", xlabel="learning rate", ylabel="spikes in 1,000 steps"
        )
        axes[1, column].set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=8, frameon=False)
    save(figure, path, dpi=110)


def draw_features(path):
    """Loss against the number of features; dashed: from another exact model."""
    figure, axis = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    wanted = {"regime": REGIMES["qkv"]}
    counts = set()
    for teacher, style in enumerate(("-", "--")):
        for arm in ("Performer", "DARKFormer", "calibrated"):
            found = runs(arm=arm, teacher=teacher, **wanted)
            if not found:
                continue
            losses = np.array([run["loss"][run["best"]] for run in found])
            ms = [run["num_features"] for run in found]
            label = None if teacher else arm
            axis.plot(ms, losses.mean(1), style, color=COLOURS[arm], label=label, marker="o", ms=4)
            axis.fill_between(ms, losses.min(1), losses.max(1), color=COLOURS[arm], alpha=0.15)
            counts.update(ms)
        exact = run_of("exact", teacher=teacher, **wanted)
        loss = np.mean(exact["loss"][exact["best"]])
        axis.axhline(loss, ls=style, color="black", lw=1, label=None if teacher else "exact")
    axis.set(title=wanted["regime"], xlabel="features m", ylabel="test loss")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(counts), [str(m) for m in sorted(counts)])
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    save(figure, path, dpi=110)


def draw_variance(path):
    """The relative variance of one feature, head by head: by the formula and drawn."""
    results = load("study_variance")["heads"]
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4), squeeze=False)
    for axis, (name, heads) in zip(axes[0], results.items(), strict=True):
        ways = [x for x in heads[0] if x != "largest eigenvalue"]
        for place, way in enumerate(ways):
            found = np.array([head[way] for head in heads])
            for shift, values, colour in (
                (-0.17, found[:, 0], COLOURS["DARKFormer"]),
                (0.17, found[:, 1][found[:, 1] > 0], COLOURS["Performer"]),
            ):
                label = ("formula", "drawn")[shift > 0] if not place else None
                spread = np.random.default_rng(0).uniform(-0.1, 0.1, len(values))
                axis.plot(place + shift + spread, values, ".", color=colour, ms=3, label=label)
        axis.set_xticks(range(len(ways)), [x.replace(", ", ",\n") for x in ways], fontsize=8)
        axis.set(title=name, ylabel="relative variance of a feature, power of ten")
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save(figure, path, dpi=110)


def main():
    draw(RESULTS / "study.png")
    draw_features(RESULTS / "study_features.png")
    draw_variance(RESULTS / "study_variance.png")


if __name__ == "__main__":
    main()
