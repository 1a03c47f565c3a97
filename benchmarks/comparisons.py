"""Results of attention.py, decode.py and model.py as ratios: their time or memory over ours."""

import functools

import formats
from common import PASSES
from formats import PACKAGES

BOTH = PASSES[1]
CHUNK = "darkformer_pytorch_"
DEFAULT_CHUNK = 256

# Columns of peers, in this order.
DEFAULT, BEST, ANY = "default chunk", "best chunk", "darkformer-pytorch"
PERFORMER, IDENTITY = "performer-pytorch", "performer-pytorch / `geometry=None`"
PEERS = (DEFAULT, BEST, ANY, PERFORMER, IDENTITY, "sdpa", "cudnn", "keras")
LONG = {
    DEFAULT: f"darkformer-pytorch, default chunk ({DEFAULT_CHUNK})",
    BEST: "darkformer-pytorch, best chunk",
    IDENTITY: "performer-pytorch against ours with `geometry=None`",
}
WAYS = {
    "dark": "ours",
    "dark_remat": "ours, `remat` switched",
    "dark_identity": "ours, `geometry=None`",
    "performer_pytorch": PERFORMER,
    "layer_dark": "ours",
    "layer_keras": "keras",
}


@functools.cache
def load(kind, source):
    """results/KIND_SOURCE.json, such as attention_torch_gpu, with its backend and a label."""
    payload = {**formats.load(f"{kind}_{source}"), "backend": source.split("_")[0]}
    return payload | {"label": label_of(payload)}


def label_of(payload):
    """The backend, and what is not as usual."""
    parts = [PACKAGES[payload["backend"]]]
    if "accelerator" in payload["machine"]:
        parts.append(payload["machine"]["accelerator"])
    if payload["backend"] == "torch" and payload.get("compiled"):
        parts.append("torch.compile")
    dtype = payload.get("dtype") or payload.get("settings", {}).get("dtype", "float32")
    if dtype != "float32":
        parts.append(dtype)
    return ", ".join(parts)


def medians(row):
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
    times = medians(row)
    if ours not in times:
        return {}
    ratios = {
        WAYS.get(name, name): (times[name] / times[ours], "")
        for name in ("sdpa", "cudnn", "keras", "layer_keras", "performer_pytorch")
        if name in times
    }
    if {"performer_pytorch", "dark_identity"} <= times.keys():
        ratios[IDENTITY] = times["performer_pytorch"] / times["dark_identity"], ""
    chunks = chunks_of(times)
    if not chunks:
        return ratios
    best = min(chunks, key=chunks.get)
    if not row["causal"]:  # chunks play no part
        return ratios | {ANY: (chunks[best] / times[ours], "")}
    if DEFAULT_CHUNK in chunks:
        ratios[DEFAULT] = chunks[DEFAULT_CHUNK] / times[ours], ""
    return ratios | {BEST: (chunks[best] / times[ours], f" ({best})")}


def rows_of(payload, which):
    """Rows of attention.py: `"causal"`, `"not-causal"` or `"layer"`."""
    if which not in ("causal", "not-causal", "layer"):
        raise ValueError(f'{which!r} is none of "causal", "not-causal", "layer"')
    return [row for row in payload["rows"] if which == kind_of(row)]


def kind_of(row):
    return "layer" if row.get("layer") else "causal" if row["causal"] else "not-causal"


def way_name(way):
    """A way of the results as the pages call it."""
    if way.startswith(CHUNK):
        return f"darkformer-pytorch, chunk {way.removeprefix(CHUNK)}"
    return WAYS.get(way, way)


def decode_shape(row):
    heads = f"{row['query_heads']}:{row['key_value_heads']}"
    return f"h{row['head_dim']} m{row['num_features']} {heads}"


def comparisons(sources):
    """All that is compared: dicts of label, what, peer, context, place and ratio."""
    keys = ("label", "what", "peer", "context", "place", "ratio")
    for compare, kind in ((of_attention, "attention"), (of_decode, "decode"), (of_model, "model")):
        for source in sources:
            payload = load(kind, source)
            for values in compare(payload):
                yield dict(zip(keys, (payload["label"], *values), strict=True))


def of_attention(payload):
    names = {"causal": "attention, causal", "not-causal": "attention, not causal"}
    for row in payload["rows"]:
        what = names.get(kind_of(row), "layer, causal")
        context = f"{row['shape']}, {row['pass']}"
        for peer, (value, remark) in ratios_of(row).items():
            place = f"{row['length']:,}{remark.replace('(', '(chunk ')}"
            yield what, LONG.get(peer, peer), context, place, value
    for row in payload["memory"]:
        context = f"{row['shape']}, {row['pass']}"
        for way, mib in row["mib"].items():
            ours = row["mib"].get("dark")
            if ours and way not in ("dark", "dark_remat"):
                place = f"{row['length']:,}"
                yield "peak memory of attention", way_name(way), context, place, mib / ours


def of_decode(payload):
    for row in payload["rows"]:
        for way, name in (("cache", "Keras on a cache"), ("best", "best on a cache")):
            if way in row:
                value = row[way]["median"] / row["state"]["median"]
                yield "step of decoding", name, decode_shape(row), f"{row['tokens']:,}", value


def of_model(payload):
    for row in payload["rows"]:
        exact, dark, place = row["exact"], row["dark"], f"{row['length']:,}"
        if "tokens_per_second" not in exact or "tokens_per_second" not in dark:
            continue
        what = "training of a model" if row["pass"] == "train" else "generation by a model"
        value = dark["tokens_per_second"] / exact["tokens_per_second"]
        yield what, "exact attention", "", place, value
        if dark["peak_mib"] > 0:
            value = exact["peak_mib"] / dark["peak_mib"]
            yield f"peak memory in {what}", "exact attention", "", place, value


def grouped(entries, *keys):
    """Lists of entries by the values of some keys, in the order they come."""
    groups = {}
    for entry in entries:
        groups.setdefault(tuple(entry[key] for key in keys), []).append(entry)
    return groups
