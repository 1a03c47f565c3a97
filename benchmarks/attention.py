"""Time and memory of the attention operation, ours and what one would pick instead.

    KERAS_BACKEND=torch python benchmarks/attention.py

Every row is one shape, length and direction (forward, or forward and backward);
all ways to compute it take turns in one process:

- dark: `ops.dark_attention` with a geometry that is trained;
- dark_identity: the same with `geometry=None`, where Performer is the peer;
- dark_remat: the same as dark with `remat` turned the other way than its default;
- darkformer_pytorch_C: darkformer-pytorch with `causal_chunk_size=C` (256 is
  its default), its geometry trained too;
- performer_pytorch: performer-pytorch's `FastAttention`, whose projection is
  not trained;
- sdpa: torch's `scaled_dot_product_attention`; cudnn: `jax.nn`'s on a GPU;
- keras: `keras.ops.dot_product_attention`;
- matmul: the product of two matrices of 1,024 x 1,024, the machine's rate.

Each gets its inputs in the layout it likes, keys and values repeated for the
query heads beforehand where it knows no groups. Gradients are those by queries,
keys, values and what is trained. Quadratic ways are left out where they would
take longer than --patience or more memory than --max-gib. Layers are compared
in rows of their own: DarkAttention and Keras' MultiHeadAttention or
GroupQueryAttention. Peak memory comes from a process for each figure. Writes
benchmarks/results/attention_BACKEND.json.
"""

import argparse
import ctypes
import itertools
import json
import math
import statistics

