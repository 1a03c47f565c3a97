"""Writes benchmarks/README.md and results/attention.png from the results.

    python benchmarks/report.py

Reads {attention,decode,model}_BACKEND.json and, from GPUs,
{attention,decode,model}_BACKEND_gpu*.json; those that are missing are left out.
Every figure on the page comes from them.
"""

import argparse
import json
import pathlib
import re
import statistics
import textwrap

from common import RESULTS

BACKENDS = ("tensorflow", "jax", "torch")
KINDS = ("attention", "decode", "model")
PASSES = ("forward", "forward + backward")
BOTH = PASSES[1]
CHUNK = "darkformer_pytorch_"
DEFAULT_CHUNK = 256
PLOTTED = "h64 m128"
PACKAGES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}

# Columns of peers, in this order. What is ours too (dark_remat, dark_identity) is none.
DEFAULT, BEST, ANY = "default chunk", "best chunk", "darkformer-pytorch"
PERFORMER, IDENTITY = "performer-pytorch", "performer-pytorch / `geometry=None`"
PEERS = (DEFAULT, BEST, ANY, PERFORMER, IDENTITY, "sdpa", "cudnn", "keras")
LONG = {
    DEFAULT: f"darkformer-pytorch, default chunk ({DEFAULT_CHUNK})",
    BEST: "darkformer-pytorch, best chunk",
    IDENTITY: "performer-pytorch against ours with `geometry=None`",
}

# Columns that hold words.
WORDS = ("what", "against", "backend", "benchmarks", "machine", "versions", "shape", "pass", "sees")

COLOURS = {  # Okabe and Ito's, told apart by the colour-blind
    "ours": ("#000000", "o"),
    "ours, `remat` switched": ("#777777", "o"),
    "darkformer-pytorch": ("#D55E00", "s"),
    "performer-pytorch": ("#CC79A7", "D"),
    "sdpa": ("#0072B2", "^"),
    "cudnn": ("#009E73", "^"),
    "keras": ("#E69F00", "v"),
}


# === Reading ===


def load(results, gpu=False):
    """Results by benchmark and label: `{"attention": {"torch": {...}}, ...}`."""
    found = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for backend in BACKENDS:
            pattern = f"{kind}_{backend}{'_gpu*' if gpu else ''}.json"
            for path in sorted(results.glob(pattern)):
                payload = json.loads(path.read_text())
                payload["backend"] = backend
                label = label_of(payload)
                if label in found[kind]:
                    label += f" ({path.stem})"
                found[kind][label] = payload
    return found


def label_of(payload):
    """The backend, and what is not as usual."""
    dtype = payload.get("dtype") or payload.get("settings", {}).get("dtype", "float32")
    parts = [payload["backend"]]
    if payload["backend"] == "torch" and payload.get("compiled"):
        parts.append("torch.compile")
    if dtype != "float32":
        parts.append(dtype)
    return ", ".join(parts)


def times_of(row):
    """Medians by way."""
    return {name: time["median"] for name, time in row["times"].items()}


def chunks_of(times):
    return {
        int(name.removeprefix(CHUNK)): time
        for name, time in times.items()
        if name.startswith(CHUNK)
    }


def ratios_of(row):
    """Their time over ours by peer, chunks condensed: `{peer: (ratio, remark)}`."""
    ours = "layer_dark" if row.get("layer") else "dark"
    times = times_of(row)
    if ours not in times:
        return {}
    ratios = {
        name: (times[name] / times[ours], "")
        for name in ("sdpa", "cudnn", "keras")
        if name in times
    }
    if "layer_keras" in times:
        ratios["keras"] = times["layer_keras"] / times[ours], ""
    if "performer_pytorch" in times:
        ratios[PERFORMER] = times["performer_pytorch"] / times[ours], ""
        if "dark_identity" in times:
            ratios[IDENTITY] = times["performer_pytorch"] / times["dark_identity"], ""
    chunks = chunks_of(times)
    if not row["causal"]:  # chunks play no part
        if chunks:
            ratios[ANY] = min(chunks.values()) / times[ours], ""
        return ratios
    if DEFAULT_CHUNK in chunks:
        ratios[DEFAULT] = chunks[DEFAULT_CHUNK] / times[ours], ""
    if chunks:
        best = min(chunks, key=chunks.get)
        ratios[BEST] = chunks[best] / times[ours], f" ({best})"
    return ratios


