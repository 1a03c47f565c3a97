"""The tables of short sequences, of use, of prompts, and of GPUs.

They are of forms.py, crossover.py, use.py, prefill.py and flash.py.

Each function takes the words behind its name in a page's mark and returns Markdown.
"""

import statistics

from comparisons import load as load_labelled
from formats import PACKAGES, load, milliseconds, plain_ratio, ratio, table, unique

FORMS = ("linear", "exact")
PEERS = {
    "dark": "ours, linear",
    "sdpa": "sdpa",
    "keras": "keras",
    "fla": "fla, plain PyTorch",
    "darkformer_pytorch_256": "darkformer-pytorch",
    "performer_pytorch": "performer-pytorch",
}
FLASH_PEERS = {
    "sdpa": "flash attention",
    "cudnn": "flash attention",
    "fla_kernel": "fla's kernel",
    "darkformer_pytorch_256": "darkformer-pytorch",
    "dark_float32": "ours in float32",
    "dark_remat": "ours, `remat` switched",
}


def forms(backend):
    """What a model loses in the form that it was not trained in, of forms.py."""
    payload = load(f"forms_{backend}")
    stages = unique(stage for row in payload["rows"] for stage in row["losses"])
    lines = [["the source, exact", "", f"{payload['source']:.2f}"]]
    for stage in stages:
        found = [row["losses"][stage] for row in payload["rows"]]
        cells = []
        for form in FORMS:
            values = [losses[form] for losses in found]
            cells.append(" to ".join(unique(f"{x:.2f}" for x in (min(values), max(values)))))
        lines.append([stage, *cells])
    return table(["the model", *(f"judged {form}" for form in FORMS)], lines)


def crossovers(*backends):
    """The lengths from which on features are faster, of crossover.py."""
    payloads = [load_labelled("crossover", backend) for backend in backends]
    kinds = unique((x["causal"], x["pass"]) for payload in payloads for x in payload["rows"])
    lengths = {}
    for payload in payloads:
        for row in payload["rows"]:
            if not row["masked"]:
                of_shape = lengths.setdefault((payload["label"], *shape_of(row)), {})
                of_shape[row["causal"], row["pass"]] = f"{row['length']:,}"
    lines = [[*key, *(found.get(kind, "-") for kind in kinds)] for key, found in lengths.items()]
    columns = ["backend", "head size", "features", "query / key heads"]
    named = [f"{'causal' if causal else 'not causal'}, {which}" for causal, which in kinds]
    return table([*columns, *named], lines, words=4)


def shape_of(row):
    """What a reader knows a shape by."""
    return row["head_dim"], row["num_features"], f"{row['heads']} / {row['kv_heads']}"


def use(backend):
    """Their time over that of `attention_mode="auto"`, of use.py."""
    rows = load(f"use_{backend}")["rows"]
    peers = [name for name in PEERS if any(name in row["ratios"] for row in rows)]
    lines = []
    for row in rows:
        kind = "causal" if row["causal"] else "not causal"
        line = [row["threads"], row["heads"], row["batch"], f"{row['length']:,}", kind]
        line += [row["dtype"], row["pass"], f"{row['times']['dark_auto']['median']:.2f}"]
        lines.append(
            [*line, *(ratio(row["ratios"][x]) if x in row["ratios"] else "-" for x in peers)]
        )
    columns = ["threads", "heads", "batch", "tokens", "sees", "dtype", "pass", "auto, ms"]
    return table([*columns, *(PEERS[name] for name in peers)], lines, words=7)


def use_in_short(*backends):
    """Worst, median and best of these, and how many are not lost, by peer and pass."""
    lines = []
    for backend in backends:
        payload = load_labelled("use", backend)
        rows = payload["rows"]
        for name, label in PEERS.items():
            for which in unique(row["pass"] for row in rows):
                own = [x for x in rows if x["pass"] == which and name in x["ratios"]]
                if not own:
                    continue
                values = sorted(row["ratios"][name] for row in own)
                three = " / ".join(
                    ratio(x) for x in (values[0], statistics.median(values), values[-1])
                )
                wins = sum(value >= 1 for value in values)
                lines.append([payload["label"], label, which, three, f"{wins} of {len(values)}"])
    return table(
        ["backend", "against", "pass", "worst / median / best", "not lost"], lines, words=3
    )


def prefill(*backends):
    """Time over that of a forward pass, and peak memory, by tokens of a piece, of prefill.py."""
    lines = []
    for backend in backends:
        payload = load_labelled("prefill", backend)
        for row in payload["rows"]:
            for way, time in row["times"].items():
                piece = "a forward pass" if way == "forward" else f"pieces of {int(way):,}"
                line = [payload["label"], row["model"], piece, milliseconds(time)]
                lines.append([*line, plain_ratio(row["ratios"][way]), f"{row['mib'][way]:,.0f}"])
    return table(
        ["backend", "model", "read in", "ms", "over a forward pass", "MiB"], lines, words=3
    )


def flash(*sources):
    """Ours in milliseconds and their time over it, on a GPU, of flash.py."""
    labels, lines = unique(FLASH_PEERS.values()), []
    for source in sources:
        payload = load_labelled("flash", source)
        for row in payload["rows"]:
            ours = row["times"]["dark"]
            ratios = {
                label: ratio(row["times"][name]["median"] / ours["median"])
                for name, label in FLASH_PEERS.items()
                if name in row["times"]
            }
            line = [PACKAGES[payload["backend"]], row["shape"], row["pass"], f"{row['length']:,}"]
            lines.append([*line, milliseconds(ours), *(ratios.get(x, "-") for x in labels)])
    return table(["backend", "shape", "pass", "tokens", "ours, ms", *labels], lines, words=3)


def flash_blocks(source):
    """Milliseconds by tokens of a block and of a chunk, of flash.py."""
    rows = load(f"flash_{source}")["blocks"]
    sizes = [tuple(map(int, name.split(" x "))) for name in rows[0]["times"]]
    chunks = unique(chunk for _, chunk in sizes)
    lines = []
    for row in rows:
        for block in unique(block for block, _ in sizes):
            times = (row["times"][f"{block} x {chunk}"]["median"] for chunk in chunks)
            cells = (f"{time:.1f}" for time in times)
            lines.append([row["shape"], row["pass"], f"{block:,}", *cells])
    return table(["shape", "pass", "block", *(f"chunks of {x}" for x in chunks)], lines, words=2)
