"""What is left of a model when its softmax attention becomes features, and what brings it back.

    python benchmarks/quality.py --text book.txt            # everything, hours
    python benchmarks/quality.py --text book.txt --arms performer spectral --seeds 0

Trains a small Gemma (`teacher.py`) on a text once, converts every layer of it
in many ways (the arms) and measures, on text held out from all training, the
loss of the next token and the loss where a random segment is repeated. With
R = (Performer's loss - an arm's) / (Performer's loss - softmax's), the share of
what conversion lost that the arm wins back.

Rates of trained arms are chosen by seed 0's loss on the validation part, the
same number of trials for each. Seeds are of draws and of training batches; the
teacher is one. Rows are written to results/quality.json as they come, and not
made again; results/quality.md shows them.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import keras_hub
import numpy as np
import teacher
from common import RESULTS, environment

import keras_darkformer as kd
from keras_darkformer.training.data import dark_layers
from keras_darkformer.training.distil import _only_trainable

LENGTH, BATCH = teacher.LENGTH, 8
CALIBRATION_WINDOWS, VALIDATION_WINDOWS = 32, 16
TRANSFER_STEPS, DISTIL_STEPS = 100, 300
TRANSFER_RATES, FINETUNE_RATES = (3e-3, 1e-2), (1e-3, 3e-3)
WINDOW = 32
FARTHEST = 4 * LENGTH


class Setting:
    """What an arm is given: the teacher, the text, a seed and a rate."""

    def __init__(self, args, shape, seed, rate):
        self.preset = args.presets[shape]
        self.tokens = args.tokens
        self.seed, self.rate = seed, rate
        self.num_features = 256 if shape == "h256" else 64

    def exact(self):
        return keras_hub.models.CausalLM.from_preset(self.preset)

    def converted(self, **options):
        options = {"num_features": self.num_features, "geometry_scale": 1.0} | options
        return kd.convert_to_dark(self.exact(), seed=self.seed, **options)

    def windows(self, count, stream, part="train"):
        """Windows of text and repeats, different ones for every stream."""
        return teacher.training_windows(self.tokens[part], count, LENGTH, 1000 * stream + self.seed)

    def batches(self, count, stream, part="train"):
        windows = self.windows(count * BATCH, stream, part)
        return [
            teacher.inputs(windows[start : start + BATCH])
            for start in range(0, len(windows), BATCH)
        ]

    def calibrate(self, model, method="spectral", **options):
        data = self.batches(CALIBRATION_WINDOWS // BATCH, 1)
        return kd.calibrate(model, data, method=method, seed=self.seed, verbose=False, **options)

    def transfer(self, model, steps=TRANSFER_STEPS, **options):
        kd.transfer_attention(
            model,
            self.batches(steps, 2),
            steps=steps,
            learning_rate=self.rate,
            validation_data=self.batches(VALIDATION_WINDOWS // BATCH, 4, "validation"),
            seed=self.seed,
            verbose=0,
            **options,
        )
        return model

    def distil(self, model):
        data = self.batches(DISTIL_STEPS, 3)
        kd.distil(model, self.exact(), data, steps=DISTIL_STEPS, learning_rate=self.rate, verbose=0)
        return model

    def finetune(self, model):
        """q, k, v and what is trainable of the feature maps, on the next token alone."""
        windows = self.windows(DISTIL_STEPS * BATCH, 3)
        chosen = []
        for layer in dark_layers(model).values():
            chosen += layer.feature_map.trainable_variables
            for dense in (layer.query_dense, layer.key_dense, layer.value_dense):
                chosen += dense.variables
        schedule = keras.optimizers.schedules.CosineDecay(self.rate, DISTIL_STEPS)
        with _only_trainable(model, chosen):
            model.compile(
                optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.0, clipnorm=1.0),
                loss=teacher.loss(),
                weighted_metrics=[],
            )
            model.fit(
                teacher.inputs(windows), windows[:, 1:], batch_size=BATCH, shuffle=False, verbose=0
            )
        return model


def performer(setting, **options):
    return setting.converted(train_geometry=False, **options)


def untrained(method, **options):
    return lambda setting: setting.calibrate(setting.converted(), method, **options)


def transferred(setting, **options):
    """Calibrated and transferred, queries and keys with geometries of their own."""
    return setting.transfer(setting.calibrate(setting.converted(tie_geometry=False, **options)))


def distilled(setting):
    """Transfer at its own best rate, distillation at the rate that is tried."""
    rate, setting.rate = setting.rate, TRANSFER_RATES[-1]
    model = transferred(setting)
    setting.rate = rate
    return setting.distil(model)


def learned_features(setting):
    return setting.transfer(setting.converted(train_geometry=False, train_projection=True))


def hedgehog(setting):
    """`phi(x) = [exp(W x), exp(-W x)]` for queries and for keys, all of it learned."""
    model = setting.converted()
    for layer in dark_layers(model).values():
        feature_map = layer.feature_map
        feature_map.set_form("free")
        heads, dim, m = feature_map.query_kernel.shape
        rows = np.linalg.qr(np.random.default_rng(setting.seed).normal(size=(dim, dim)))[0]
        half = rows[:, : m // 2] * dim**-0.25
        kernel = np.stack([np.concatenate([half, -half], axis=1)] * heads)
        feature_map.query_kernel.assign(kernel)
        feature_map.key_kernel.assign(kernel)
    return setting.transfer(model)


def rotary(rope_geometry, offsets):
    def arm(setting):
        model = setting.converted(rope_geometry=rope_geometry)
        how = {"position_offset": FARTHEST - LENGTH} if offsets else {}
        setting.calibrate(model, **how)
        return setting.transfer(model, **how)

    return arm


def windowed(setting, **options):
    return performer(setting, sliding_window=WINDOW, **options)


def window_calibrated(setting):
    model = setting.converted(sliding_window=WINDOW, tie_geometry=False)
    return setting.calibrate(model)


def window_transferred(setting):
    rate, setting.rate = setting.rate, TRANSFER_RATES[-1]
    model = setting.transfer(window_calibrated(setting))
    setting.rate = rate
    return model


# name: (what, the rates tried, the shape)
ARMS = {
    "exact": (lambda setting: setting.exact(), (), "h64"),
    "performer": (performer, (), "h64"),
    "whitening": (untrained("whitening"), (), "h64"),
    "scale": (untrained("scale"), (), "h64"),
    "spectral, closed form": (untrained("spectral", refine=False), (), "h64"),
    "spectral": (untrained("spectral"), (), "h64"),
    "clusters": (untrained("clusters"), (), "h64"),
    "spectral + transfer": (transferred, TRANSFER_RATES, "h64"),
    "spectral + transfer + distillation": (distilled, FINETUNE_RATES, "h64"),
    "performer + distillation": (lambda s: s.distil(performer(s)), FINETUNE_RATES, "h64"),
    "learned features + transfer": (learned_features, TRANSFER_RATES, "h64"),
    "hedgehog + transfer": (hedgehog, TRANSFER_RATES, "h64"),
    "identity, finetuned": (lambda s: s.finetune(s.converted()), FINETUNE_RATES, "h64"),
    "performer, finetuned": (lambda s: s.finetune(performer(s)), FINETUNE_RATES, "h64"),
    "window alone": (lambda s: windowed(s, window_only=True), (), "h64"),
    "window + performer": (windowed, (), "h64"),
    "window + spectral": (window_calibrated, (), "h64"),
    "window + spectral + transfer": (
        lambda s: s.transfer(window_calibrated(s)),
        TRANSFER_RATES,
        "h64",
    ),
    "window + spectral + 4x transfer": (
        lambda s: s.transfer(window_calibrated(s), 4 * TRANSFER_STEPS),
        TRANSFER_RATES[-1:],
        "h64",
    ),
    "window + spectral + transfer + distillation": (
        lambda s: s.distil(window_transferred(s)),
        FINETUNE_RATES[:1],
        "h64",
    ),
    **{
        f"m = {m}: {name}": (arm, rates, "h64")
        for m in (32, 128, 256)
        for name, arm, rates in (
            ("performer", lambda s, m=m: performer(s, num_features=m), ()),
            ("spectral", lambda s, m=m: s.calibrate(s.converted(num_features=m)), ()),
            (
                "spectral + transfer",
                lambda s, m=m: transferred(s, num_features=m),
                TRANSFER_RATES[-1:],
            ),
        )
    },
    "rope after, no offsets": (rotary("after", False), TRANSFER_RATES[-1:], "h64"),
    "rope after, offsets": (rotary("after", True), TRANSFER_RATES[-1:], "h64"),
    "rope before, offsets": (rotary("before", True), TRANSFER_RATES[-1:], "h64"),
    "rope planes, offsets": (rotary("planes", True), TRANSFER_RATES[-1:], "h64"),
    "h256: exact": (lambda setting: setting.exact(), (), "h256"),
    "h256: performer": (performer, (), "h256"),
    "h256: scale": (untrained("scale"), (), "h256"),
    "h256: spectral, closed form": (untrained("spectral", refine=False), (), "h256"),
    "h256: spectral": (untrained("spectral"), (), "h256"),
    "h256: clusters": (untrained("clusters"), (), "h256"),
    "h256: spectral + transfer": (transferred, TRANSFER_RATES[-1:], "h256"),
}


def judge(model, tokens, part, args, offset=None):
    """Mean losses on text, and where a segment is repeated."""
    windows = teacher.text_windows(tokens[part], args.test_windows, LENGTH, 7)
    repeated, where = teacher.repeats(windows, 7)
    layers = list(dark_layers(model).values()) if hasattr(model.backbone, "dark_layers") else []
    with contextlib.ExitStack() as stack:
        for layer in layers:
            layer.position_offset = offset
            stack.callback(setattr, layer, "position_offset", None)
        model.compile(
            loss=keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            ),
            weighted_metrics=[],
        )
        losses = {}
        for name, rows, weights in (
            ("text", windows, np.ones(where.shape)),
            ("retrieval", repeated, where),
        ):
            losses[name] = float(
                model.evaluate(
                    teacher.inputs(rows),
                    rows[:, 1:],
                    sample_weight=weights.astype("float32"),
                    batch_size=BATCH,
                    verbose=0,
                )
            )
    return losses


def run_arm(name, seed, rate, args):
    arm, _, shape = ARMS[name]
    keras.utils.set_random_seed(seed)
    setting = Setting(args, shape, seed, rate)
    started = time.perf_counter()
    model = arm(setting)
    seconds = time.perf_counter() - started
    row = {"arm": name, "seed": seed, "rate": rate, "seconds": round(seconds, 1)}
    row["validation"] = judge(model, args.tokens, "validation", args)
    row["test"] = judge(model, args.tokens, "test", args)
    if name.startswith("rope") or name in ("performer", "spectral"):
        for times in (2, 4):
            offset = (times - 1) * LENGTH
            row[f"test at {times}x"] = judge(model, args.tokens, "test", args, offset)
    if name not in ("exact", "h256: exact"):
        windows = teacher.text_windows(args.tokens["test"], 16, LENGTH, 8)
        report = kd.approximation_report(model, teacher.inputs(windows))
        row["approximation"] = report.summary()
    return row


def best_rate(name, rows):
    tried = [r for r in rows if r["arm"] == name and r["seed"] == 0]
    return min(tried, key=lambda r: r["validation"]["text"])["rate"]


def summarize(rows):
    """R and losses of every arm at its best rate: mean and range over seeds."""
    of = {}
    for row in rows:
        of.setdefault(row["arm"], []).append(row)
    summary = {}
    for name, found in of.items():
        rate = best_rate(name, found) if any(r["seed"] == 0 for r in found) else None
        found = [r for r in found if r["rate"] == rate]
        prefix = "h256: " if name.startswith("h256") else ""
        base = of.get(prefix + "performer", [])
        exact = of.get(prefix + "exact", [])
        entry = {"seeds": len(found), "rate": rate}
        for key in ("text", "retrieval"):
            losses = [r["test"][key] for r in found]
            entry[key] = [
                round(statistics.mean(losses), 4),
                round(min(losses), 4),
                round(max(losses), 4),
            ]
        gaps = []
        for row in found:
            same = [r for r in base if r["seed"] == row["seed"]]
            if same and exact:
                floor = exact[0]["test"]["text"]
                gaps.append(
                    (same[0]["test"]["text"] - row["test"]["text"])
                    / (same[0]["test"]["text"] - floor)
                )
        if gaps:
            entry["R"] = [round(x, 3) for x in (statistics.mean(gaps), min(gaps), max(gaps))]
        summary[name] = entry
    return summary


PAGE = """# What conversion loses, and what brings it back

