"""The tables made of what quality.py, gemma_to_dark.py and sequence_parallel.py measured.

Each function takes the words behind its name in a page's mark and returns Markdown.
"""

import itertools
import statistics

from formats import load, mean_and_range, median_and_range, span, table, unique

# === quality.py ===

# Arms by how their names begin; "features" are all others.
GROUPS = {
    "window": "window",
    "memory": "memory",
    "sizes": "m =",
    "positions": "rope",
    "large-heads": "h256",
}


def quality(group):
    """All arms of a group: losses, R, error."""
    results = load("quality")
    if group not in ("features", "window", "memory", "sizes", "large-heads"):
        raise ValueError(f"{group!r} is no group of arms")
    if group == "features":
        names = [n for n in results["summary"] if not n.startswith(tuple(GROUPS.values()))]
    else:
        names = [n for n in results["summary"] if n.startswith(GROUPS[group])]
        names = ["exact", *names] if group == "window" else names
    lines = []
    for name in names:
        entry, rows = results["summary"][name], rows_of(name)
        share = mean_and_range(entry["R"], 2) if "R" in entry else ""
        best = [row for row in rows if row["seed"] == 0 and row["rate"] == entry["rate"]]
        found = [row for row in best if "approximation" in row]
        error = f"{found[0]['approximation']['relative_error']['dark']:.2f}" if found else ""
        tried = unique(row["rate"] for row in rows if row["seed"] == 0 and row["rate"])
        line = [name, mean_and_range(entry["text"], 3), share]
        line += [mean_and_range(entry["retrieval"], 2), error, entry["seeds"], len(tried) or ""]
        lines.append(line)
    columns = ["arm", "text", "R", "retrieval", "error", "seeds", "rates tried"]
    return table(columns, lines)


def rows_of(name):
    return [row for row in load("quality")["rows"] if row["arm"] == name]


def positions():
    """Losses of text at positions further and further on."""
    lines = []
    for name in load("quality")["summary"]:
        rows = [row for row in rows_of(name) if "test at 4x" in row]
        if rows:
            losses = [text_losses(rows, key) for key in ("test", "test at 2x", "test at 4x")]
            cells = [(statistics.mean(x), min(x), max(x)) for x in losses]
            lines.append([name, *(mean_and_range(cell, 3) for cell in cells)])
    return table(["arm", "at 1x", "up to 2x", "up to 4x"], lines)


def text_losses(rows, key):
    return [row[key]["text"] for row in rows]


def encoder(backend):
    """How near the embeddings of a converted sentence encoder are, of encoder.py."""
    rows = load(f"encoder_{backend}")["rows"]
    # What a run with another end has calibrated is another run's already.
    rows = [x for x in rows if "trained" not in x["run"] or x["stage"] == "trained"]
    lines = []
    for run, stage in unique((x["run"], x["stage"]) for x in rows):
        of_seeds = [x for x in rows if (x["run"], x["stage"]) == (run, stage)]
        cells = [
            median_and_range([x[kind][figure] for x in of_seeds if kind in x], 3)
            for kind in ("texts", "padded texts")
            for figure in ("cosine", "spearman")
        ]
        seconds = statistics.median(x["seconds"] for x in of_seeds)
        lines.append([run, stage, *cells, len(of_seeds), f"{seconds:.0f}"])
    columns = ["attention", "stage", "cosine", "Spearman", "padded: cosine", "Spearman"]
    return table([*columns, "seeds", "seconds"], lines, words=2)


OFFSETS = {
    "after, no offsets": "rope after, no offsets",
    "after, offsets over all": "rope after, offsets",
    "before, offsets over all": "rope before, offsets",
}


def offsets():
    """What calibration at positions to come is worth, for docs/calibration.md."""
    lines = [
        [name, *(f"{statistics.mean(text_losses(rows_of(arm), k)):.2f}" for k in keys)]
        for keys in [("test", "test at 4x")]
        for name, arm in OFFSETS.items()
    ]
    return table(["", "positions of the calibration", "up to 4 times as far"], lines)


STEPS = {
    "exact": "exact",
    "Performer": "performer",
    "`calibrate`, closed form alone": "spectral, closed form",
    "`calibrate`": "spectral",
    "+ `transfer_attention`, 100 steps": "spectral + transfer",
    "+ `distil`, 300 steps": "spectral + transfer + distillation",
    "Performer + the same `distil`": "performer + distillation",
    "M = I, next-token loss, 300 steps (the paper)": "identity, finetuned",
    "Performer, the same 300 steps": "performer, finetuned",
}