from common import (
    accelerator,
    backend,
    compiled,
    default_clock,
    environment,
    finish,
    in_process,
    interleaved,
    one_thread,
    peak,
    print_table,
    reset_peak,
    summary,
    write,
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
CHUNKS = (64, 128, 256, 512)
EXACT = ("sdpa", "cudnn", "keras", "layer_keras")  # quadratic in the length
MATMUL = 1024


# === The ways ===


class Way:
    """A function, its inputs, and the weights that are trained: arguments, or a module's own."""

    def __init__(self, function, inputs, trained=()):
        self.function, self.inputs, self.trained = function, inputs, list(trained)


def ways_of(shape, length, causal, names=None, dtype="float32", compile=False):
    """The ways this backend has, by name, on the same random inputs; `names`: only these."""
    import numpy as np
    from keras import ops

    from keras_darkformer.ops import dark_attention, draw_projection

    heads, kv_heads, head_dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    rng = np.random.default_rng(0)

    def draw(count):
        array = rng.standard_normal((1, length, count, head_dim), dtype="float32")
        return ops.convert_to_tensor(array, dtype=dtype)

    query, key, value = draw(heads), draw(kv_heads), draw(kv_heads)
    projection = draw_projection(shape["num_features"], head_dim, seed=0)
    projection = ops.convert_to_tensor(projection, dtype="float32")
    geometry = ops.convert_to_tensor(np.stack([np.eye(head_dim)] * kv_heads), dtype="float32")

    def dark(query, key, value, geometry=None, **options):
        return dark_attention(query, key, value, geometry, projection, causal=causal, **options)

    def dark_remat(*tensors):  # JAX does it by default
        return dark(*tensors, remat=backend() != "jax")

    def keras_attention(query, key, value):
        return ops.dot_product_attention(query, key, value, is_causal=causal)

    def wide(tensor):
        return ops.repeat(tensor, heads // kv_heads, axis=2)

    plain = [query, key, value]
    makers = {
        "dark": lambda: Way(dark, plain, [geometry]),
        "dark_remat": lambda: Way(dark_remat, plain, [geometry]),
        "keras": lambda: Way(keras_attention, [query, wide(key), wide(value)]),
    }
    if not causal:
        makers["dark_identity"] = lambda: Way(dark, plain)
    if backend() == "jax" and accelerator():

        def cudnn(query, key, value):
            import jax

            return jax.nn.dot_product_attention(
                query, key, value, is_causal=causal, implementation="cudnn"
            )

        makers["cudnn"] = lambda: Way(cudnn, plain)
    if backend() == "torch":
        makers |= torch_ways(shape, causal, plain, wide, compile)
    return {name: make() for name, make in makers.items() if names is None or name in names}


def torch_ways(shape, causal, plain, wide, compile):
    import torch
    from darkformer_pytorch.attention import DarkformerKernelAttention
    from performer_pytorch.performer_pytorch import FastAttention
    from torch.nn import functional

    query, key, value = plain
    sizes = {"head_dim": shape["head_dim"], "num_features": shape["num_features"]}

    def head_first(*tensors):
        return [tensor.transpose(1, 2).contiguous() for tensor in tensors]

    def sdpa(query, key, value):
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
        )

    def darkformer(chunk):
        module = DarkformerKernelAttention(
            num_heads=shape["heads"],
            causal=causal,
            causal_chunk_size=chunk,
            projection_seed=0,
            **sizes,
        ).to(query.device, query.dtype)
        module = module.eval()
        function = torch.compile(module) if compile else module
        return Way(function, head_first(query, wide(key), wide(value)), module.parameters())

    def performer():
        module = FastAttention(
            shape["head_dim"], nb_features=shape["num_features"], causal=causal
        ).to(query.device)
        return Way(module, head_first(query, wide(key), wide(value)))

    chunks = CHUNKS if causal else (256,)
    return {
        "sdpa": lambda: Way(sdpa, head_first(query, key, value)),
        "performer_pytorch": performer,
        **{f"darkformer_pytorch_{c}": lambda c=c: darkformer(c) for c in chunks},
    }


def layer_ways(shape, length, dtype="float32"):
    """Self-attention layers, projections included."""
    import keras
    import numpy as np
    from keras import ops

    from keras_darkformer import DarkAttention

    heads, kv_heads, head_dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    array = np.random.default_rng(0).standard_normal((1, length, heads * head_dim), "float32")
    inputs = ops.convert_to_tensor(array, dtype=dtype)
    if heads == kv_heads:
        theirs = keras.layers.MultiHeadAttention(heads, head_dim, dtype=dtype)
    else:
        theirs = keras.layers.GroupQueryAttention(head_dim, heads, kv_heads, dtype=dtype)
    ours = DarkAttention(
        head_dim,
        heads,
        kv_heads,
        num_features=shape["num_features"],
        dtype=dtype,
    )
    theirs.build(inputs.shape, inputs.shape)
    ours.build(inputs.shape, inputs.shape)

    def of_layer(layer):
        """Its output, and its gradients by the inputs and all trainable weights."""

        def function(inputs, *weights):
            if backend() == "torch":
                return layer(inputs, inputs, use_causal_mask=True)
            weights, others = list(weights), [v.value for v in layer.non_trainable_variables]
            return layer.stateless_call(weights, others, inputs, inputs, use_causal_mask=True)[0]

        weights = [variable.value for variable in layer.trainable_variables]
        return Way(function, [inputs], weights)

    return {
        "layer_dark": of_layer(ours),
        "layer_keras": of_layer(theirs),
    }


# === Running them ===


def runner(way, gradients, *, compile=False):
    """A function without arguments that computes the way's output, or its gradients."""
    arguments = [*way.inputs, *way.trained]
    if backend() == "torch":
        return torch_runner(way, gradients, compile)
    function = gradient_function(way) if gradients else compiled(way.function)
    return lambda: function(*arguments)


def gradient_function(way):
    """Gradients by inputs and weights, given one by the output: ones."""
    if backend() == "jax":
        import jax
        from jax import numpy as jnp

        def gradient(*arguments):
            output, backward = jax.vjp(way.function, *arguments)
            return backward(jnp.ones_like(output))

        return jax.jit(gradient)

    import tensorflow as tf

    @tf.function(jit_compile=True)
    def gradient(*arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            output = way.function(*arguments)
        return tape.gradient(output, arguments, unconnected_gradients="zero")

    return gradient


def torch_runner(way, gradients, compile):
    import torch

    own = bool(way.trained) and isinstance(way.trained[0], torch.nn.Parameter)
    function = compiled(way.function, compile=compile)
    weights = [weight.detach().requires_grad_(gradients) for weight in way.trained]
    if own:
        weights = [weight for weight in way.trained if weight.requires_grad]

    def run():
        inputs = [tensor.detach().requires_grad_(gradients) for tensor in way.inputs]
        with torch.set_grad_enabled(gradients):
            output = function(*inputs, *([] if own else weights))
        if not gradients:
            return output
        return torch.autograd.grad(
            output, [*inputs, *weights], torch.ones_like(output), allow_unused=True
        )

    return run


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


def matmul_way():
    import numpy as np
    from keras import ops

    array = np.random.default_rng(0).standard_normal((MATMUL, MATMUL)).astype("float32")
    return Way(lambda x: x @ x, [ops.convert_to_tensor(array)])


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
        "pass": "forward + backward" if gradients else "forward",
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


def measure_memory(name, label, gradients, length, args):
    """Bytes of peak memory above the inputs, in this process; `None`: no such way here."""

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
    return peak() - before


def memory_rows(args):
    label = "h64 m128"
    names = {
        "torch": ("dark", "dark_remat", "darkformer_pytorch_256", "sdpa", "keras"),
        "jax": ("dark", "dark_remat", "cudnn", "keras"),
        "tensorflow": ("dark", "dark_remat", "keras"),
    }[backend()]
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
                arguments = ["--measure", name, label, int(gradients), length]
                arguments += ["--dtype", args.dtype, *(["--compile"] if args.compile else [])]
                samples = [in_process(arguments) for _ in range(args.memory_repeats)]
                if None not in samples:
                    mib[name] = round(statistics.median(samples) / 2**20, 1)
            row = {"shape": label, "length": length, "causal": True, "mib": mib}
            row["pass"] = "forward + backward" if gradients else "forward"
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="aim for the rounds of a row")
    parser.add_argument("--repeats", type=int, nargs=2, default=(5, 30), help="least and most")
    parser.add_argument("--patience", type=float, default=4.0, help="seconds a call may take")
    parser.add_argument("--max-gib", type=float, default=6.0)
    parser.add_argument("--memory-repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--quick", action="store_true", help="short, and writes no results")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        one_thread()
        name, label, gradients, length = args.measure
        print(json.dumps(measure_memory(name, label, gradients == "1", int(length), args)))
        return

    args.exhausted = {}
    args.memory_lengths, lengths, layer_lengths = MEMORY_LENGTHS, LENGTHS, LAYER_LENGTHS
    one_head_lengths = ONE_HEAD_LENGTHS
    if args.quick:
        one_head_lengths = {True: (), False: ()}
        args.repeats, args.seconds, args.memory_repeats = (2, 2), 0.1, 1
        args.memory_lengths = layer_lengths = (512,)
        lengths = {True: (512, 1024), False: (512,)}

    # Before this process starts its backend: two do not share a GPU well.
    memory = memory_rows(args)
    one_thread()
    rows = []
    for label in SHAPES:
        for causal in (True, False):
            for length in (one_head_lengths if "1 head" in label else lengths)[causal]:
                for gradients in (False, True):
                    rows.append(time_row(label, length, causal, gradients, args))
                    show(rows[-1:])
    for label in ("h64 m128", "h256 m256 8:1"):
        for length in layer_lengths:
            for gradients in (False, True):
                rows.append(layer_row(label, length, gradients, args))
                show(rows[-1:])
    gflops = add_floor_shares(rows)
    exact = next(name for name in EXACT if any(name in row["ratios"] for row in rows))
    crossovers = [
        {
            "shape": label,
            "pass": "forward + backward" if gradients else "forward",
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
        write("attention", payload, "compile" if args.compile else "")


if __name__ == "__main__":
    main()