Written by `benchmarks/quality.py` from [quality.json](quality.json), which has every row. What the
methods are: [docs/calibration.md](../../docs/calibration.md).

A Gemma of 4 layers (4 query heads, 2 key/value heads of 64 dimensions, rotary positions, contexts
of {length} tokens, {vocabulary} tokens of vocabulary) was trained on {text}, with random segments
repeated in some contexts. Then all layers were converted, with 64 features a head unless it says
otherwise. Losses are of {windows} contexts of text held out from all training, in nats per token:
`text` over all tokens, `retrieval` where a random segment of 128 different tokens is repeated
(ln 128 = 4.85 is what one knows without looking). R is the share of the loss between Performer and
exact attention that is won back. Mean over seeds of draws and training batches, in brackets the
lowest and highest; one teacher. Trained arms had as many rates tried as the table says, on other
held-out text. Transfer: {transfer} steps of {batch} contexts; distillation and finetuning:
{distil}.

{tables}

TensorFlow {tensorflow} on {processor}, Keras {keras}, KerasHub {hub}.
"""


def page(results, args):
    summary, versions = results["summary"], results["environment"]["versions"]

    def cell(values, digits=3):
        mean, low, high = values
        spread = "" if low == high else f" ({low:.{digits}f} to {high:.{digits}f})"
        return f"{mean:.{digits}f}{spread}"

    def table(title, names):
        lines = [f"## {title}", "", "| arm | text | R | retrieval | error | seeds | rates tried |"]
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        for name in names:
            entry = summary[name]
            share = cell(entry["R"], 2) if "R" in entry else ""
            rows = [r for r in results["rows"] if r["arm"] == name and "approximation" in r]
            error = "" if not rows else f"{rows[0]['approximation']['relative_error']['dark']:.2f}"
            cells = [name, cell(entry["text"]), share, cell(entry["retrieval"], 2), error]
            cells += [str(entry["seeds"]), str(len(ARMS[name][1]) or "")]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def positions(names):
        lines = ["## Positions beyond the context", ""]
        lines.append(
            "The same contexts, moved to later positions: exact attention does not notice. "
            f"Offsets were drawn up to {FARTHEST} tokens where it says so.\n"
        )
        lines += ["| arm | at 1x | up to 2x | up to 4x |", "| --- | --- | --- | --- |"]
        for name in names:
            rows = [r for r in results["rows"] if r["arm"] == name and "test at 4x" in r]
            cells = []
            for key in ("test", "test at 2x", "test at 4x"):
                losses = [row[key]["text"] for row in rows]
                cells.append(cell((statistics.mean(losses), min(losses), max(losses))))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    done = list(summary)
    groups = {
        "64 features": [n for n in done if not n.startswith(("m =", "window", "h256", "rope"))],
        f"With a window of {WINDOW} tokens": [
            "exact",
            *(n for n in done if n.startswith("window")),
        ],
        "More and fewer features": [n for n in done if n.startswith("m =")],
        "Heads of 256 dimensions, one key/value head, 256 features": [
            n for n in done if n.startswith("h256")
        ],
    }
    tables = [table(title, names) for title, names in groups.items() if names]
    moved = [n for n in done if any("test at 4x" in r for r in results["rows"] if r["arm"] == n)]
    tables.insert(3, positions(moved))
    return PAGE.format(
        length=LENGTH,
        vocabulary=teacher.VOCABULARY,
        text=results["text"],
        windows=args.test_windows,
        transfer=TRANSFER_STEPS,
        distil=DISTIL_STEPS,
        batch=BATCH,
        tables="\n\n".join(tables),
        tensorflow=versions.get("tensorflow", ""),
        processor=results["environment"]["machine"]["processor"],
        keras=versions["keras"],
        hub=versions.get("keras-hub", ""),
    )


def save(rows, args):
    results = {
        "environment": environment("keras-hub", "tensorflow"),
        "text": pathlib.Path(args.text).name if args.text else "Python's help topics",
        "summary": summarize(rows),
        "rows": rows,
    }
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    if {"exact", "performer"} <= results["summary"].keys():
        args.output.with_suffix(".md").write_text(page(results, args))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a text file; default: Python's own help topics")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("results/quality"))
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "quality.json")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--train-steps", type=int, default=1800)
    parser.add_argument("--test-windows", type=int, default=64)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.tokens = teacher.tokens_of(args.text)
    args.presets = {
        shape: teacher.teacher(args.work, shape, args.tokens, seed=0, steps=args.train_steps)
        for shape in {ARMS[name][2] for name in args.arms}
    }
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    for seed in args.seeds:
        for name in args.arms:
            rates = ARMS[name][1] or (None,)
            if seed and rates != (None,):
                rates = (best_rate(name, rows),)
            if name.endswith("exact") and seed:
                continue
            for rate in rates:
                if any((r["arm"], r["seed"], r["rate"]) == (name, seed, rate) for r in rows):
                    continue
                row = run_arm(name, seed, rate, args)
                rows.append(row)
                print(
                    f"{name}, seed {seed}, rate {rate}: text {row['test']['text']:.3f}, "
                    f"retrieval {row['test']['retrieval']:.3f}, {row['seconds']:.0f} s",
                    flush=True,
                )
                save(rows, args)
                keras.backend.clear_session()
    save(rows, args)


if __name__ == "__main__":
    main()
