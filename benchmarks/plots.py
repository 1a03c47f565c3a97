"""Draws results/attention.png from attention_BACKEND.json, and gemma_to_dark.png from its JSON.

python benchmarks/plots.py                   # both
python benchmarks/plots.py --gpu             # attention_gpu.png from attention_BACKEND_gpu.json
"""

import argparse
import json
import pathlib

import comparisons as compare
import matplotlib
import numpy as np
from common import RESULTS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

SHAPE = "h64 m128"
COLOURS = {  # Okabe and Ito's, told apart by the colour-blind
    "ours": ("#000000", "o"),
    "ours, `remat` switched": ("#777777", "o"),
    "darkformer-pytorch": ("#D55E00", "s"),
    "performer-pytorch": ("#CC79A7", "D"),
    "sdpa": ("#0072B2", "^"),
    "cudnn": ("#009E73", "^"),
    "keras": ("#E69F00", "v"),
}
ARMS = {  # label and colour
    "exact": ("exact softmax", "black"),
    "dark": ("all steps", "tab:blue"),
    "paper": ("M finetuned", "tab:green"),
    "performer": ("Performer", "tab:orange"),
}


# === Attention ===


def curves(payload):
    """Points of time and memory: `[{name: [(length, value), ...]}, ...]`."""
    time, memory = {}, {}
    for row in compare.rows_of(payload, "causal"):
        if (row["shape"], row["pass"]) != (SHAPE, compare.BOTH):
            continue
        times = compare.medians(row)
        values = {
            "ours": times.get("dark"),
            "performer-pytorch": times.get("performer_pytorch"),
            "darkformer-pytorch": min(compare.chunks_of(times).values(), default=None),
            **{name: times.get(name) for name in ("sdpa", "cudnn", "keras")},
        }
        for name, value in values.items():
            if value:
                time.setdefault(name, []).append((row["length"], value))
    for row in payload["memory"]:
        if (row["shape"], row["pass"]) != (SHAPE, compare.BOTH):
            continue
        for way, mib in row["mib"].items():
            name = "darkformer-pytorch" if way.startswith(compare.CHUNK) else compare.way_name(way)
            if mib > 0:
                memory.setdefault(name, []).append((row["length"], mib))
    return time, memory


def plot_attention(payloads, path):
    """Time and peak memory against length, a row for each backend."""
    size = 10, 3.4 * len(payloads) + 0.8
    figure, axes = plt.subplots(len(payloads), 2, figsize=size, squeeze=False)
    handles = {}
    for row, payload in zip(axes, payloads, strict=True):
        units = "time, ms", "peak memory, MiB"
        for axis, lines, unit in zip(row, curves(payload), units, strict=True):
            for name in COLOURS:
                if name in lines:
                    handles[name] = draw(axis, name, sorted(lines[name]))
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit)
            axis.set_title(f"{payload['label']}: {unit.split(',')[0]}")
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
            axis.xaxis.set_minor_locator(NullLocator())
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            axis.grid(color="#dddddd", lw=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    names = [name for name in COLOURS if name in handles]
    figure.legend(
        [handles[name] for name in names],
        [name.replace("`", "") for name in names],
        loc="upper center",
        ncols=min(4, len(names)),
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / figure.get_figheight()))
    save(figure, path, dpi=130)


def draw(axis, name, points):
    colour, marker = COLOURS[name]
    style = {"ls": "--" if "remat" in name else "-", "lw": 2.4 if name == "ours" else 1.5, "ms": 5}
    return axis.plot(*zip(*points, strict=True), color=colour, marker=marker, **style)[0]


# === One Gemma, four ways ===


def plot_gemma(rows, path):
    """Losses, perplexities, speeds and memory of the arms."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    (losses, perplexities), (speed, memory) = axes
    for row in rows:
        label, colour = ARMS[row["arm"]]
        style = {"color": colour, "label": label}
        # The linear ones' states and speeds are alike: dashes let all be seen.
        dashes = {"paper": "--", "performer": ":"}.get(row["arm"], "-")
        values = np.array(row["finetuning_losses"])
        width = max(1, len(values) // 10)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        losses.plot(np.arange(len(smooth)) + width, smooth, **style)
        for axis, key, unit in (
            (speed, "reading_tokens_per_second", 1),
            (memory, "cache_bytes", 1024),
        ):
            sizes = {int(length): size / unit for length, size in row[key].items()}
            axis.plot(sizes.keys(), sizes.values(), marker="o", linestyle=dashes, **style)
            axis.set(xscale="log", yscale="linear" if axis is speed else "log")
            axis.set_xticks(list(sizes), [f"{length:,}" for length in sizes])
            axis.xaxis.minorticks_off()
    stages(perplexities, rows)
    losses.set(xlabel="step", ylabel="loss", title="finetuning on the next token")
    speed.set(xlabel="sequence, tokens", ylabel="tokens per second", title="reading")
    memory.set(xlabel="context, tokens", ylabel="KiB", title="cache or state in generation")
    speed.set_ylim(bottom=0)
    for axis in (losses, speed, memory):
        axis.legend()
    save(figure, path, dpi=120)


def stages(axis, rows):
    """A bar for each stage of each arm."""
    for position, row in enumerate(rows):
        found = list(row["perplexities"].values())
        width = 0.84 / len(found)
        places = position + width * (np.arange(len(found)) - (len(found) - 1) / 2)
        bars = axis.bar(places, found, 0.94 * width, color=ARMS[row["arm"]][1])
        for bar, alpha in zip(bars, np.linspace(0.3, 1.0, len(found)), strict=True):
            bar.set_alpha(alpha)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set(ylabel="perplexity", yscale="log", title="held-out text, stage by stage")
    axis.set_xticks(range(len(rows)), [ARMS[row["arm"]][0] for row in rows], fontsize=8)


def save(figure, path, dpi):
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    print(f"wrote {path.name}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="attention on GPUs alone")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS, help="a folder")
    args = parser.parse_args()
    suffix = "_gpu" if args.gpu else ""
    sources = [f"{backend}{suffix}" for backend in ("tensorflow", "jax", "torch")]
    found = [x for x in sources if (RESULTS / f"attention_{x}.json").exists()]
    payloads = [compare.load("attention", source) for source in found]
    if payloads:
        plot_attention(payloads, args.output / f"attention{suffix}.png")
    if not args.gpu:
        rows = json.loads((RESULTS / "gemma_to_dark.json").read_text())["rows"]
        plot_gemma(rows, args.output / "gemma_to_dark.png")


if __name__ == "__main__":
    main()
