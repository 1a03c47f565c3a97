"""From which length on features are faster than the kernel they estimate, computed exactly.

    KERAS_BACKEND=torch python benchmarks/crossover.py

What `attention_mode="auto"` goes by. For every shape and pass the two forms take turns in one
process, on one thread, at lengths a quarter of an octave apart, between which the length where they
are alike is found by bisection. PyTorch is measured in training too, for those who give
`exact_below`. Writes results/crossover_BACKEND.json, and prints the constants of
`keras_darkformer.ops.crossover` fitted to it.
"""

import itertools
import math

from attention_ways import Way, runner
from common import (
    PASSES,
    backend,
    environment,
    finish,
    interleaved,
    one_thread,
    parser,
    summary,
    write,
)

SIZES = ((64, 64), (64, 128), (64, 256), (128, 128), (256, 256))  # head_dim, features
HEADS = ((4, 4), (8, 2), (8, 1))  # of queries, of keys and values
LEAST, MOST = 64, 4096
STEPS_PER_OCTAVE = 4


def ways_of(head_dim, num_features, heads, kv_heads, length, causal, masked):
    """Both forms on the same random inputs."""
    import numpy as np
    from keras import ops

    from keras_darkformer.ops import (
        apply_geometry,
        dark_attention,
        draw_projection,
        exact_dark_attention,
    )

    rng = np.random.default_rng(0)

    def draw(count):
        array = rng.standard_normal((1, length, count, head_dim), dtype="float32")
        return ops.convert_to_tensor(array)

    inputs = [draw(heads), draw(kv_heads), draw(kv_heads)]
    projection = ops.convert_to_tensor(draw_projection(num_features, head_dim, seed=0), "float32")
    geometry = ops.convert_to_tensor(np.stack([np.eye(head_dim, dtype="float32")] * kv_heads))
    call = {"causal": causal}
    if masked:
        call["key_mask"] = ops.convert_to_tensor(np.arange(length)[None] >= length // 16)

    def linear(query, key, value, geometry):
        return dark_attention(query, key, value, geometry, projection, **call)

    def exact(query, key, value, geometry):
        kernel = ops.einsum("krh,krj->khj", geometry, geometry)
        return exact_dark_attention(apply_geometry(query, kernel), key, value, **call)

    return {"linear": Way(linear, inputs, [geometry]), "exact": Way(exact, inputs, [geometry])}


def timed(shape, length, causal, masked, gradients, args):
    """Milliseconds of both forms at a length."""
    ways = ways_of(*shape, length, causal, masked)
    runs = {name: runner(way, gradients) for name, way in ways.items()}
    for run in runs.values():
        finish(run())
    samples = interleaved(runs, args.repeats)
    return {name: summary(values) for name, values in samples.items()}


def crossover(shape, causal, masked, gradients, args):
    """The row of a shape: where the features become faster, and what was timed on the way."""
    low, high = (round(STEPS_PER_OCTAVE * math.log2(x)) for x in (LEAST, MOST))
    times = {}
    while high - low > 1:
        step = (low + high) // 2
        length = round(2 ** (step / STEPS_PER_OCTAVE))
        times[length] = timed(shape, length, causal, masked, gradients, args)
        faster = times[length]["linear"]["median"] < times[length]["exact"]["median"]
        low, high = (low, step) if faster else (step, high)
    row = dict(zip(("head_dim", "num_features", "heads", "kv_heads"), shape, strict=True))
    row |= {"causal": causal, "masked": masked, "pass": PASSES[gradients]}
    row |= {"length": round(2 ** ((low + high) / 2 / STEPS_PER_OCTAVE)), "times": times}
    print({name: value for name, value in row.items() if name != "times"}, flush=True)
    return row


def fitted(rows):
    """`ops.crossover.Crossover` for each kind of call, by least squares of logarithms."""
    import numpy as np

    found = {}
    for causal, gradients in itertools.product((True, False), PASSES):
        own = [
            row
            for row in rows
            if row["causal"] == causal and row["pass"] == gradients and not row["masked"]
        ]
        sizes = [
            (row["num_features"] / 128, row["head_dim"] / 64, row["heads"] // row["kv_heads"])
            for row in own
        ]
        if not own:
            continue
        x = np.log([(math.e, *size) for size in sizes])
        y = np.log([row["length"] for row in own])
        fit = np.linalg.lstsq(x, y, rcond=None)[0]
        off = np.exp(np.abs(y - x @ fit))
        found[f"{'causal' if causal else 'all'}, {gradients}"] = {
            "length": round(math.exp(fit[0])),
            **dict(zip(("features", "head_dim", "groups"), fit[1:].round(2).tolist(), strict=True)),
            "off": {"median": round(np.median(off).item(), 2), "most": round(off.max().item(), 2)},
        }
    return found


def main():
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=9)
    args = made.parse_args()
    one_thread()
    sizes, heads, passes = SIZES, HEADS, (False, True)
    if backend() != "torch":  # where every length is compiled anew
        sizes, heads, passes = SIZES[::2], HEADS[::2], (False,)
    if args.quick:
        sizes, heads = sizes[:1], heads[:1]
    rows = []
    for size, of_heads in itertools.product(sizes, heads):
        for causal, gradients in itertools.product((True, False), passes):
            rows.append(crossover((*size, *of_heads), causal, False, gradients, args))
    for causal, gradients in itertools.product((True, False), passes):
        rows.append(crossover((*sizes[-1], *heads[0]), causal, True, gradients, args))
    fits = fitted(rows)
    print(*fits.items(), sep="\n")
    if not args.quick:
        payload = {"unit": "ms, median and interquartile range", "rows": rows, "fits": fits}
        write("crossover", payload | environment())


if __name__ == "__main__":
    main()
