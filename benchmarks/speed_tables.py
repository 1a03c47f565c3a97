"""The tables made of what attention.py, decode.py and model.py measured.

Each function takes the words behind its name in a page's mark, such as the
`torch` and `causal` of `attention torch causal`, and returns Markdown.
"""

import re
import statistics

import comparisons as compare
from common import PASSES
from comparisons import BOTH, load
from formats import milliseconds, number, plain_ratio, rate, ratio, span, table, unique


def in_short(*sources):
    """Worst, median and best ratio, and how many are not lost, a column for each backend."""
    entries = list(compare.comparisons(sources))
    labels = unique(entry["label"] for entry in entries)
    rows = []
    for (what, peer), members in compare.grouped(entries, "what", "peer").items():
        by_label = compare.grouped(members, "label")
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
    return table(["what", "against", *labels], rows, words=2)


def losses(*sources):
    """Every ratio below 1, worst first."""
    entries = [entry for entry in compare.comparisons(sources) if entry["ratio"] < 1]

    def worst(group):
        return min(entry["ratio"] for entry in group[1])

    rows = []
    for key, members in sorted(
        compare.grouped(entries, "label", "what", "peer").items(), key=worst
    ):
        for (context,), places in sorted(compare.grouped(members, "context").items(), key=worst):
            places = sorted(places, key=lambda entry: entry["ratio"])
            text = ", ".join(f"{plain_ratio(e['ratio'])} at {e['place']}" for e in places)
            rows.append([*key, context, text])
    columns = ["backend", "what", "against", "shape and pass", "theirs / ours, at tokens"]
    return table(columns, rows, words=5)


def measured(*sources):
    """Machines and versions, a row for what was run alike."""
    groups = {}
    for kind in ("attention", "decode", "model"):
        for payload in (load(kind, source) for source in sources):
            machine = payload["machine"]
            uses = f"{machine['threads']} of {machine['cores']} cores"
            device = machine.get("accelerator") or f"{machine['processor']}, {uses}"
            group = groups.setdefault((payload["label"], device), {"kinds": [], "versions": {}})
            group["kinds"].append(kind)
            for package, version in payload["versions"].items():
                group["versions"].setdefault(package, []).append(version)
    rows = []
    for (label, device), group in groups.items():
        versions = [f"{p} {' and '.join(unique(v))}" for p, v in group["versions"].items()]
        rows.append([label, ", ".join(group["kinds"]), device, ", ".join(versions)])
    return table(["backend", "benchmarks", "machine", "versions"], rows, words=4)


def shapes(source):
    rows = [
        [f"`{name}`", s["heads"], s["kv_heads"], s["head_dim"], s["num_features"]]
        for name, s in load("attention", source)["shapes"].items()
    ]
    return table(["shape", "query heads", "key/value heads", "head size", "features"], rows)


# === Attention ===


def peer_of(way, row):
    """The column of a way that was left out."""
    if way.startswith(compare.CHUNK):
        return compare.DEFAULT if row["causal"] else compare.ANY
    return compare.way_name(way)


def attention(source, which):
    """Our times, and theirs over ours."""
    rows = compare.rows_of(load("attention", source), which)
    names = {peer for row in rows for peer in compare.ratios_of(row)}
    names |= {peer_of(way, row) for row in rows for way in row["skipped"]}
    peers = [peer for peer in compare.PEERS if peer in names]
    ours = ["layer_dark" if which == "layer" else "dark"]
    ours += ["dark_identity"] * any("dark_identity" in row["times"] for row in rows)
    lines = []
    for row in rows:
        found = compare.ratios_of(row)
        line = [row["shape"], f"{row['length']:,}", row["pass"]]
        line += [milliseconds(row["times"][w]) if w in row["times"] else "-" for w in ours]
        lines.append([*line, *(ratio(*found[peer]) if peer in found else "-" for peer in peers)])
    columns = ["shape", "tokens", "pass", *(f"{compare.way_name(way)}, ms" for way in ours)]
    return table([*columns, *peers], lines, words=3)


