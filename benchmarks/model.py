"""A whole small Gemma by length: exact attention against converted.

    KERAS_BACKEND=torch python benchmarks/model.py

Two things are timed, as a user would run them, in tokens per second:

- train: `train_on_batch` of one sequence;
- generate: `generate` after a prompt. The time of a call that writes one token
  only is taken too; the difference is what the other tokens take.

Exact and converted take turns in one process per length. Peak memory comes
from a process of its own for each figure: the peak of a second call, above
what the process held before the first, when the model stood and had run on a
short sequence. A length that would take exact attention more than --max-gib is
skipped. Weights are random: neither time nor memory depends on them. Writes
benchmarks/results/model_BACKEND.json.
"""

import json
import statistics
import sys

from common import (
    answer,
    environment,
    finish,
    in_process,
    interleaved,
    one_thread,
    parser,
    peak,
    print_table,
    reset_peak,
    summary,
    write,
)

VARIANTS = ("exact", "dark")
SHORT = 32


def parse_arguments():
    made = parser(__doc__)
    add = made.add_argument
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    add("--generate", type=int, default=64, help="tokens written after the prompt")
    add("--layers", type=int, default=4)
    add("--query-heads", type=int, default=4)
    add("--key-value-heads", type=int, default=1)
    add("--head-dim", type=int, default=64)
    add("--hidden-dim", type=int, default=256)
    add("--intermediate-dim", type=int, default=1024)
    add("--vocabulary", type=int, default=512)
    add("--num-features", type=int, default=128)
    add("--dtype", default="float32", help="policy, such as mixed_bfloat16")
    add("--max-gib", type=float, default=8, help="skip exact attention above")
    add("--repeats", type=int, default=5)
    args = made.parse_args()
    if args.quick:
        args.lengths, args.generate, args.layers, args.repeats = [256], 8, 2, 2
    return args


# === What is measured ===


def build(variant, args):
    import keras
    from models import gemma

    from keras_darkformer import convert_to_dark

    keras.config.set_dtype_policy(args.dtype)
    keras.utils.set_random_seed(0)
    model = gemma(
        vocabulary_size=args.vocabulary,
        num_layers=args.layers,
        num_query_heads=args.query_heads,
        num_key_value_heads=args.key_value_heads,
        hidden_dim=args.hidden_dim,
        intermediate_dim=args.intermediate_dim,
        head_dim=args.head_dim,
    )
    if variant == "dark":
        model = convert_to_dark(model, num_features=args.num_features)
    model.compile()
    return model


def random_tokens(length, args):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(3, args.vocabulary, (1, length), dtype="int32")


def training(model, length, args):
    import numpy as np

    tokens = random_tokens(length + 1, args)
    inputs = {
        "token_ids": tokens[:, :-1],
        "padding_mask": np.ones((1, length), "int32"),
    }
    return lambda: model.train_on_batch(inputs, tokens[:, 1:])


def generation(model, length, args, count):
    """Writes `count` tokens to the end of the buffer, whose size is the same for all counts.

    So one compiled function, and one cache, serves them.
    """
    import numpy as np

    size = length + args.generate
    filled = np.arange(size)[None, :] < size - count
    inputs = {
        "token_ids": random_tokens(size, args) * filled,
        "padding_mask": filled.astype("int32"),
    }
    return lambda: model.generate(dict(inputs), stop_token_ids=None)


def task(kind, model, length, args):
    if kind == "train":
        return training(model, length, args)
    return generation(model, length, args, args.generate)


def measure_time(kind, length, variants, args):
    """Lists of seconds, by variant, of one token's generation also."""
    functions = {}
    for variant in variants:
        model = build(variant, args)
        functions[variant] = task(kind, model, length, args)
        if kind == "generate":
            functions[f"{variant}_first"] = generation(model, length, args, 1)
    return interleaved(functions, args.repeats)


