"""Time and memory of the attention operation, ours and what one would pick instead.

    KERAS_BACKEND=torch python benchmarks/attention.py

Every row is one shape, length and direction (forward, or forward and backward).
All ways to compute it (`attention_ways.py`) take turns in one process. Quadratic
ways are left out where they would take longer than --patience or more memory
than --max-gib. Layers are compared in rows of their own. Peak memory comes from
a process for each figure. Writes benchmarks/results/attention_BACKEND.json.
"""

import ctypes
import itertools
import json
import math
import os
import pathlib
import re
import statistics
import tempfile

from attention_ways import MATMUL, layer_ways, matmul_way, runner, ways_of
from common import (
    PASSES,
    accelerator,
    answer,
    backend,
    default_clock,
    environment,
    finish,
    in_process,
    interleaved,
    one_thread,
    parser,
    peak,
    print_table,
    reset_peak,
    result_path,
    summary,
    write,
    write_json,
)

SHAPES = {
    "h64 m128": {"heads": 4, "kv_heads": 4, "head_dim": 64, "num_features": 128},
    "h256 m256": {"heads": 4, "kv_heads": 4, "head_dim": 256, "num_features": 256},
    "h256 m256 8:1": {"heads": 8, "kv_heads": 1, "head_dim": 256, "num_features": 256},
    "h64 m128, 1 head": {"heads": 1, "kv_heads": 1, "head_dim": 64, "num_features": 128},
    "h256 m256, 1 head": {"heads": 1, "kv_heads": 1, "head_dim": 256, "num_features": 256},
}
LENGTHS = {True: (512, 1024, 2048, 4096, 8192), False: (512, 2048, 8192)}
ONE_HEAD_LENGTHS = {True: (32768,), False: (32768,)}  # more would take hours
LAYER_LENGTHS = (512, 2048, 8192)
MEMORY_LENGTHS = (2048, 8192, 32768)
EXACT = ("sdpa", "cudnn", "keras", "layer_keras")  # quadratic in the length


# === Time ===


def time_ways(ways, gradients, args, skipped):
    """Summaries by name, all ways taking turns; drops what would take too long."""
    runs = {}
    for name, way in ways.items():
        run = runner(way, gradients, compile=args.compile)
        finish(run())  # compiles
        started = default_clock()()
        finish(run())
        seconds = default_clock()() - started
        if seconds > args.patience and not name.startswith(("dark", "layer_dark")):
            skipped[name] = f"takes {seconds:.0f} s"
            continue
        runs[name] = run, seconds
    total = sum(seconds for _, seconds in runs.values())
    repeats = max(args.repeats[0], min(args.repeats[1], int(args.seconds / max(total, 1e-9))))
    samples = interleaved({name: run for name, (run, _) in runs.items()}, repeats, warmups=1)
    return {name: summary(values) for name, values in samples.items()}, repeats


def left_out(name, shape, length, causal, gradients, args):
    """Why a way is left out, or `None`."""
    if name == "performer_pytorch" and causal and length > 2048:
        return "takes tens of times as long as the others"
    if name in ("keras", "layer_keras"):
        gib = (6 if gradients else 3) * shape["heads"] * length**2 * 4 / 2**30
        if gib > args.max_gib:
            return f"needs about {gib:.0f} GiB"
    return None