def steps():
    """The arms of a conversion from start to end, for docs/results.md."""
    lines = []
    for name, arm in STEPS.items():
        entry = load("quality")["summary"][arm]
        # Rounded as in the tables of all arms.
        mean, low, high = (f"{100 * float(f'{share:.2f}'):.0f}" for share in entry["R"])
        spread = f" ({low} to {high})" if low != high else ""
        lines.append([name, f"{entry['text'][0]:.2f}", f"{mean} %{spread}"])
    return table(["", "loss", "R"], lines)


# === gemma_to_dark.py ===

STAGES = ("converted", "calibrated", "transferred", "distilled", "finetuned")
ARMS = {
    "exact": "exact softmax",
    "dark": "calibrate, transfer, distil, fit",
    "paper": "the paper's way: M = I, `fit`",
    "performer": "Performer, `fit`",
}


def gemma_to_dark(*what):
    """The arms of an example: perplexities, speeds, memory; `all` lengths, or some."""
    everything = what == ("all",)
    rows = load("gemma_to_dark")["rows"]
    lengths = list(rows[0]["reading_tokens_per_second"])
    contexts = list(rows[0]["cache_bytes"])
    if not everything:
        lengths, contexts = [lengths[0], lengths[-1]], ["1024", "65536"]
    lines = []
    for row in rows:
        found = row["perplexities"]
        line = [ARMS[row["arm"]]]
        line += [f"{found[stage]:.1f}" if stage in found else "" for stage in STAGES]
        line += [row["loss_spikes"]] * everything
        speeds = [row["train_tokens_per_second"]]
        speeds += [row["reading_tokens_per_second"][n] for n in lengths]
        line += [f"{x:,.0f}" for x in (*speeds, row["generate_tokens_per_second"])]
        lines.append([*line, *(f"{row['cache_bytes'][n] / 1024:,.0f}" for n in contexts)])
    at = load("gemma_to_dark")["arguments"]["sequence_length"]
    columns = ["attention", "perplexity converted", *STAGES[1:], *["loss spikes"] * everything]
    columns += [f"training at {at}", *(f"reading at {int(n):,}" for n in lengths), "writing"]
    columns += [f"cache at {int(n):,}, KiB" for n in contexts]
    return table(columns, lines)


# === sequence_parallel.py, conversion_memory.py ===


def sequence_parallel(devices):
    """Megabytes that each of so many devices receives."""
    found = {
        (row["length"], row["causal"], row["pass"] != "forward"): row
        for row in load("sequence_parallel_jax")["rows"]
        if row["devices"] == int(devices)
    }

    def megabytes(key, name):
        value = found[key][name] / 1e6
        return f"{value:.{1 if value >= 10 else 2}f} MB"

    lines = []
    for length in unique(length for length, *_ in found):
        keys = [(length, *rest) for rest in itertools.product((True, False), (False, True))]
        line = [f"{length:,}", *(megabytes(key, "bytes_received") for key in keys)]
        lines.append([*line, *(megabytes(key, "ring_attention_bytes") for key in keys[:2])])
    columns = ["tokens", "causal, forward", "and backward", "bidirectional, forward"]
    columns += ["and backward", "ring attention, forward", "and backward"]
    return table(columns, lines, words=0)


def conversion_memory(*sources):
    """Peaks over what a model takes, and over loading it stock."""
    lines = []
    for source in sources:
        payload = load(f"conversion_memory_{source}")
        parameters = span([row["parameters"] for row in payload["rows"]["convert"]])
        ratios = payload["in_place_over_model"], payload["from_preset_over_stock"]
        lines.append([source, f"{int(parameters):,}", *(f"{x:.3f}" for x in ratios)])
    columns = ["backend", "parameters", "in place / model", "from preset / stock from preset"]
    return table(columns, lines)


def distil_memory(*sources):
    """Peaks of a step of distillation beside the logits of a batch, in MB."""
    lines = []
    for source in sources:
        payload = load(f"distil_memory_{source}")
        sizes, rows = payload["sizes"], payload["rows"]
        cells = [
            f"{x / 1e6:,.0f}" for x in (payload["logits"], *(r["peak"] for r in rows.values()))
        ]
        seconds = [f"{row['seconds_per_step']:.1f}" for row in rows.values()]
        lines.append(
            [source.split("_")[0], f"{sizes['batch']} x {sizes['length']}", *cells, *seconds]
        )
    columns = ["backend", "tokens", "logits", "whole vocabulary", "top 64", "s a step", "top 64, s"]
    return table(columns, lines)
