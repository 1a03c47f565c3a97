"""Attention as it is used: batches, several heads and threads, short and long sequences.

    KERAS_BACKEND=torch python benchmarks/use.py

What `attention_mode="auto"` and `"linear"` take, beside what one would pick
instead (`attention_ways.py`), all taking turns. One thread is timed by
processor time, two by the clock on the wall: leave the machine alone.
Writes results/use_BACKEND.json.
"""

import itertools
import os
import statistics
import time

from attention_ways import runner, ways_of
from common import (
    PASSES,
    answer,
    backend,
    default_clock,
    environment,
    finish,
    in_process,
    interleaved,
    one_thread,
    parser,
    summary,
    write,
)

HEADS = (8, 32)
HEAD_DIM, NUM_FEATURES = 64, 128
BATCHES = (1, 4, 16)
LENGTHS = (128, 512, 2048, 8192)
MOST_TOKENS = {8: 16384, 32: 8192}  # of a batch, by heads
THREADS = (1, 2)
QUADRATIC = ("sdpa", "keras")
WAYS = ("dark_auto", "dark", "darkformer_pytorch_256", "performer_pytorch", "fla", *QUADRATIC)


def cases(threads, heads, quick):
    """`(heads, batch, length, causal, dtype)`: all in float32, some of them otherwise too."""
    for batch, length in itertools.product(BATCHES, LENGTHS[:2] if quick else LENGTHS):
        if batch * length > MOST_TOKENS[heads]:
            continue
        yield heads, batch, length, True, "float32"
        if batch == 4 and heads == HEADS[0] and threads == 1:
            yield heads, batch, length, False, "float32"
            yield heads, batch, length, True, "bfloat16"


def row_of(case, gradients, clock, args):
    """The times of one case, of the ways that take no longer than --patience."""
    heads, batch, length, causal, dtype = case
    shape = {"heads": heads, "kv_heads": heads, "head_dim": HEAD_DIM}
    shape |= {"num_features": NUM_FEATURES, "batch": batch}
    ways = ways_of(shape, length, causal, WAYS, dtype)
    # "auto" trains with features, and is linear above its crossover.
    if gradients or ways["dark_auto"].function is ways["dark"].function:
        ways["dark_auto"] = ways.pop("dark")
    runs, total, skipped = {}, 0.0, {}
    for name, way in ways.items():
        gib = (4 if gradients else 2) * 4 * batch * heads * length**2 / 2**30
        is_naive = name == "keras" and (backend() != "torch" or dtype != "float32")
        if name == "performer_pytorch" and causal:
            continue  # tens of times as long as the others
        if is_naive and gib > args.max_gib:
            skipped[name] = f"needs about {gib:.0f} GiB"
            continue
        run = runner(way, gradients)
        try:
            finish(run())
        except (RuntimeError, ValueError) as error:  # no bfloat16
            skipped[name] = str(error).splitlines()[0]
            continue
        started = clock()
        finish(run())
        seconds = clock() - started
        if seconds > args.patience and not name.startswith("dark"):
            skipped[name] = f"takes {seconds:.0f} s"
            continue
        runs[name], total = run, total + seconds
    repeats = max(3, min(31, int(args.seconds / max(total, 1e-9))))
    samples = interleaved(runs, repeats, clock=clock, warmups=0)
    times = {name: summary(values) for name, values in samples.items()}
    ours = times["dark_auto"]["median"]
    return {
        "heads": heads,
        "batch": batch,
        "length": length,
        "causal": causal,
        "dtype": dtype,
        "pass": PASSES[gradients],
        "repeats": repeats,
        "times": times,
        "ratios": {
            name: round(time["median"] / ours, 3)
            for name, time in times.items()
            if name != "dark_auto"
        },
        "skipped": skipped,
    }


def rows_of(threads, heads, args):
    """The rows of so many heads, in a process that computes with so many threads."""
    if threads == 1:
        one_thread()
        clock = default_clock()
    else:
        clock = time.perf_counter
        if backend() == "torch":
            import torch

            torch.set_num_threads(threads)
    rows = []
    for case in cases(threads, heads, args.quick):
        for gradients in (False, True):
            rows.append({"threads": threads, **row_of(case, gradients, clock, args)})
    return rows


def main():
    made = parser(__doc__)
    made.add_argument("--seconds", type=float, default=1.0, help="aim for the rounds of a row")
    made.add_argument("--patience", type=float, default=1.5, help="seconds a call may take")
    made.add_argument("--max-gib", type=float, default=4.0)
    args = made.parse_args()
    if args.measure:
        answer(rows_of(*map(int, args.measure), args))
        return
    packages = ("darkformer-pytorch", "performer-pytorch", "flash-linear-attention")
    payload = {
        "head_dim": HEAD_DIM,
        "num_features": NUM_FEATURES,
        "unit": "ms, median and interquartile range",
        "rows": [],
        **environment(*(packages if backend() == "torch" else ())),
    }
    most = 1 if args.quick else len(os.sched_getaffinity(0))
    threads = [count for count in THREADS if count <= most]
    for count, heads in itertools.product(threads, HEADS[:1] if args.quick else HEADS):
        for row in in_process(count, heads):
            payload["rows"].append(row)
            print({name: row[name] for name in row if name not in ("times", "skipped")}, flush=True)
        if not args.quick:
            write("use", payload)
    say(payload["rows"])


def say(rows):
    """The worst and the middle of all ratios."""
    exact = [row["ratios"][x] for row in rows for x in QUADRATIC if x in row["ratios"]]
    middle = statistics.median(row["ratios"]["dark"] for row in rows if "dark" in row["ratios"])
    print(f"against exact attention at worst {min(exact)}; linear / auto in the middle {middle}")


if __name__ == "__main__":
    main()
