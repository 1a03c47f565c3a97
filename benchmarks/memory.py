"""Peak temporary memory of causal attention against length: linear and exact.

    KERAS_BACKEND=torch python benchmarks/memory.py

Every figure comes from a process of its own: the peak resident memory after
the operation, compilation included, less that before it, when libraries and
inputs are loaded and a short sequence has been run. Writes
benchmarks/results/memory_BACKEND.json.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

HEADS, HEAD_DIM, NUM_FEATURES = 4, 64, 128
LENGTHS = {"linear": (1024, 2048, 4096, 8192, 16384), "exact": (1024, 2048, 4096)}
RESULTS = pathlib.Path(__file__).parent / "results"


def measure(kind, gradients, length):
    """Bytes of peak memory above the inputs, in this process."""
    import keras
    import numpy as np
    from keras import ops

    from keras_darkformer.ops import dark_attention, draw_projection

    geometry = ops.convert_to_tensor(np.stack([np.eye(HEAD_DIM)] * HEADS).astype("float32"))
    projection = ops.convert_to_tensor(draw_projection(NUM_FEATURES, HEAD_DIM, seed=0))

    def attend(query, key, value):
        if kind == "linear":
            output = dark_attention(query, key, value, geometry, projection, causal=True)
        else:
            output = ops.dot_product_attention(query, key, value, is_causal=True)
        return ops.sum(ops.square(output))

    run = differentiated(attend) if gradients else compiled(attend)

    def inputs(size):
        rng = np.random.default_rng(0)
        shape = (1, size, HEADS, HEAD_DIM)
        return [keras.Variable(rng.standard_normal(shape, dtype="float32")).value for _ in range(3)]

    finish(run(*inputs(64)))
    arguments = inputs(length)
    reset_peak()
    before = peak()
    finish(run(*arguments))
    return peak() - before


def compiled(function):
    backend = os.environ["KERAS_BACKEND"]
    if backend == "jax":
        import jax

        return jax.jit(function)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    return function


def differentiated(function):
    backend = os.environ["KERAS_BACKEND"]
    if backend == "jax":
        import jax

        return jax.jit(jax.grad(function, argnums=(0, 1, 2)))
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def gradient(*arguments):
            with tf.GradientTape() as tape:
                tape.watch(arguments)
                result = function(*arguments)
            return tape.gradient(result, arguments)

        return gradient

    import torch

    def gradient(*arguments):
        arguments = [argument.detach().requires_grad_() for argument in arguments]
        return torch.autograd.grad(function(*arguments), arguments)

    return gradient


def finish(results):
    from keras import ops, tree

    for leaf in tree.flatten(results):
        ops.convert_to_numpy(leaf.detach() if hasattr(leaf, "detach") else leaf)


def peak():
    """Peak resident memory since `reset_peak`, in bytes (Linux)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def reset_peak():
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if args.measure:
        kind, gradients, length = args.measure
        print(measure(kind, gradients == "gradients", int(length)))
        return

    rows = []
    for gradients in ("forward", "gradients"):
        for length in LENGTHS["linear"]:
            samples = {kind: [] for kind, lengths in LENGTHS.items() if length in lengths}
            for _ in range(args.repeats):
                for kind, values in samples.items():
                    command = [sys.executable, __file__, "--measure", kind, gradients, str(length)]
                    run = subprocess.run(command, capture_output=True, text=True, check=True)
                    values.append(int(run.stdout.split()[-1]) / 2**20)
            row = {"pass": gradients, "length": length}
            for kind, values in samples.items():
                row[f"{kind}_mib"] = round(statistics.median(values), 1)
                row[f"{kind}_spread_mib"] = round(max(values) - min(values), 1)
            rows.append(row)
            print(row, flush=True)

    import keras
    import numpy as np

    backend = keras.config.backend()
    library = __import__({"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}[backend])
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"memory_{backend}.json"
    path.write_text(
        json.dumps(
            {
                "shape": {"heads": HEADS, "head_dim": HEAD_DIM, "num_features": NUM_FEATURES},
                "rows": rows,
                "repeats": args.repeats,
                "versions": {
                    "python": platform.python_version(),
                    "keras": keras.__version__,
                    "numpy": np.__version__,
                    backend: library.__version__,
                },
                "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
            },
            indent=1,
        )
        + "\n"
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
