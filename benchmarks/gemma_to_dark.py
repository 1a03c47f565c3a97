"""One small Gemma four ways: exact, converted and fitted, the paper's way, Performer.

    python benchmarks/gemma_to_dark.py                       # Python's own help topics
    python benchmarks/gemma_to_dark.py --text book.txt       # any other text
    python benchmarks/gemma_to_dark.py --preset gemma_2b_en  # a real Gemma

Trains a small Gemma, or takes a preset. All arms are finetuned for as many
steps on the same text; of the fitted arm the first half of them are
distillation. Perplexities of held-out text are noted after every stage, then
speeds and memory. Writes results/gemma_to_dark.json and
approximation.png; `plots.py` draws the other figure.
"""

import gc
import math
import pathlib
import tempfile
import time

import common
import keras
import keras_hub
import numpy as np
from small_gemma import CHARACTERS_PER_TOKEN, compile_for_training, train_gemma, windows
from text import load_text, split_text

from keras_darkformer import (
    LossSpikeCounter,
    approximation_report,
    calibrate,
    convert_to_dark,
    distil,
    transfer_attention,
)

# What each arm is converted with.
ARMS = {
    "exact": None,
    "dark": {"tie_geometry": False},
    "paper": {"geometry_scale": 1.0},
    "performer": {"geometry_scale": 1.0, "train_geometry": False},
}
READING_LENGTHS = (256, 1024, 4096)
CACHE_LENGTHS = (256, 1024, 4096, 16384, 65536)


def parse_arguments():
    made = common.parser(__doc__)
    add = made.add_argument
    add("--text", help="a text file; default: Python's own help topics")
    add("--preset", help="a Gemma preset to start from instead of training one")
    add("--num-features", type=int, default=64)
    add("--sequence-length", type=int, default=256)
    add("--batch-size", type=int, default=8)
    add("--train-steps", type=int, default=600)
    add("--transfer-steps", type=int, default=60)
    add("--finetune-steps", type=int, default=300)
    add("--finetune-rate", type=float, default=2e-3)
    add("--test-windows", type=int, default=96, help="held-out sequences")
    add("--prompt", default="The statement is")
    add("--generate-length", type=int, default=128, help="tokens")
    add("--seed", type=int, default=0)
    args = made.parse_args()
    if args.quick:
        args.sequence_length, args.generate_length, args.test_windows = 32, 24, 8
        args.train_steps, args.transfer_steps, args.finetune_steps = 3, 2, 4
    return args


