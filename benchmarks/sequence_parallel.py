"""What a sequence split over devices costs: bytes received per device, and time.

    KERAS_BACKEND=jax python benchmarks/sequence_parallel.py [--quick]

The bytes are counted in the compiled program, so they are exact and hold on any
machine. The devices are virtual ones of this CPU and share its cores: the times
show what splitting adds, never a speed-up.
"""

import os
import re
import time

import jax
import numpy as np
from common import backend, environment, interleaved, parser, print_table, summary, write
from jax.sharding import Mesh, PartitionSpec

from keras_darkformer.ops import draw_projection, sequence_parallel_dark_attention

HEADS, HEAD_DIM, FEATURES = 2, 64, 128
DEVICES = (1, 2, 4, 8)
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"


def eight_devices():
    """Makes eight devices of this CPU, which JAX does when it is first asked for some."""
    flag = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if len(jax.devices()) < 8:
        raise SystemExit("JAX had started before it was told to make eight devices.")


def received(text, devices):
    """Bytes that each device receives in one run of a compiled program.

    An all-gather brings what it does not have yet; a sum goes once round and
    its result once more, as rings of devices do it.
    """
    total = 0
    for line in text.splitlines():
        found = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
        if found is None:
            continue
        result, kind, _ = found.groups()
        size = sum(
            BYTES[dtype] * int(np.prod([int(x) for x in shape.split(",") if x]))
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
        )
        share = (devices - 1) / devices
        total += {
            "all-gather": size * share,
            "all-reduce": 2 * size * share,
            "reduce-scatter": size * (devices - 1),
            "collective-permute": size,
            "all-to-all": size * share,
        }[kind]
    return int(total)


def program(length, devices, gradient, causal):
    """A compiled run on so many devices, and its arguments; gradients by query, key, value."""
    rng = np.random.default_rng(0)
    shape = (1, length, HEADS, HEAD_DIM)
    arguments = [0.5 * rng.standard_normal(shape).astype("float32") for _ in range(3)]
    arguments.append(np.stack([np.eye(HEAD_DIM, dtype="float32")] * HEADS))
    projection = draw_projection(FEATURES, HEAD_DIM, seed=0)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("sequence",))
    part, whole = PartitionSpec(None, "sequence"), PartitionSpec()

    def attend(query, key, value, geometry):
        return sequence_parallel_dark_attention(
            *(query, key, value, geometry, projection), axis_name="sequence", causal=causal
        )

    split = jax.shard_map(attend, mesh=mesh, in_specs=(part, part, part, whole), out_specs=part)
    run = split
    if gradient:
        run = jax.grad(lambda *x: split(*x).sum(), argnums=(0, 1, 2))
    placed = [
        jax.device_put(x, jax.sharding.NamedSharding(mesh, part if i < 3 else whole))
        for i, x in enumerate(arguments)
    ]
    return jax.jit(run).lower(*placed).compile(), placed


def keys_and_values(length, devices, gradient):
    """What ring attention passes round, as does gathering all keys and values.

    Backward they come once more, and the gradients of both go round with them.
    """
    size = 2 * length * HEADS * HEAD_DIM * 4 * (devices - 1) // devices
    return size * (3 if gradient else 1)


def main():
    args = parser(__doc__).parse_args()
    if backend() != "jax":
        raise SystemExit("The sequence is split by jax.shard_map: set KERAS_BACKEND=jax.")
    eight_devices()
    lengths = (2048, 8192) if args.quick else (2048, 8192, 32768)
    repeats = 3 if args.quick else 5
    rows = []
    for causal in (True, False):
        for gradient in (False, True):
            for length in lengths:
                functions, counted = {}, {}
                for devices in DEVICES:
                    run, placed = program(length, devices, gradient, causal)
                    counted[devices] = received(run.as_text(), devices)
                    functions[devices] = lambda run=run, placed=placed: run(*placed)
                seconds = interleaved(functions, repeats, clock=time.perf_counter, warmups=1)
                for devices in DEVICES:
                    row = {
                        "causal": causal,
                        "pass": "forward and backward" if gradient else "forward",
                        "length": length,
                        "devices": devices,
                        "bytes_received": counted[devices],
                        "ring_attention_bytes": keys_and_values(length, devices, gradient),
                        "milliseconds": summary(seconds[devices]),
                    }
                    rows.append(row)
    sizes = {"heads": HEADS, "head_dim": HEAD_DIM, "features": FEATURES, "batch": 1}
    payload = {
        **environment(),
        "sizes": sizes,
        "virtual_devices": "they share the cores: times are no speed-ups",
        "rows": rows,
    }
    if not args.quick:
        write("sequence_parallel", payload)
    columns = [name for name in rows[0] if name != "milliseconds"]
    table = [[*(row[x] for x in columns), row["milliseconds"]["median"]] for row in rows]
    print_table([*columns, "ms"], table)


if __name__ == "__main__":
    main()
