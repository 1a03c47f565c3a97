"""The tables of a real decoder: what retrieval.py, cache_scores.py and the pretrained_* found.

Each function takes the words behind its name in a page's mark and returns Markdown.
"""

from formats import load, table, unique


def retrieval(backend):
    """What a real decoder reads and finds, arm by arm, of retrieval.py."""
    lines = []
    for name, row in load(f"retrieval_{backend}")["arms"].items():
        kinds = [kind for kind in row if kind not in ("bytes", "options")]
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1024:.0f}"
        cells = []
        for kind in kinds:
            median, low, high = (row[kind][x] for x in ("median", "lowest", "highest"))
            if kind == "digits right":
                cells.append(f"{median:.0%}")
            else:
                spread = f" ({low:.2f} to {high:.2f})" if low != high else ""
                cells.append(f"{median:.2f}{spread}")
        lines.append([name, size, *cells])
    return table(["arm", "KiB a layer", *kinds], lines)


def cache_scores(backend):
    """What is left of a real decoder's heads, score by score of cache_scores.py."""
    columns = {
        "error": "error",
        "median error": "median error",
        "kl": "KL",
        "error without features": "error, no features",
    }
    lines = [
        [name, *(f"{row[key]:.3f}" for key in columns)]
        for name, row in load(f"cache_scores_{backend}")["scores"].items()
    ]
    return table(["score", *columns.values()], lines)


SHORT = {
    "exact": "exact",
    "window 64": "window of 64 tokens",
    "window 64, 4 sinks": "window of 64, 4 sinks",
    "window 124, 4 sinks": "window of 124, 4 sinks",
    "window 64, 4 sinks, 60 kept": "window of 64, 4 sinks, 60 kept keys",
    "60 kept, 4 layers exact, evenly spaced": "the same, 4 of 30 layers exact, evenly spaced",
    "60 kept, 4 layers exact, chosen": "the same, 4 of 30 layers exact, chosen",
    "60 kept, 8 layers exact, chosen": "the same, 8 of 30 layers exact, chosen",
    "window 252, 4 sinks": "window of 252, 4 sinks",
    "window 64, 4 sinks, 188 kept": "window of 64, 4 sinks, 188 kept keys",
    "188 kept, 4 layers exact, chosen": "the same, 4 of 30 layers exact, chosen",
}


def retrieval_short(backend):
    """The same, of some arms and figures, for docs/results.md."""
    arms = load(f"retrieval_{backend}")["arms"]
    lines = []
    for arm, name in SHORT.items():
        row = arms[arm]
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1024:.0f}"
        losses = [f"{row[x]['median']:.2f}" for x in ("text", "repeat of 16", "repeat of 64")]
        lines.append([name, size, *losses, f"{row['digits right']['median']:.0%}"])
    columns = ["attention", "KiB a linear layer", "text", "repeat of 16", "repeat of 64"]
    return table([*columns, "digits right"], lines)


TRAINED = ("text", "repeat of 16", "repeat of 64", "digits right")


def cells_of(losses, places):
    """The figures of `TRAINED`; plain text with so many places."""
    *of_text, found = (losses[kind] for kind in TRAINED)
    text, *repeats = of_text
    return [f"{text:.{places}f}", *(f"{loss:.2f}" for loss in repeats), f"{found:.0%}"]


def retrieval_trained(name):
    """What training adds, arm by arm and stage by stage, of one draw."""
    lines = []
    for arm, row in load(f"retrieval_trained_{name}")["arms"].items():
        for stage, found in row["stages"].items():
            if "longer" not in stage:
                lines.append([arm, stage, *cells_of(found["losses"][0], 2)])
    return table(["arm", "stage", *TRAINED], lines, words=2)


def linearized(backend, which="every"):
    """Stage by stage, what `linearize` won on a real decoder; for README the `last` stages."""
    if which not in ("every", "last"):
        raise ValueError(f"{which!r} is neither every nor last")
    results = load(f"pretrained_linearized_{backend}")
    lines = []
    for name, arm in results["arms"].items():
        by_name = {stage["name"]: stage for stage in arm["report"]["stages"]}
        for stage, found in arm["stages"].items():
            if stage == "exact":
                if not lines:
                    lines.append(["exact", "", *cells_of(found["losses"], 3), "", ""])
                continue
            if which == "last" and stage != list(arm["stages"])[-1]:
                continue
            facts = by_name[stage]
            seconds, tokens = f"{facts['seconds']:,.0f}", f"{facts['tokens']:,}"
            lines.append([name, stage, *cells_of(found["losses"], 3), tokens, seconds])
    lines.append(["Performer, m = 128", "converted", *cells_of(results["performer"], 3), "", ""])
    return table(["layers", "after", *TRAINED, "tokens", "seconds"], lines, words=2)


def written(backend):
    """What it writes after each stage."""
    results = load(f"pretrained_linearized_{backend}")
    lines = []
    for name, arm in results["arms"].items():
        for stage, found in arm["stages"].items():
            text = " ".join(found["written"].split()).replace("|", "\\|")
            row = ["exact" if stage == "exact" else name, "" if stage == "exact" else stage, text]
            if row not in lines:
                lines.append(row)
    return table(["layers", "after", "writes"], lines, words=3)


def costs(backend):
    """Seconds and memory of each step."""
    lines = [
        [name, f"{row['seconds']:.1f}", f"{row['bytes'] / 2**30:.1f}"]
        for name, row in load(f"pretrained_costs_{backend}")["parts"].items()
    ]
    return table(["", "seconds", "GiB above the models"], lines)


def generation(backend):
    """What writing on after long prompts takes, exact and dark."""
    arms = load(f"pretrained_generation_{backend}")["arms"]
    lengths = unique(length for rows in arms.values() for length in rows)
    lines = [
        [
            f"{int(length):,}",
            arm,
            f"{rows[length]['seconds_to_first']:.1f}",
            f"{rows[length]['tokens_per_second']:.1f}",
            f"{rows[length]['bytes'] / 2**20:,.0f}",
        ]
        for length in lengths
        for arm, rows in arms.items()
    ]
    columns = ["prompt", "attention", "seconds to the first token", "tokens/s behind it", "MiB"]
    return table(columns, lines, words=2)