def left_out(*sources):
    """What the `-` in the tables of attention stand for."""
    cases = {}
    for payload in (load("attention", source) for source in sources):
        for row in payload["rows"]:
            for way, reason in row["skipped"].items():
                chunk = way.removeprefix(compare.CHUNK)
                name = compare.ANY if chunk != way else compare.way_name(way)
                what = compare.kind_of(row).replace("-", " ")
                key = payload["label"], what, name, re.sub(r"\d+", "#", reason)
                cases.setdefault(key, []).append((row["length"], reason, chunk))
    rows = []
    for (label, what, name, kind), found in cases.items():
        if name == compare.ANY:
            name += f" (chunk {', '.join(unique(chunk for *_, chunk in found))})"
        figures = [int(figure) for _, reason, _ in found for figure in re.findall(r"\d+", reason)]
        reason = kind.replace("#", span(figures, lambda n: f"{n:,}")) if figures else kind
        lengths = ", ".join(f"{n:,}" for n in sorted({length for length, *_ in found}))
        rows.append([label, what, name, lengths, reason])
    return table(["backend", "table", "way", "tokens", "why"], rows, words=5)


def floor(*sources):
    """The part of our time that matrix products alone would take."""
    shares = {}
    for payload in (load("attention", source) for source in sources):
        for row in payload["rows"]:
            if "floor_share" in row:
                key = payload["label"], row["shape"], compare.kind_of(row).replace("-", " ")
                shares.setdefault(key, {})[row["length"]] = row["floor_share"]
    lengths = sorted({length for share in shares.values() for length in share})
    lines = [
        [*key, *(f"{share[n]:.0%}" if n in share else "" for n in lengths)]
        for key, share in shares.items()
    ]
    columns = ["backend", "shape", "sees", *(f"{n:,} tokens" for n in lengths)]
    return table(columns, lines, words=3)


def matmul_rate(*sources):
    payloads = [load("attention", source) for source in sources]
    rows = [[payload["label"], payload["matmul_gflops"]] for payload in payloads]
    return table(["backend", "GFLOP/s"], rows)


def crossover(*sources):
    lines = {}
    for payload in (load("attention", source) for source in sources):
        for item in payload["crossover"]:
            length = "-" if item["length"] is None else str(item["length"])
            text = re.sub(r"\d+", lambda match: f"{int(match[0]):,}", length)
            key = payload["label"], item["shape"], item["against"]
            lines.setdefault(key, {})[item["pass"]] = text
    rows = [[*key, *(cells.get(name, "-") for name in PASSES)] for key, cells in lines.items()]
    return table(["backend", "shape", "against", *PASSES], rows, words=3)


# === Memory ===


def remat_names(payload):
    """What the ways `dark` and `dark_remat` are: JAX computes features again by default."""
    return ("on", "off") if payload["backend"] == "jax" else ("off", "on")


def memory(source):
    payload = load("attention", source)
    default, other = remat_names(payload)
    peers = unique(way for row in payload["memory"] for way in row["mib"])
    peers = [way for way in peers if way not in ("dark", "dark_remat")]
    lines = []
    for row in payload["memory"]:
        mib = row["mib"]
        line = [row["shape"], f"{row['length']:,}", row["pass"]]
        line += [number(mib[way]) if way in mib else "-" for way in ("dark", "dark_remat")]
        for way in peers:
            text = number(mib[way]) if way in mib else "-"
            lost = way in mib and mib[way] < mib.get("dark", 0)
            line.append(f"**{text}**" if lost else text)
        lines.append(line)
    columns = ["shape", "tokens", "pass"]
    columns += [f"ours, `remat` {default} (default)", f"ours, `remat` {other}"]
    return table([*columns, *map(compare.way_name, peers)], lines, words=3)


def remat(*sources):
    """The time of causal training with `remat` switched over that of the default."""
    lines = []
    for payload in (load("attention", source) for source in sources):
        rows = [row for row in compare.rows_of(payload, "causal") if row["pass"] == BOTH]
        times = [compare.medians(row) for row in rows]
        found = [t["dark_remat"] / t["dark"] for t in times if "dark_remat" in t and "dark" in t]
        cells = [plain_ratio(min(found)), plain_ratio(max(found)), len(found)]
        lines.append([payload["label"], f"`remat` {remat_names(payload)[1]}", *cells])
    return table(["backend", "switched to", "least", "most", "rows"], lines, words=2)


# === Decoding and whole models ===


def decode(*sources):
    lines = []
    for payload in (load("decode", source) for source in sources):
        for row in payload["rows"]:
            line = [payload["label"], compare.decode_shape(row), f"{row['tokens']:,}"]
            for way in ("state", "cache", "best"):
                line.append(milliseconds(row[way]) if way in row else "-")
            for way in ("cache", "best"):
                known = way in row
                line.append(ratio(row[way]["median"] / row["state"]["median"]) if known else "-")
            lines.append(line)
    columns = ["backend", "shape", "tokens before", "state, ms", "Keras on a cache, ms"]
    columns += ["best on a cache, ms", "Keras / state", "best / state"]
    return table(columns, lines, words=2)