class StepTimes(keras.callbacks.Callback):
    """Seconds and loss of every step."""

    def __init__(self):
        super().__init__()
        self.seconds, self.losses = [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        # Keras reports the mean over the epoch so far.
        mean, count = float(logs["loss"]), len(self.losses)
        self.losses.append(mean * (count + 1) - sum(self.losses))
        self.seconds.append(time.perf_counter() - self.started)


class Arm:
    """One model, and the perplexities of its stages."""

    def __init__(self, name, preset, data, args):
        self.name, self.preset, self.data, self.args = name, preset, data, args
        self.stages = {}
        self.model = self.load()
        if ARMS[name] is not None:
            options = {"num_features": args.num_features, "seed": args.seed} | ARMS[name]
            self.model = convert_to_dark(self.model, **options)
        compile_for_training(self.model, args.finetune_steps, args.finetune_rate)
        self.judge("converted")

    def load(self):
        model = keras_hub.models.CausalLM.from_preset(self.preset)
        model.preprocessor.sequence_length = self.args.sequence_length
        return model

    def judge(self, stage):
        size = self.args.batch_size
        loss = self.model.evaluate(self.data["test"], batch_size=size, verbose=0)
        self.stages[stage] = math.exp(loss)
        print(f"{self.name}, {stage}: perplexity {self.stages[stage]:.2f}", flush=True)

    def fit_features(self):
        """Calibration and transfer."""
        args = self.args
        calibrate(self.model, self.data["calibrate"], seed=args.seed)
        self.judge("calibrated")
        transfer_attention(
            self.model,
            self.data["transfer"],
            steps=args.transfer_steps,
            learning_rate=1e-2,
            batch_size=args.batch_size,
        )
        self.judge("transferred")
        report = approximation_report(self.model, self.data["calibrate"][: args.batch_size])
        print(report)
        if not args.quick:
            report.plot(common.RESULTS / "approximation.png")

    def distil(self, steps):
        args = self.args
        distil(
            self.model,
            self.load(),
            self.data["finetune"][: steps * args.batch_size],
            steps=steps,
            train="all",
            learning_rate=args.finetune_rate,
            batch_size=args.batch_size,
        )
        self.judge("distilled")

    def finetune(self, skipped=0):
        """On the text that is left after so many steps; seconds and losses, and loss spikes."""
        args, times, spikes = self.args, StepTimes(), LossSpikeCounter()
        compile_for_training(self.model, args.finetune_steps - skipped, args.finetune_rate)
        text = self.data["finetune"][skipped * args.batch_size :]  # drawn at random already
        callbacks = [times, spikes]
        self.model.fit(text, batch_size=args.batch_size, callbacks=callbacks, shuffle=False)
        self.judge("finetuned")
        return times, len(spikes.spikes)


def run_arm(name, preset, data, args):
    arm, skipped = Arm(name, preset, data, args), 0
    if name == "dark":
        arm.fit_features()
        skipped = args.finetune_steps // 2
        arm.distil(skipped)
    times, spikes = arm.finetune(skipped)
    text, seconds = generate(arm.model, args)
    lengths = READING_LENGTHS[:1] if args.quick else READING_LENGTHS
    tokens_per_step = args.batch_size * args.sequence_length
    return {
        "arm": name,
        "perplexities": arm.stages,
        "loss_spikes": spikes,
        "train_tokens_per_second": tokens_per_step / float(np.median(times.seconds[1:])),
        "generate_tokens_per_second": args.generate_length / seconds,
        "reading_tokens_per_second": {n: reading_speed(arm.model, n) for n in lengths},
        "cache_bytes": {n: cache_bytes(arm.model, n) for n in CACHE_LENGTHS},
        "finetuning_losses": times.losses,
        "text": text,
    }


def generate(model, args):
    model.generate(args.prompt, max_length=args.generate_length)  # compiles
    started = time.perf_counter()
    text = model.generate(args.prompt, max_length=args.generate_length)
    return text, time.perf_counter() - started


def reading_speed(model, length, repeats=5):
    """Tokens per second of the backbone's forward pass on 4,096 tokens in sequences of `length`."""
    shape = (max(READING_LENGTHS) // length, length)
    tokens = np.random.default_rng(0).integers(3, model.backbone.vocabulary_size, shape)
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    run = {"read": lambda: model.backbone.predict_on_batch(inputs)}
    seconds = common.interleaved(run, repeats, clock=time.perf_counter, warmups=1)["read"]
    return tokens.size / float(np.median(seconds))


def cache_bytes(model, length):
    """What generation carries for one sequence: states, or keys and values."""
    if hasattr(model, "get_initial_cache"):
        leaves = keras.tree.flatten(model.get_initial_cache(1, length))
        sizes = [(leaf.shape, leaf.dtype) for leaf in leaves]
    else:
        backbone = model.backbone
        per_token = backbone.num_layers * 2 * backbone.num_key_value_heads * backbone.head_dim
        sizes = [((per_token * length,), model.compute_dtype)]
    return common.bytes_of(sizes)


def main():
    args = parse_arguments()
    keras.utils.set_random_seed(args.seed)
    text = split_text(load_text(args.text), CHARACTERS_PER_TOKEN * args.sequence_length)
    size = args.batch_size

    def draw(part, count, seed):
        return windows(text[part], count, args.sequence_length, args.seed + seed)

    data = {
        "calibrate": draw("train", 4 * size, 4),
        "transfer": draw("train", args.transfer_steps * size, 5),
        "finetune": draw("train", args.finetune_steps * size, 2),
        "test": draw("test", args.test_windows, 3),
    }
    with tempfile.TemporaryDirectory() as folder:
        preset = args.preset
        if preset is None:
            preset = str(pathlib.Path(folder) / "exact")
            model = train_gemma(
                text["train"], args.train_steps, size, args.sequence_length, args.seed
            )
            model.save_to_preset(preset)
        rows = []
        for name in ARMS:
            rows.append(run_arm(name, preset, data, args))
            gc.collect()
    show(rows)
    if not args.quick:
        payload = {
            "rows": rows,
            "arguments": {name: str(value) for name, value in vars(args).items()},
            "backend": common.backend(),
            **common.environment("keras-hub"),
        }
        common.write_json(common.RESULTS / "gemma_to_dark.json", payload)


def show(rows):
    common.print_table(
        ["arm", "perplexity", "training tokens/s", "writing tokens/s"],
        [
            [
                row["arm"],
                f"{row['perplexities']['finetuned']:.2f}",
                f"{row['train_tokens_per_second']:,.0f}",
                f"{row['generate_tokens_per_second']:,.0f}",
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