def peers_in(rows):
    """The peers of these rows, left out of some or not, in order."""
    names = {peer for row in rows for peer in ratios_of(row)}
    names |= {peer_of(name, row) for row in rows for name in row["skipped"]}
    return [peer for peer in PEERS if peer in names]


def peer_of(way, row):
    """The column of a way that was left out."""
    if way.startswith(CHUNK):
        return DEFAULT if row["causal"] else ANY
    return {"performer_pytorch": PERFORMER, "layer_keras": "keras"}.get(way, way)


def attention_rows(payload, causal=None, layer=False):
    return [
        row
        for row in payload["rows"]
        if bool(row.get("layer")) == layer and causal in (None, row["causal"])
    ]


# === Words ===


def table(columns, rows):
    """Markdown, words to the left and figures to the right."""
    rule = ["---" if column in WORDS else "---:" for column in columns]
    lines = [columns, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def wrapped(text):
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def digits(value):
    """Behind the point, so that about three count."""
    return 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3


def number(value):
    return f"{value:,.{digits(value)}f}"


def plain_ratio(value):
    if value < 0.995:
        return f"{value:.2f}"
    if value < 1:
        return f"{value:.3f}"  # not "1.00": it is below
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def ratio(value, remark=""):
    text = plain_ratio(value)
    return f"**{text}**{remark}" if value < 1 else text + remark


def milliseconds(time):
    places = digits(time["median"])
    return f"{time['median']:,.{places}f} ± {time['spread']:,.{places}f}"


def span(values, form=str):
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def named(label):
    backend, *rest = label.split(", ")
    return ", ".join([PACKAGES.get(backend, backend), *rest])


def unique(values):
    return list(dict.fromkeys(values))


# === In short ===


def comparisons(found):
    """All that is compared: dicts of what, backend, peer, context, place and ratio."""
    entries = []

    def add(label, what, peer, context, place, value, remark=""):
        entries.append(
            {
                "label": label,
                "what": what,
                "peer": peer,
                "context": context,
                "place": f"{place:,}{remark}",
                "ratio": value,
            }
        )

    for label, payload in found["attention"].items():
        for row in payload["rows"]:
            sees = "causal" if row["causal"] else "not causal"
            what = "layer, causal" if row.get("layer") else f"attention, {sees}"
            context = f"{row['shape']}, {row['pass']}"
            for peer, (value, remark) in ratios_of(row).items():
                remark = remark.replace("(", "(chunk ")
                add(label, what, LONG.get(peer, peer), context, row["length"], value, remark)
        for row in payload["memory"]:
            for way, mib in row["mib"].items():
                ours = row["mib"].get("dark")
                if way.startswith("dark_") or way == "dark" or not ours:
                    continue
                context = f"{row['shape']}, {row['pass']}"
                name = way_name(way)
                add(label, "peak memory of attention", name, context, row["length"], mib / ours)
    for label, payload in found["decode"].items():
        for row in payload["rows"]:
            for way, name in (("cache", "Keras on a cache"), ("best", "best on a cache")):
                if way in row:
                    value = row[way]["median"] / row["state"]["median"]
                    add(label, "step of decoding", name, decode_shape(row), row["tokens"], value)
    for label, payload in found["model"].items():
        for row in payload["rows"]:
            exact, dark = row["exact"], row["dark"]
            if "tokens_per_second" not in exact or "tokens_per_second" not in dark:
                continue
            what = "training of a model" if row["pass"] == "train" else "generation by a model"
            value = dark["tokens_per_second"] / exact["tokens_per_second"]
            add(label, what, "exact attention", "", row["length"], value)
            if dark["peak_mib"] > 0:
                value = exact["peak_mib"] / dark["peak_mib"]
                add(label, f"peak memory in {what}", "exact attention", "", row["length"], value)
    return entries


def grouped(entries, *keys):
    groups = {}
    for entry in entries:
        groups.setdefault(tuple(entry[key] for key in keys), []).append(entry)
    return groups


def in_short(found):
    """Worst, median and best ratio, and how many are not lost, a column for each backend."""
    entries = comparisons(found)
    labels = unique(entry["label"] for entry in entries)
    rows = []
    for (what, peer), members in grouped(entries, "what", "peer").items():
        by_label = grouped(members, "label")
        row = [what, peer]
        for label in labels:
            values = sorted(entry["ratio"] for entry in by_label.get((label,), ()))
            if not values:
                row.append("")
                continue
            three = (values[0], statistics.median(values), values[-1])
            wins = sum(value >= 1 for value in values)
            row.append(f"{' / '.join(ratio(v) for v in three)}, {wins} of {len(values)}")
        rows.append(row)
    order = unique(entry["what"] for entry in entries)
    rows.sort(key=lambda row: order.index(row[0]))
    return table(["what", "against", *(named(label) for label in labels)], rows)


def losses(found):
    """Everything below 1, worst first."""
    entries = [entry for entry in comparisons(found) if entry["ratio"] < 1]
    if not entries:
        return "Nowhere in these results."
    groups = list(grouped(entries, "label", "what", "peer").items())
    groups.sort(key=lambda group: min(entry["ratio"] for entry in group[1]))
    lines = []
    for (label, what, peer), members in groups:
        parts = list(grouped(members, "context").items())
        parts.sort(key=lambda part: min(entry["ratio"] for entry in part[1]))
        texts = []
        for (context,), places in parts:
            places = sorted(places, key=lambda entry: entry["ratio"])
            text = ", ".join(f"{plain_ratio(e['ratio'])} at {e['place']}" for e in places)
            texts.append(f"{context}: {text}" if context else text)
        lines.append(f"- {named(label)}, {what}, {peer}: {'; '.join(texts)} tokens")
    return "\n".join(lines)


# === Attention ===


def why_skipped(rows):
    """One sentence for the dashes of these rows, or an empty one."""
    cases = {}
    for row in rows:
        for way, reason in row["skipped"].items():
            if way == "dark_remat":  # not in these tables
                continue
            name = ANY if way.startswith(CHUNK) else way_name(way)
            kind = re.sub(r"\d+", "#", reason)
            cases.setdefault((name, kind), []).append((way, row["length"], reason))
    texts = []
    for (name, kind), found in sorted(cases.items()):
        if name == ANY:
            chunks = sorted({int(way.removeprefix(CHUNK)) for way, _, _ in found})
            name += f" (chunk {', '.join(map(str, chunks))})"
        figures = [int(figure) for *_, reason in found for figure in re.findall(r"\d+", reason)]
        reason = kind.replace("#", span(figures, lambda n: f"{n:,}")) if figures else kind
        if kind == "takes # s":
            reason += " a call, past the benchmark's patience"
        lengths = ", ".join(f"{n:,}" for n in sorted({length for _, length, _ in found}))
        texts.append(f"{name} at {lengths} tokens: {reason}")
    if not texts:
        return ""
    return "\n\n" + wrapped(f"Left out (`-`), in some or all rows of a length: {'; '.join(texts)}.")


def way_name(way):
    """A way of the results as the page calls it."""
    if way.startswith(CHUNK):
        return f"darkformer-pytorch, chunk {way.removeprefix(CHUNK)}"
    names = {
        "dark": "ours",
        "dark_remat": "ours, `remat` switched",
        "dark_identity": "ours, `geometry=None`",
        "performer_pytorch": PERFORMER,
        "layer_dark": "ours",
        "layer_keras": "keras",
    }
    return names.get(way, way)


def ratio_table(rows):
    peers = peers_in(rows)
    identity = any("dark_identity" in row["times"] for row in rows)
    lines = []
    for row in rows:
        ours = row["times"].get("layer_dark" if row.get("layer") else "dark")
        found = ratios_of(row)
        line = [row["shape"], f"{row['length']:,}", row["pass"]]
        line.append(milliseconds(ours) if ours else "-")
        if identity:
            time = row["times"].get("dark_identity")
            line.append(milliseconds(time) if time else "-")
        lines.append([*line, *(ratio(*found[peer]) if peer in found else "-" for peer in peers)])
    columns = ["shape", "tokens", "pass", "ours, ms"]
    columns += ["ours, `geometry=None`, ms"] * identity
    return table([*columns, *peers], lines) + why_skipped(rows)


def ratio_tables(found, level, **which):
    parts = []
    for label, payload in found["attention"].items():
        rows = attention_rows(payload, **which)
        if rows:
            parts.append(f"{level} {named(label)}\n\n{ratio_table(rows)}")
    return "\n\n".join(parts)


def floor_table(found):
    rows = [
        (label, row)
        for label, payload in found["attention"].items()
        for row in payload["rows"]
        if "floor_share" in row
    ]
    lengths = sorted({row["length"] for _, row in rows})
    shares = {}
    for label, row in rows:
        sees = "causal" if row["causal"] else "not causal"
        shares.setdefault((label, row["shape"], sees), {})[row["length"]] = row["floor_share"]
    lines = [
        [named(label), shape, sees]
        + [f"{share[length]:.0%}" if length in share else "" for length in lengths]
        for (label, shape, sees), share in shares.items()
    ]
    columns = ["backend", "shape", "sees", *(f"{length:,} tokens" for length in lengths)]
    rates = "; ".join(
        f"{named(label)} {payload['matmul_gflops']}"
        for label, payload in found["attention"].items()
    )
    return f"{table(columns, lines)}\n\nThe rate, in GFLOP/s, the best of the run's rows: {rates}."


def crossover_table(found):
    lines = {}
    for label, payload in found["attention"].items():
        for item in payload["crossover"]:
            key = named(label), item["shape"], item["against"]
            length = item["length"]
            if length is None:
                text = "-"
            else:
                text = re.sub(r"\d+", lambda match: f"{int(match[0]):,}", str(length))
            lines.setdefault(key, {})[item["pass"]] = text
    rows = [[*key, *(cells.get(name, "-") for name in PASSES)] for key, cells in lines.items()]
    return table(["backend", "shape", "against", *PASSES], rows)


# === Memory ===


def remat_names(backend):
    """The ways' names: JAX rematerialises by default."""
    default, other = ("on", "off") if backend == "jax" else ("off", "on")
    return f"ours, `remat` {default} (default)", f"ours, `remat` {other}"


def remat_ratios(payload):
    """Its time over that of the default, by shape and length."""
    return {
        (row["shape"], row["length"]): times["dark_remat"] / times["dark"]
        for row in attention_rows(payload, causal=True)
        if row["pass"] == BOTH
        for times in [times_of(row)]
        if "dark_remat" in times and "dark" in times
    }


def memory_table(payload):
    rows = payload["memory"]
    ours, other = remat_names(payload["backend"])
    peers = unique(way for row in rows for way in row["mib"] if way not in ("dark", "dark_remat"))
    lines = []
    for row in rows:
        mib = row["mib"]
        line = [row["shape"], f"{row['length']:,}", row["pass"]]
        line += [number(mib[way]) if way in mib else "-" for way in ("dark", "dark_remat")]
        for way in peers:
            text = number(mib[way]) if way in mib else "-"
            lost = way in mib and mib[way] < mib.get("dark", 0)
            line.append(f"**{text}**" if lost else text)
        lines.append(line)
    columns = ["shape", "tokens", "pass", ours, other, *(way_name(way) for way in peers)]
    text = table(columns, lines)
    times = remat_ratios(payload)
    if times:
        words = "off" if payload["backend"] == "jax" else "on"
        text += (
            f"\n\n`remat` {words} takes {span(list(times.values()), plain_ratio)} of the default's "
            f"time, causal, {BOTH}, over all {len(times)} shapes and lengths above."
        )
    return text


def memory_tables(found, level):
    return "\n\n".join(
        f"{level} {named(label)}\n\n{memory_table(payload)}"
        for label, payload in found["attention"].items()
        if payload["memory"]
    )


# === Decoding and whole models ===


def decode_shape(row):
    heads = f"{row['query_heads']}:{row['key_value_heads']}"
    return f"h{row['head_dim']} m{row['num_features']} {heads}"


def decode_table(found):
    lines = []
    for label, payload in found["decode"].items():
        for row in payload["rows"]:
            line = [named(label), decode_shape(row), f"{row['tokens']:,}"]
            for way in ("state", "cache", "best"):
                line.append(milliseconds(row[way]) if way in row else "-")
            for way in ("cache", "best"):
                known = way in row
                line.append(ratio(row[way]["median"] / row["state"]["median"]) if known else "-")
            lines.append(line)
    columns = ["backend", "shape", "tokens before", "state, ms", "Keras on a cache, ms"]
    return table([*columns, "best on a cache, ms", "Keras / state", "best / state"], lines)


def model_table(found, kind):
    lines, notes = [], []
    for label, payload in found["model"].items():
        for row in payload["rows"]:
            if row["pass"] != kind:
                continue
            line = [named(label), f"{row['length']:,}"]
            for variant in ("exact", "dark"):
                result = row[variant]
                if "skipped" in result:
                    notes.append(f"{named(label)} at {row['length']:,}: {result['skipped']}")
                line.append(rate(result))
            exact, dark = (row[v].get("tokens_per_second") for v in ("exact", "dark"))
            line.append(ratio(dark / exact) if exact and dark else "-")
            if kind == "generate":
                for variant in ("exact", "dark"):
                    each = row[variant].get("milliseconds_each_further")
                    line.append("-" if each is None else number(each))
            memory = [row[variant].get("peak_mib") for variant in ("exact", "dark")]
            texts = ["-" if mib is None else f"{mib:,.0f}" for mib in memory]
            if None not in memory and memory[0] < memory[1]:
                texts[0] = f"**{texts[0]}**"
            lines.append(line + texts)
    columns = ["backend", "tokens", "exact, tokens/s", "converted, tokens/s", "converted / exact"]
    if kind == "generate":
        columns += ["exact, ms per further token", "converted, ms per further token"]
    text = table([*columns, "exact, MiB", "converted, MiB"], lines)
    return text + f"\n\n`-`: left out. {'; '.join(notes)}." * bool(notes)


def rate(result):
    if "tokens_per_second" not in result:
        return "-"
    spread = result["milliseconds"]["spread"] / result["milliseconds"]["median"]
    return f"{result['tokens_per_second']:,.0f} ± {spread:.0%}"


def model_words(found):
    """What the model is; once, if all are alike."""
    texts = {}
    for label, payload in found["model"].items():
        s = payload["settings"]
        text = (
            f"{s['layers']} layers, {s['query_heads']} query heads of {s['head_dim']} over "
            f"{s['key_value_heads']} of keys and values, hidden {s['hidden_dim']}, intermediate "
            f"{s['intermediate_dim']:,}, vocabulary {s['vocabulary']:,}, {s['num_features']} "
            f"features, {s['generate']} tokens written, {s['repeats']} repeats"
        )
        texts.setdefault(text, []).append(named(label))
    if len(texts) == 1:
        return f"{next(iter(texts))}."
    return "; ".join(f"{', '.join(labels)}: {text}" for text, labels in texts.items()) + "."


# === What was measured ===


def measured(found):
    """A table of machines and versions, a row for what was run alike."""
    groups = {}
    for kind in KINDS:
        for label, payload in found[kind].items():
            machine, versions = payload["machine"], payload["versions"]
            device = machine.get("accelerator")
            if device is None:
                uses = f"{machine['threads']} of {machine['cores']} cores"
                device = f"{machine['processor']}, {uses}"
            key = named(label), device
            group = groups.setdefault(key, {"kinds": [], "versions": {}})
            group["kinds"].append(kind)
            for package, version in versions.items():
                group["versions"].setdefault(package, []).append(version)
    rows = []
    for (label, device), group in groups.items():
        versions = [f"{p} {' and '.join(unique(v))}" for p, v in group["versions"].items()]
        rows.append([label, ", ".join(group["kinds"]), device, ", ".join(versions)])
    columns = ["backend", "benchmarks", "machine", "versions"]
    return table(columns, rows)


def shapes_words(found):
    payload = next(iter(found["attention"].values()))
    texts = []
    for label, shape in payload["shapes"].items():
        heads = f"{shape['heads']} heads"
        if shape["kv_heads"] != shape["heads"]:
            heads = f"{shape['heads']} query heads for {shape['kv_heads']} key/value head"
        texts.append(
            f"`{label}` is {heads} of {shape['head_dim']}, {shape['num_features']} features"
        )
    return "; ".join(texts)


def method_words(found):
    rows = [row for payload in found["attention"].values() for row in payload["rows"]]
    payloads = [payload for kind in KINDS for payload in found[kind].values()]
    if any("accelerator" in payload["machine"] for payload in payloads):
        how = "Times are wall-clock, with the GPU waited for"
    else:
        how = "Times are processor time"
        if all(payload["machine"]["threads"] == 1 for payload in payloads):
            how = (
                "Every process is pinned to one core and computes with one thread; how the ways "
                "spread over more is not measured. " + how
            )
    repeats = span([row["repeats"] for row in rows]) + " " if rows else ""
    words = f"{how}: the median of {repeats}rounds in which all ways take turns, ± the "
    words += "interquartile range. TensorFlow and JAX run compiled by XLA."
    if any(payload["backend"] == "torch" for payload in payloads):
        words += " PyTorch runs eagerly, as Keras runs it, unless the tables say `torch.compile`."
    words += (
        " Inputs are random, one sequence a batch. Peak memory is what a call adds to its inputs, "
        "or for a whole model to the model; each figure comes from a process of its own."
    )
    remarks = unique(payload["remark"] for payload in payloads if "remark" in payload)
    return wrapped(" ".join([words, *remarks]))


def ways_words(found):
    """A list of who is compared, only those that are."""
    rows = [row for payload in found["attention"].values() for row in payload["rows"]]
    ways = {name for row in rows for name in (*row["times"], *row["skipped"])}
    ways = {"darkformer_pytorch" if way.startswith(CHUNK) else way for way in ways}
    chunks = {chunk for row in rows for chunk in chunks_of(row["times"])}
    tried = ", ".join(str(chunk) for chunk in sorted(chunks))
    words = {
        "dark": "ours: `ops.dark_attention`, a geometry M for each key/value head, trained.",
        "dark_identity": "ours, `geometry=None`: the same with M = I, which is Performer.",
        "darkformer_pytorch": "darkformer-pytorch: another implementation of DARKFormer, its "
        f"geometry trained too. Its causal way has a chunk size; tried: {tried}; default "
        f'{DEFAULT_CHUNK}. "Best chunk" is the fastest in each row, in parentheses: what tuning '
        "it for every length would get you.",
        "performer_pytorch": "performer-pytorch: its `FastAttention`, M = I, nothing trained. Its "
        "causal way is the one in plain PyTorch unless its CUDA extension is installed.",
        "sdpa": "sdpa: PyTorch's `scaled_dot_product_attention`, exact.",
        "cudnn": 'cudnn: `jax.nn.dot_product_attention(implementation="cudnn")`, exact.',
        "keras": "keras: `keras.ops.dot_product_attention`, exact. As a layer, "
        "`MultiHeadAttention`, or `GroupQueryAttention` where query heads share keys.",
    }
    texts = [wrapped(f"- {text}") for way, text in words.items() if way in ways]
    return "\n".join(text.replace("\n", "\n  ") for text in texts)


# === The plot ===


def curves(payload):
    """Points of both panels: `[{name: [(length, value), ...]}, ...]`."""
    time, memory = {}, {}
    for row in attention_rows(payload, causal=True):
        if (row["shape"], row["pass"]) != (PLOTTED, BOTH):
            continue
        times = times_of(row)
        values = {
            "ours": times.get("dark"),
            "performer-pytorch": times.get("performer_pytorch"),
            "darkformer-pytorch": min(chunks_of(times).values(), default=None),
            **{name: times.get(name) for name in ("sdpa", "cudnn", "keras")},
        }
        for name, value in values.items():
            if value:
                time.setdefault(name, []).append((row["length"], value))
    for row in payload["memory"]:
        if (row["shape"], row["pass"]) != (PLOTTED, BOTH):
            continue
        for way, mib in row["mib"].items():
            name = "darkformer-pytorch" if way.startswith(CHUNK) else way_name(way)
            if mib > 0:
                memory.setdefault(name, []).append((row["length"], mib))
    return time, memory


def plot(found, path):
    """Time and peak memory against length, a row for each backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    payloads = found["attention"]
    figure, axes = plt.subplots(
        len(payloads), 2, figsize=(10, 3.4 * len(payloads) + 0.8), squeeze=False
    )
    handles = {}
    for row, (label, payload) in zip(axes, payloads.items(), strict=True):
        for axis, lines, unit in zip(
            row, curves(payload), ("time, ms", "peak memory, MiB"), strict=True
        ):
            for name in COLOURS:
                if name not in lines:
                    continue
                points = sorted(lines[name])
                colour, marker = COLOURS[name]
                style = "--" if "remat" in name else "-"
                width = 2.4 if name == "ours" else 1.5
                (handles[name],) = axis.plot(
                    *zip(*points, strict=True),
                    color=colour, marker=marker, ls=style, lw=width, ms=5,
                )  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
            axis.xaxis.set_minor_locator(NullLocator())
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            axis.set(title=f"{named(label)}: {unit.split(',')[0]}", xlabel="tokens", ylabel=unit)
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
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"wrote {path.name}")


# === The page ===

HEAD = """\
# Benchmarks

What this package's attention costs in time and memory, beside what you would use instead. Random
features estimate softmax attention; how well is not measured here (see the
[README](../README.md)): a win on this page is a win in time or memory only. `report.py` writes the
page from the JSON files in [{results}]({results}), figures and all."""

RUN = """\
## Run it

```bash
bash benchmarks/run.sh          # sets up .venv; TensorFlow, JAX and PyTorch; rewrites this page
bash benchmarks/run.sh torch    # one of them; the others' results stay
```

Linux only. Leave the machine alone meanwhile: what else runs takes caches and memory bandwidth.

Not on this page, each a script of its own: `quality.py`, what conversion loses and what brings it
back ([its page](results/quality.md)); `compatibility.py`, what works with which KerasHub family
([its table](../docs/compatibility.md)); `conversion_memory.py`; `sequence_parallel.py`, what
devices send each other."""

READ = """\
## How to read it

A ratio is their time / ours: above 1 we are faster, 2 is twice as fast. Ratios below 1, where we
lose, are set in **bold**. For memory it is their peak / ours, and bold marks where they need less.
A ratio within a few percent of 1 is a draw: compare the ± beside our time. "Forward + backward" is
what a training step pays, "forward" is inference."""

IN_SHORT = """\
Worst / median / best ratio over all shapes, lengths and passes below, and in how many of them we
are not behind. The ratio is theirs / ours: above 1 we are faster, or need less; **bold** is lost;
empty is not measured. Length decides most of it, so look yours up. Below it is told what sdpa,
keras and the others are."""

FLOOR = """\
The time that the matrix products of a forward pass alone would take at the rate this machine
reaches for two matrices of 1,024 x 1,024, over our time: at 100 % nothing is left to gain short of
fewer products. It counts no exponentials, sums or memory traffic, and smaller matrices multiply
more slowly, so 100 % is not to be reached."""

CROSSOVER = """\
The number of tokens from which on ours is faster than exact attention, causal, interpolated
between the lengths measured. "Below" the shortest: faster everywhere; "above" the longest that
exact attention was timed at: nowhere."""

LAYERS = """\
`DarkAttention` against Keras' own layer, projections of queries, keys, values and outputs included,
causal. Ratios are smaller than those of attention alone, since the projections cost both alike."""

MEMORY = """\
Peak memory of the causal operation, MiB, above its inputs. `remat` computes the features again in
the backward pass in place of keeping them. `-`: not measured; exact attention is left out where
its scores alone would be too large or it would take too long."""

DECODE = """\
Time of the attention of one new token: from a state of constant size, and from a key/value cache
of so many tokens before it. "Keras" is `keras.ops.dot_product_attention` over the cache, "best" the
fastest exact attention we know of on that backend over a cache laid out to suit it. Ratios are
theirs over the state's. Shapes are head size, features, query heads : key/value heads."""

MODEL = """\
A KerasHub Gemma with random weights, exact and converted, one sequence at a time: {words} Tokens
per second are those of a whole call. "Converted / exact" is the ratio of the rates: above 1
converted is faster. MiB: peak memory above that of the loaded model."""

GPU = """\
```bash
source .venv/bin/activate    # of run.sh, with builds of PyTorch and JAX that know the GPU
KERAS_BACKEND=torch python benchmarks/attention.py --dtype bfloat16
KERAS_BACKEND=torch python benchmarks/attention.py --dtype bfloat16 --compile
KERAS_BACKEND=jax python benchmarks/attention.py --dtype bfloat16
python benchmarks/report.py  # reads every attention_BACKEND_gpu*.json
```

There sdpa is flash attention, and on JAX the peer is
`jax.nn.dot_product_attention(implementation="cudnn")`. `decode.py` takes the same options,
`model.py` takes `--dtype mixed_bfloat16`."""


def sections(found, level, image):
    """All that is told of some results, under headings of this level."""
    below = level + "#"
    parts = [f"{level} What was measured", measured(found), method_words(found)]
    if found["attention"]:
        parts += [
            wrapped(f"Shapes: {shapes_words(found)}. Compared are:"),
            ways_words(found),
            f"{level} Attention, causal",
            wrapped(
                f"Shape {PLOTTED}, {BOTH}. Of darkformer-pytorch: the fastest chunk on the left, "
                "the default one on the right. On `remat`, see [peak memory](#peak-memory)."
            ),
            f"![Time and peak memory against length]({image})",
            ratio_tables(found, below, causal=True),
            f"{level} Attention, not causal",
            ratio_tables(found, below, causal=False),
            f"{level} Share of the matmul floor",
            FLOOR,
            floor_table(found),
            f"{level} Crossover with exact attention",
            CROSSOVER,
            crossover_table(found),
            f"{level} Layers",
            LAYERS,
            ratio_tables(found, below, layer=True),
            f"{level} Peak memory",
            MEMORY,
            memory_tables(found, below),
        ]
    if found["decode"]:
        parts += [f"{level} A step of decoding", DECODE, decode_table(found)]
    if found["model"]:
        parts += [
            f"{level} A whole model",
            wrapped(MODEL.format(words=model_words(found))),
            f"{below} Training",
            model_table(found, "train"),
            f"{below} Generation",
            "Of the whole call, reading the prompt included; tokens are those of the prompt.",
            model_table(found, "generate"),
        ]
    parts += [
        f"{level} Where it loses",
        "Every ratio below 1 on this page, worst first: their time, or memory, over ours.",
        losses(found),
    ]
    return parts


def page(results, found, found_gpu):
    parts = [HEAD.format(results=results.name)]
    if any(found.values()):
        parts += ["## In short", in_short(found), IN_SHORT, RUN, READ]
        parts += sections(found, "##", f"{results.name}/attention.png")
    else:
        parts += ["No results yet.", RUN, READ]
    parts.append("## GPU")
    if any(found_gpu.values()):
        parts += [in_short(found_gpu), "To measure again:", GPU]
        parts += sections(found_gpu, "###", f"{results.name}/attention_gpu.png")
    else:
        parts += ["Not measured: nothing above says how it is on a GPU. To measure:", GPU]
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the JSON")
    results = parser.parse_args().results.resolve()
    found, found_gpu = load(results), load(results, gpu=True)
    for one, name in ((found, "attention.png"), (found_gpu, "attention_gpu.png")):
        if one["attention"]:
            plot(one, results / name)
    (results.parent / "README.md").write_text(page(results, found, found_gpu))
    print(f"wrote {results.parent.name}/README.md")


if __name__ == "__main__":
    main()
