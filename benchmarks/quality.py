"""What is left of a model when its softmax attention becomes features, and what brings it back.

    python benchmarks/quality.py --text book.txt            # everything, hours
    python benchmarks/quality.py --text book.txt --arms performer spectral --seeds 0

Trains a small Gemma (`teacher.py`) on a text once, converts every layer of it
in many ways (`quality_arms.py`) and measures, on text held out from all
training, the loss of the next token and the loss where a random segment is
repeated. With R = (Performer's loss - an arm's) / (Performer's loss - softmax's),
the share of what conversion lost that the arm wins back.

Rates of trained arms are chosen by seed 0's loss on the validation part, the
same number of trials for each. Seeds are of draws and of training batches; the
teacher is one. Rows are written to results/quality.json as they come, and not
made again.
"""

import json
import pathlib
import statistics
import tempfile
import time

import common
import keras
import models
import numpy as np
import teacher
from quality_arms import ARMS, BATCH, LENGTH, Setting

from keras_darkformer import approximation_report

QUICK = ["exact", "performer", "window + spectral + transfer", "window alone"]


def judge(model, tokens, part, args, offset=None):
    """Mean losses on text, and where a segment is repeated."""
    windows = teacher.text_windows(tokens[part], args.test_windows, LENGTH, 7)
    repeated, where = teacher.repeats(windows, 7)
    with models.moved(model, offset):
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
    if models.dark_layers(model):
        windows = teacher.text_windows(args.tokens["test"], 16, LENGTH, 8)
        report = approximation_report(model, teacher.inputs(windows))
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


def save(rows, args):
    results = {
        "environment": common.environment("keras-hub", "tensorflow"),
        "text": pathlib.Path(args.text).name if args.text else "Python's help topics",
        "summary": summarize(rows),
        "rows": rows,
    }
    common.write_json(args.output, results)


def parse_arguments():
    made = common.parser(__doc__)
    made.add_argument("--text", help="a text file; default: Python's own help topics")
    made.add_argument("--work", type=pathlib.Path, default=pathlib.Path("results/quality"))
    made.add_argument("--output", type=pathlib.Path, default=common.RESULTS / "quality.json")
    made.add_argument("--arms", nargs="*", help="of quality_arms.py; default: all")
    made.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    made.add_argument("--train-steps", type=int, default=1800)
    made.add_argument("--test-windows", type=int, default=64)
    args = made.parse_args()
    args.repeat_steps = 900
    args.arms = args.arms or (QUICK if args.quick else list(ARMS))
    if args.quick:
        args.seeds, args.train_steps, args.repeat_steps, args.test_windows = [0], 2, 2, 8
        args.work = pathlib.Path(tempfile.mkdtemp())
        args.output = args.work / "quality.json"
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main():
    args = parse_arguments()
    args.tokens = teacher.tokens_of(args.text)
    args.presets = {
        shape: teacher.teacher(args, shape, seed=0)
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
