"""On a GPU, in bfloat16: from which length on features are faster than flash attention.

    KERAS_BACKEND=torch python benchmarks/flash.py

All ways (`attention_ways.py`) take turns at each length; a way that takes longer than --patience
is timed once and left out at longer lengths. Then blocks and chunks of several sizes take turns.
Writes results/flash_BACKEND_gpu.json, in which kinds of rows that --kinds does not name stay.
"""

import contextlib
import functools
import itertools

from attention_ways import Way, runner, ways_of
from common import (
    PASSES,
    backend,
    default_clock,
    environment,
    finish,
    interleaved,
    parser,
    read,
    summary,
    write,
)

KINDS = ("rows", "compiled", "blocks")
SHAPES = {
    "h64 m128": {"heads": 16, "kv_heads": 16, "head_dim": 64, "num_features": 128},
    "h128 m128 4:1": {"heads": 32, "kv_heads": 8, "head_dim": 128, "num_features": 128},
    "h256 m256 8:1": {"heads": 8, "kv_heads": 1, "head_dim": 256, "num_features": 256},
}
LENGTHS = [2048 * 4**x for x in range(4)]
NAMES = ("dark", "dark_remat", "sdpa", "cudnn", "darkformer_pytorch_256", "fla_kernel")
SWEEP = {"torch": (2048, 4096, 16384, 32768), "jax": (1024, 4096, 16384)}  # tokens of a block
CHUNKS = {"torch": (64, 128, 256, 512), "jax": (64, 128, 256)}
SWEPT = 32768


@contextlib.contextmanager
def changed(module, name, value):
    """With another value of a module's constant or function."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def in_float32(way):
    """The same, features being multiplied in float32."""
    from keras_darkformer.ops import attention

    @functools.wraps(way.function)
    def function(*arguments):
        with changed(attention, "products_dtype", lambda dtype: "float32"):
            return way.function(*arguments)

    return Way(function, way.inputs, way.trained)


def timed(what, label, length, gradients, runs, args):
    """The row of functions that take turns."""
    times = {name: summary(x) for name, x in interleaved(runs, args.repeats, warmups=1).items()}
    print(what, label, length, PASSES[gradients], {x: y["median"] for x, y in times.items()})
    return {"shape": label, "length": length, "pass": PASSES[gradients], "times": times}


def time_row(label, length, gradients, exhausted, args):
    """The row of a shape, a length and a pass."""
    clock, runs, single, failed = default_clock(), {}, {}, {}
    ways = ways_of(SHAPES[label], length, True, NAMES, "bfloat16")
    ways["dark_float32"] = in_float32(ways["dark"])
    for name, way in ways.items():
        if name in exhausted or (name == "dark_remat" and not gradients):
            continue
        run = runner(way, gradients)
        try:
            finish(run())
        except Exception as error:  # memory, or no kernel for the shape: a row without it
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            exhausted.add(name)
            continue
        started = clock()
        finish(run())
        seconds = clock() - started
        if seconds > args.patience:
            single[name] = summary([seconds])
            exhausted.add(name)
        else:
            runs[name] = run
    row = timed("attention", label, length, gradients, runs, args)
    return row | {"times": row["times"] | single, "failed": failed}


def time_blocks(label, gradients, args):
    """Blocks and chunks of several sizes at one length."""
    from keras_darkformer.ops import backend as package_backend

    length = 512 if args.quick else SWEPT
    dark = ways_of(SHAPES[label], length, True, ["dark"], "bfloat16")["dark"]
    runs = {}
    for block, chunk in itertools.product(SWEEP[backend()], CHUNKS[backend()]):

        def function(*arguments, block=block, chunk=chunk):
            with changed(package_backend, "ACCELERATOR_TOKENS", block):
                return dark.function(*arguments, chunk_size=chunk)

        way = Way(function, dark.inputs, dark.trained)
        runs[f"{block} x {chunk}"] = runner(way, gradients)
    return timed("blocks x chunks", label, length, gradients, runs, args)


def time_compiled(label, gradients, args):
    """`torch.compile`, at one length."""
    length = 512 if args.quick else SWEPT
    ways = ways_of(SHAPES[label], length, True, ["dark", "sdpa"], "bfloat16")
    runs = {name: runner(way, gradients) for name, way in ways.items()}
    runs["dark_compiled"] = runner(ways["dark"], gradients, compile=True)
    return timed("torch.compile", label, length, gradients, runs, args)


def main():
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=9)
    made.add_argument("--patience", type=float, default=0.25, help="seconds a call may take")
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    args = made.parse_args()
    lengths = LENGTHS[:1] if args.quick else LENGTHS
    args.repeats = 3 if args.quick else args.repeats
    payload = {"shapes": SHAPES, "dtype": "bfloat16", "unit": "ms, median and interquartile range"}
    before = read("flash") or {}
    payload |= {kind: [] if kind in args.kinds else before.get(kind, []) for kind in KINDS}
    payload |= environment("darkformer-pytorch", "flash-linear-attention")

    def keep(kind, row):
        payload[kind].append(row)
        if not args.quick:
            write("flash", payload)

    if "rows" in args.kinds:
        for label, gradients in itertools.product(SHAPES, (False, True)):
            exhausted = set()
            for length in lengths:
                keep("rows", time_row(label, length, gradients, exhausted, args))
    if "compiled" in args.kinds and backend() == "torch":
        for gradients in (False, True):
            keep("compiled", time_compiled("h64 m128", gradients, args))
    if "blocks" in args.kinds:
        for label, gradients in itertools.product(SHAPES, (False, True)):
            keep("blocks", time_blocks(label, gradients, args))


if __name__ == "__main__":
    main()
