"""What `torch.compile` makes of attention: time beside eager PyTorch, and what compiling takes.

    KERAS_BACKEND=torch python benchmarks/torch_compile.py [--quick]

Programs are of one length, and forward also of any: PyTorch 2.13 fails to compile gradients of a
length that is marked as dynamic. Compiling is timed by the clock on the wall, as a user waits for
it, and needs a C++ compiler on the CPU.
"""

import time

from common import (
    backend,
    environment,
    finish,
    interleaved,
    one_thread,
    parser,
    print_table,
    summary,
    write,
)

HEADS, HEAD_DIM, FEATURES = 8, 64, 128
LENGTHS = (512, 2048)


def attention(length, causal, gradients, any_length):
    """`dark_attention`, and a function that runs it, or what was compiled of it."""
    import numpy as np
    import torch

    from keras_darkformer.ops import dark_attention, draw_projection

    rng = np.random.default_rng(0)
    shape = (1, length, HEADS, HEAD_DIM)
    tokens = [torch.tensor(rng.standard_normal(shape), dtype=torch.float32) for _ in range(3)]
    geometry = torch.eye(HEAD_DIM).repeat(HEADS, 1, 1)
    projection = torch.tensor(draw_projection(FEATURES, HEAD_DIM, seed=0), dtype=torch.float32)
    for x in tokens:
        x.requires_grad_(gradients)
        if any_length:
            torch._dynamo.mark_dynamic(x, 1)

    def forward(query, key, value):
        return dark_attention(query, key, value, geometry, projection, causal=causal)

    def run(function):
        if not gradients:
            with torch.no_grad():
                return function(*tokens)
        return torch.autograd.grad(function(*tokens).sum(), tokens)

    return forward, run


def measured(length, causal, gradients, any_length, repeats):
    """Times of both, and the seconds until the first result of the compiled one."""
    import torch

    torch._dynamo.reset()
    forward, run = attention(length, causal, gradients, any_length)
    program = torch.compile(forward, fullgraph=True, dynamic=None if any_length else False)
    started = time.perf_counter()
    finish(run(program))
    seconds = time.perf_counter() - started
    functions = {"eager": lambda: run(forward), "compiled": lambda: run(program)}
    times = interleaved(functions, repeats)
    return {
        "length": length,
        "causal": causal,
        "pass": "forward and backward" if gradients else "forward",
        "any_length": any_length,
        "seconds_to_compile": round(seconds, 1),
        "milliseconds": {name: summary(times[name]) for name in times},
    }


def main():
    args = parser(__doc__).parse_args()
    if backend() != "torch":
        raise SystemExit("torch.compile is of PyTorch: set KERAS_BACKEND=torch.")
    one_thread()
    rows = [
        measured(length, causal, *how, 3 if args.quick else 15)
        for causal in (True, False)
        for length in (LENGTHS[:1] if args.quick else LENGTHS)
        for how in ((False, False), (True, False), (False, True))
    ]
    sizes = {"heads": HEADS, "head_dim": HEAD_DIM, "features": FEATURES, "batch": 1}
    if not args.quick:
        write("torch_compile", {**environment(), "sizes": sizes, "rows": rows})
    lines = []
    for row in rows:
        eager, compiled = (row["milliseconds"][x]["median"] for x in ("eager", "compiled"))
        named = [row[x] for x in ("length", "causal", "pass", "any_length", "seconds_to_compile")]
        lines.append([*named, eager, compiled, round(eager / compiled, 2)])
    columns = ["tokens", "causal", "pass", "of any length", "s to compile"]
    columns += ["eager ms", "compiled ms", "ratio"]
    print_table(columns, lines)


if __name__ == "__main__":
    main()
