"""Peak memory and time of a step of distillation with a large vocabulary.

    KERAS_BACKEND=torch python benchmarks/distil_memory.py

A process for each figure: it makes a small Gemma with a large vocabulary and a
dark copy of it, and distils the one into the other, from the whole vocabulary
or from the likeliest tokens. Writes results/distil_memory_BACKEND.json: the
peak of memory above what was there before the first step, and the median time
of the steps after the first; `null` where the machine had too little memory.
"""

import argparse
import itertools
import json
import statistics

from common import (
    backend,
    default_clock,
    environment,
    in_process,
    peak,
    print_table,
    reset_peak,
    write,
)

SIZES = {
    "num_layers": 1,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 64,
    "intermediate_dim": 128,
    "head_dim": 32,
}
STEPS = 4


def measure(args, top_k):
    """Bytes of the peak over what the process had before, and seconds of a step."""
    import keras
    import numpy as np
    from keras_hub.models import GemmaBackbone, GemmaCausalLM

    import keras_darkformer as kd

    def distil(vocabulary, length, callbacks=()):
        teacher = GemmaCausalLM(GemmaBackbone(vocabulary_size=vocabulary, **SIZES))
        dark = kd.convert_to_dark(teacher, num_features=args.features, copy=True)
        shape = (args.batch, length)
        token_ids = np.random.default_rng(0).integers(1, vocabulary, shape).astype("int32")
        batch = {"token_ids": token_ids, "padding_mask": np.ones(shape, "int32")}
        reset_peak()
        before = peak()
        kd.distil(
            dark, teacher, batch, steps=STEPS, top_k=top_k, callbacks=list(callbacks), verbose=0
        )
        return peak() - before

    ends, clock = [], default_clock()
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs=None: ends.append(clock())
    )
    distil(64 if top_k is None else 2 * top_k, 16)  # imports and first calls are done after it
    taken = distil(args.vocabulary, args.length, [watch])
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return {"peak": taken, "seconds_per_step": round(statistics.median(seconds), 3)}


def measured(part, options):
    try:
        return in_process(["--measure", part, *options])
    except RuntimeError as error:  # killed: it takes more memory than there is
        if "ended with -9" not in str(error):
            raise
        return {"peak": None, "seconds_per_step": None}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--variant", default="", help="ends the name of the file of results")
    parser.add_argument("--measure", choices=("whole", "top_k"), help="this one alone, here")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args, args.top_k if args.measure == "top_k" else None)))
        return
    sizes = {name: getattr(args, name) for name in ("vocabulary", "batch", "length", "features")}
    sizes["top_k"] = args.top_k
    options = [x for name, value in sizes.items() for x in (f"--{name.replace('_', '-')}", value)]
    rows = {part: measured(part, options) for part in ("whole", "top_k")}
    logits = 4 * args.vocabulary * args.batch * args.length
    write(
        "distil_memory",
        {"environment": environment("keras-hub"), "sizes": sizes, "logits": logits, "rows": rows},
        args.variant,
    )
    print_table(
        ("backend", "targets", "peak GB", "peak / logits", "s/step"),
        [
            (
                backend(),
                part if part == "whole" else f"top {args.top_k}",
                f"{row['peak'] / 1e9:.2f}" if row["peak"] else "killed",
                f"{row['peak'] / logits:.2f}" if row["peak"] else "",
                row["seconds_per_step"],
            )
            for part, row in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