def measure_memory(kind, length, variant, args):
    """Bytes."""
    model = build(variant, args)
    finish(task(kind, model, SHORT, args)())
    reset_peak()
    before = peak()
    run = task(kind, model, length, args)
    finish(run())  # compiles, which needs memory too
    reset_peak()
    finish(run())
    return peak() - before


# === Rows ===


def attention_gib(kind, length, args):
    """About what the (t, t) tensors of exact attention take.

    In training those that each layer keeps for its gradient and those the
    gradient itself is busy with; in generation, those of one layer.
    """
    count = 2 * args.layers + 3 if kind == "train" else 5
    size = length if kind == "train" else length + args.generate
    return count * args.query_heads * size**2 * 4 / 2**30


def measure_row(kind, length, args):
    """One row: each variant's memory, then both variants' times."""
    row = {"pass": kind, "length": length}
    need = attention_gib(kind, length, args)
    for variant in VARIANTS:
        if variant == "exact" and need > args.max_gib:
            reason = f"about {need:.1f} GiB for attention alone, limit {args.max_gib:g} GiB"
            row[variant] = {"skipped": reason}
            continue
        try:
            memory = in_process("memory", kind, length, variant)
            row[variant] = {"peak_mib": round(memory / 2**20, 1)}
        except RuntimeError as error:  # out of memory, most likely
            print(error, file=sys.stderr)
            row[variant] = {"skipped": "its process failed"}
    variants = [variant for variant in VARIANTS if "skipped" not in row[variant]]
    if not variants:
        return row
    seconds = in_process("time", kind, length, *variants)
    for variant in variants:
        row[variant] |= rates(kind, length, seconds, variant, args)
    if len(variants) == len(VARIANTS):
        exact, dark = (row[variant]["tokens_per_second"] for variant in VARIANTS)
        row["speedup"] = round(dark / exact, 2)
    return row


def rates(kind, length, seconds, variant, args):
    tokens = length if kind == "train" else args.generate
    whole = seconds[variant]
    result = {
        "milliseconds": summary(whole),
        "tokens_per_second": round(tokens / statistics.median(whole), 1),
    }
    if kind == "generate":
        first = seconds[f"{variant}_first"]
        rest = statistics.median(a - b for a, b in zip(whole, first, strict=True))
        result["milliseconds_to_first"] = summary(first)
        result["milliseconds_each_further"] = round(1000 * rest / (args.generate - 1), 4)
    return result


def show(rows):
    def cells(row, variant):
        result = row[variant]
        if "skipped" in result:
            return ["skipped", "-", "-"]
        spread = result["milliseconds"]["spread"] / result["milliseconds"]["median"]
        each = result.get("milliseconds_each_further", "-")
        rate = f"{result['tokens_per_second']:,.0f} ± {spread:.0%}"
        return [rate, each, f"{result['peak_mib']:,.0f}"]

    columns = [f"{variant} {what}" for variant in VARIANTS for what in ("tok/s", "ms/tok", "MiB")]
    print_table(
        ["pass", "length", *columns, "speedup"],
        [
            [
                row["pass"],
                f"{row['length']:,}",
                *(cell for variant in VARIANTS for cell in cells(row, variant)),
                row.get("speedup", "-"),
            ]
            for row in rows
        ],
    )
    print(
        "tok/s: of the whole call, reading the prompt included, ± interquartile range; "
        "ms/tok: of each token after the first; MiB: peak"
    )


def main():
    args = parse_arguments()
    if args.measure:
        one_thread()
        what, kind, length, *variants = args.measure
        if what == "time":
            answer(measure_time(kind, int(length), variants, args))
        else:
            answer(measure_memory(kind, int(length), *variants, args))
        return

    rows = []
    for kind in ("train", "generate"):
        for length in args.lengths:
            rows.append(measure_row(kind, length, args))
            print(json.dumps(rows[-1]), flush=True)
    show(rows)
    if not args.quick:
        settings = {name: value for name, value in vars(args).items() if name != "measure"}
        one_thread()  # as in the processes measured; the backend starts only here
        write("model", {"rows": rows, "settings": settings, **environment("keras-hub")})


if __name__ == "__main__":
    main()