SIZES = {
    "layers": "layers",
    "query_heads": "query heads",
    "key_value_heads": "key/value heads",
    "head_dim": "head size",
    "hidden_dim": "hidden",
    "intermediate_dim": "intermediate",
    "vocabulary": "vocabulary",
    "num_features": "features",
    "generate": "tokens written",
    "repeats": "rounds",
}


def model_sizes(*sources):
    payloads = [load("model", source) for source in sources]
    rows = [[p["label"], *(f"{p['settings'][name]:,}" for name in SIZES)] for p in payloads]
    return table(["backend", *SIZES.values()], rows)


def model(kind, *sources):
    """Exact against converted: `kind` is train or generate."""
    lines = []
    for payload in (load("model", source) for source in sources):
        for row in payload["rows"]:
            if row["pass"] != kind:
                continue
            both = row["exact"], row["dark"]
            line = [payload["label"], f"{row['length']:,}", *map(rate, both)]
            exact, dark = (result.get("tokens_per_second") for result in both)
            line.append(ratio(dark / exact) if exact and dark else "-")
            if kind == "generate":
                each = [result.get("milliseconds_each_further") for result in both]
                line += ["-" if value is None else number(value) for value in each]
            memory = [result.get("peak_mib") for result in both]
            texts = ["-" if mib is None else f"{mib:,.0f}" for mib in memory]
            if None not in memory and memory[0] < memory[1]:
                texts[0] = f"**{texts[0]}**"
            lines.append([*line, *texts, "; ".join(r["skipped"] for r in both if "skipped" in r)])
    columns = ["backend", "tokens", "exact, tokens/s", "converted, tokens/s", "converted / exact"]
    if kind == "generate":
        columns += ["exact, ms per further token", "converted, ms per further token"]
    columns += ["exact, MiB", "converted, MiB", "left out"]
    if not any(line[-1] for line in lines):
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    return table(columns, lines)


# === docs/how_to.md ===


def torch_compile():
    """Eager time over compiled time, and the seconds that compiling takes."""
    lines = []
    for row in load("torch_compile", "torch")["rows"]:
        times = row["milliseconds"]
        eager, compiled = (times[name]["median"] for name in ("eager", "compiled"))
        kind = "causal" if row["causal"] else "not causal"
        length = "any" if row["any_length"] else "one"
        line = [f"{row['length']:,}", f"{kind}, {row['pass']}", length]
        line += [number(eager), number(compiled), ratio(eager / compiled)]
        lines.append([*line, f"{row['seconds_to_compile']:.0f}"])
    columns = ["tokens", "pass", "compiled for", "eager, ms", "compiled, ms", "eager / compiled"]
    return table([*columns, "compiling, s"], lines, words=3)


# === docs/results.md ===


def speed(*rows):
    """Their time over ours by length, forward / forward + backward, causal.

    Each word is SOURCE:PEER, such as `torch:sdpa`; peers as in `SHORT_PEERS`.
    """
    lengths, lines = (512, 1024, 2048, 4096, 8192), []
    for word in rows:
        source, _, peer = word.partition(":")
        payload = load("attention", source)
        found = {
            (row["length"], row["pass"]): compare.ratios_of(row)
            for row in compare.rows_of(payload, "causal")
            if row["shape"] == "h64 m128"
        }
        name, column = SHORT_PEERS[peer]
        pairs = [[found[n, p].get(column) for p in PASSES] for n in lengths]
        texts = [" / ".join("-" if x is None else ratio(x[0]) for x in pair) for pair in pairs]
        version = payload["versions"].get(name, "")
        name = f"{name} {version}" if version else name
        chunk = {compare.DEFAULT: ", default chunk", compare.BEST: ", its best chunk"}
        lines.append([f"{payload['label']}: {name}{chunk.get(column, '')}", *texts])
    columns = ["4 heads, h = 64, m = 128", *(f"{n:,}" for n in lengths)]
    return table(columns, lines, words=len(columns))


SHORT_PEERS = {
    "sdpa": ("`scaled_dot_product_attention`, exact", "sdpa"),
    "darkformer-default": ("darkformer-pytorch", compare.DEFAULT),
    "darkformer-best": ("darkformer-pytorch", compare.BEST),
    "performer": ("performer-pytorch", compare.PERFORMER),
    "keras": ("Keras' exact attention", "keras"),
}