def multiplications(shape, length, causal):
    """Multiply-adds of a forward pass: the matrix products, chunks of the size we pick."""
    from keras_darkformer.ops.partition import pick_chunk_size

    heads, kv_heads = shape["heads"], shape["kv_heads"]
    h, m = shape["head_dim"], shape["num_features"]
    chunk = min(length, pick_chunk_size(h, heads // kv_heads)) if causal else 0
    per_query = h * m + m * h + chunk * (m + h)
    per_key = h * m + h * h + m * h
    return length * (heads * per_query + kv_heads * per_key)


def time_row(label, length, causal, gradients, args):
    ways = ways_of(SHAPES[label], length, causal, dtype=args.dtype, compile=args.compile)
    for name in ("dark_auto", "fla", "fla_kernel"):  # of `use.py` and `flash.py`
        ways.pop(name, None)
    if gradients:
        return row_of(ways, "dark", label, length, causal, gradients, args)
    del ways["dark_remat"]
    ways["matmul"] = matmul_way()
    return row_of(ways, "dark", label, length, causal, gradients, args)


def layer_row(label, length, gradients, args):
    ways = layer_ways(SHAPES[label], length, args.dtype)
    row = row_of(ways, "layer_dark", label, length, True, gradients, args)
    return {**row, "layer": True}


def row_of(ways, ours, label, length, causal, gradients, args):
    """Times the ways that are not left out, now or at a smaller length."""
    exhausted = args.exhausted.setdefault((ours, label, causal, gradients), set())
    skipped = {}
    for name in ways:
        reason = left_out(name, SHAPES[label], length, causal, gradients, args)
        if name in exhausted:
            reason = "took too long at a smaller length"
        if reason:
            skipped[name] = reason
    ways = {name: way for name, way in ways.items() if name not in skipped}
    times, repeats = time_ways(ways, gradients, args, skipped)
    exhausted.update(name for name in skipped if "GiB" not in skipped[name])
    return {
        "shape": label,
        "length": length,
        "causal": causal,
        "pass": PASSES[gradients],
        "repeats": repeats,
        "times": times,
        "ratios": ratios(times, ours),
        "skipped": skipped,
    }


def add_floor_shares(rows):
    """The part of our time that the products alone would take, at the run's best rate.

    The best of the rows' medians: a product that comes after a large quadratic
    way finds the caches cold and its memory given back.

    Returns:
        The rate in GFLOP/s.
    """
    seconds = min(
        row["times"]["matmul"]["median"] / 1000 for row in rows if "matmul" in row["times"]
    )
    for row in rows:
        if "matmul" in row["times"]:
            count = multiplications(SHAPES[row["shape"]], row["length"], row["causal"])
            floor = count / MATMUL**3 * seconds
            row["floor_share"] = round(1000 * floor / row["times"]["dark"]["median"], 3)
    return round(2e-9 * MATMUL**3 / seconds)


def ratios(times, ours):
    """Their time over ours."""
    if ours not in times:
        return {}
    return {
        name: round(time["median"] / times[ours]["median"], 3)
        for name, time in times.items()
        if name not in (ours, "matmul")
    }


def crossover(rows, label, gradients, exact):
    """The length from which on we are faster than exact attention, between two measured."""
    points = sorted(
        (row["length"], row["ratios"][exact])
        for row in rows
        if row["shape"] == label
        and row["causal"]
        and "layer" not in row
        and (row["pass"] != "forward") == gradients
        and exact in row["ratios"]
    )
    if not points:
        return None
    if points[0][1] >= 1:
        return f"below {points[0][0]}"
    for (short, below), (long, above) in itertools.pairwise(points):
        if below < 1 <= above:
            part = math.log(1 / below) / math.log(above / below)
            return round(short * (long / short) ** part)
    return f"above {points[-1][0]}"


# === Memory ===


def measure_memory(name, label, gradients, length, folder, args):
    """Bytes of peak memory above the inputs, in this process; `None`: no such way here.

    Compiling with XLA takes more memory than running. So on a CPU the result is what XLA assigned
    to the program, read from its dump in `folder`.
    """
    gradients, length = gradients == "True", int(length)

    def run_of(size):
        ways = ways_of(SHAPES[label], size, True, [name], args.dtype, args.compile)
        return runner(ways[name], gradients, compile=args.compile) if ways else None

    first = run_of(64)
    if first is None:
        return None
    finish(first())
    run = run_of(length)
    if not accelerator():  # what was freed must not serve as room for what comes
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = peak()
    finish(run())
    if accelerator() or backend() == "torch":
        return peak() - before
    return assigned_by_xla(folder)


def assigned_by_xla(folder):
    """Bytes of the temporary buffers and the results of the largest program in a dump."""
    sizes = []
    for path in pathlib.Path(folder).glob("*buffer-assignment.txt"):
        buffers = re.findall(r"^allocation \d+: size (\d+), (.*)", path.read_text(), re.M)
        sizes.append(sum(int(x) for x, what in buffers if re.search("temp|live-out", what)))
    if not any(sizes):
        raise RuntimeError(f"XLA says nothing of buffers in {folder}")
    return max(sizes)


def memory_of(*what):
    """`measure_memory` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}"
        return in_process(*what, folder, XLA_FLAGS=flags)


def memory_rows(args):
    label = "h64 m128"
    names = {
        "torch": ("dark", "dark_remat", "darkformer_pytorch_256", "sdpa", "keras"),
        "jax": ("dark", "dark_remat", "cudnn", "keras"),
        "tensorflow": ("dark", "dark_remat", "keras"),
    }[backend()]
    repeats = args.memory_repeats if backend() == "torch" else 1
    rows = []
    for gradients in (False, True):
        for length in args.memory_lengths:
            mib = {}
            for name in names:
                if name == "dark_remat" and not gradients:
                    continue
                if left_out(name, SHAPES[label], length, True, gradients, args):
                    continue
                # Patience for exact attention ends where its time row did.
                if name in EXACT and length > 8192:
                    continue
                samples = [memory_of(name, label, gradients, length) for _ in range(repeats)]
                if None not in samples:
                    mib[name] = round(statistics.median(samples) / 2**20, 1)
            row = {"shape": label, "length": length, "causal": True, "mib": mib}
            row["pass"] = PASSES[gradients]
            rows.append(row)
            print(row, flush=True)
    return rows


# === Main ===


def show(rows):
    table = []
    for row in rows:
        ours = "layer_dark" if "layer" in row else "dark"
        table.append(
            [
                row["shape"] + (" layer" if "layer" in row else ""),
                row["length"],
                "causal" if row["causal"] else "all",
                "f+b" if "back" in row["pass"] else "f",
                f"{row['times'][ours]['median']:.2f}±{row['times'][ours]['spread']:.2f}",
                " ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items()),
            ]
        )
    print_table(["shape", "length", "sees", "pass", "ours ms", "their time / ours"], table)


def parse_arguments():
    made = parser(__doc__)
    made.add_argument("--seconds", type=float, default=5.0, help="aim for the rounds of a row")
    made.add_argument("--repeats", type=int, nargs=2, default=(5, 30), help="least and most")
    made.add_argument("--patience", type=float, default=4.0, help="seconds a call may take")
    made.add_argument("--max-gib", type=float, default=6.0)
    made.add_argument("--memory-repeats", type=int, default=3, help="on PyTorch")
    made.add_argument("--only-memory", action="store_true", help="and keep what results there are")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--compile", action="store_true", help="torch.compile")
    args = made.parse_args()
    args.exhausted = {}
    args.memory_lengths, args.lengths, args.layer_lengths = MEMORY_LENGTHS, LENGTHS, LAYER_LENGTHS
    args.one_head_lengths = ONE_HEAD_LENGTHS
    if args.quick:
        args.one_head_lengths = {True: (), False: ()}
        args.repeats, args.seconds, args.memory_repeats = (2, 2), 0.1, 1
        args.memory_lengths = args.layer_lengths = (512,)
        args.lengths = {True: (512, 1024), False: (512,)}
    return args


def main():
    args = parse_arguments()
    if args.measure:
        one_thread()
        answer(measure_memory(*args.measure, args))
        return

    # Before this process starts its backend: two do not share a GPU well.
    memory = memory_rows(args)
    variant = "compile" if args.compile else ""
    if args.only_memory:
        path = result_path("attention", variant)
        if not args.quick:
            write_json(path, json.loads(path.read_text()) | {"memory": memory})
        return
    one_thread()
    rows = []
    for label in SHAPES:
        for causal in (True, False):
            lengths = args.one_head_lengths if "1 head" in label else args.lengths
            for length in lengths[causal]:
                for gradients in (False, True):
                    rows.append(time_row(label, length, causal, gradients, args))
                    show(rows[-1:])
    for label in ("h64 m128", "h256 m256 8:1"):
        for length in args.layer_lengths:
            for gradients in (False, True):
                rows.append(layer_row(label, length, gradients, args))
                show(rows[-1:])
    gflops = add_floor_shares(rows)
    exact = next(name for name in EXACT if any(name in row["ratios"] for row in rows))
    crossovers = [
        {
            "shape": label,
            "pass": PASSES[gradients],
            "against": exact,
            "length": crossover(rows, label, gradients, exact),
        }
        for label in SHAPES
        if "1 head" not in label
        for gradients in (False, True)
    ]
    print(*crossovers, sep="\n")
    if not args.quick:
        packages = ("darkformer-pytorch", "performer-pytorch") if backend() == "torch" else ()
        payload = {
            "shapes": SHAPES,
            "unit": "ms, median and interquartile range",
            "dtype": args.dtype,
            "compiled": args.compile or backend() != "torch",
            "matmul_gflops": gflops,
            "rows": rows,
            "memory": memory,
            "crossover": crossovers,
            **environment(*packages),
        }
        write("attention", payload, variant)


if __name__ == "__main__":
    main()
