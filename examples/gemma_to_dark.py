"""Takes a Gemma through its whole life with linear attention.

Builds and trains a small Gemma on text (or takes a preset), converts it with
`convert_to_dark`, fits its features to the model (`calibrate`), has each layer
learn its own softmax (`transfer_attention`) and the whole the exact model's
logits (`distil`). Beside it stand the exact model, Performer and the paper's
own recipe, finetuned on the same text. Then it writes text with a state of
constant size, saves the model as a preset and checks that a fresh process loads
it and writes the same.

    python examples/gemma_to_dark.py                       # Python's own help topics
    python examples/gemma_to_dark.py --text book.txt       # any other text
    python examples/gemma_to_dark.py --preset gemma_2b_en  # a real Gemma

Results go to results/gemma_to_dark: table.json, plot.png and the presets.
"""

import argparse
import gc
import io
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time

import keras
import keras_hub
import matplotlib
import numpy as np
import sentencepiece
from rich.console import Console
from rich.table import Table
from text import load_text, sample_windows, split_text

import keras_darkformer
from keras_darkformer import (
    LossSpikeCounter,
    approximation_report,
    calibrate,
    conversion_report,
    convert_to_dark,
    distil,
    transfer_attention,
)

matplotlib.use("agg")
from matplotlib import pyplot as plt

ARMS = {
    "exact": "exact softmax",
    "dark": "all steps",
    "paper": "M finetuned",
    "performer": "Performer",
}
# What becomes of a model, in this order; not every arm has every stage.
STAGES = ("converted", "calibrated", "transferred", "distilled", "finetuned")
# Characters per token are bounded by this, so that a window of characters
# fills a sequence of tokens.
CHARACTERS_PER_TOKEN = 6
READING_LENGTHS = (256, 1024, 4096)
CACHE_LENGTHS = (256, 1024, 4096, 16384, 65536)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a text file; default: Python's own help topics")
    parser.add_argument("--preset", help="a Gemma preset to start from instead of training one")
    parser.add_argument("--output", default="results/gemma_to_dark", type=pathlib.Path)
    parser.add_argument("--num-features", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--train-steps", type=int, default=600)
    parser.add_argument("--transfer-steps", type=int, default=60)
    parser.add_argument("--finetune-steps", type=int, default=300)
    parser.add_argument("--finetune-rate", type=float, default=2e-3)
    parser.add_argument("--test-windows", type=int, default=96, help="held-out sequences")
    parser.add_argument("--prompt", default="The statement is")
    parser.add_argument("--generate-length", type=int, default=128, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


STARTED = time.perf_counter()


def say(message):
    print(f"\n[{time.perf_counter() - STARTED:4.0f} s] {message}", flush=True)


# === A small Gemma ===


def train_tokenizer(stretches, vocabulary_size=1024):
    """A real SentencePiece tokenizer with Gemma's special tokens."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for stretch in stretches for line in stretch.splitlines() if line),
        model_writer=proto,
        model_type="bpe",
        vocab_size=vocabulary_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
    )
    return keras_hub.models.GemmaTokenizer(proto=proto.getvalue())


def build_gemma(tokenizer, sequence_length):
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(
        tokenizer, sequence_length=sequence_length
    )
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=4,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=128,
        intermediate_dim=768,
        head_dim=32,
    )
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor)


def compile_for_training(model, learning_rate):
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate, weight_decay=0.01, clipnorm=1.0),
        # The mean over real tokens, so that exp(loss) is the perplexity.
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
        sampler="greedy",
    )


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


def perplexity(model, windows, batch_size):
    return math.exp(model.evaluate(windows, batch_size=batch_size, verbose=0))


# === One arm: load, convert, finetune, measure ===


def load_arm(arm, preset, args):
    model = keras_hub.models.CausalLM.from_preset(preset)
    model.preprocessor.sequence_length = args.sequence_length
    options = {"num_features": args.num_features, "seed": args.seed}
    if arm == "dark":
        model = convert_to_dark(model, tie_geometry=False, **options)
    elif arm == "paper":
        model = convert_to_dark(model, geometry_scale=1.0, **options)
    elif arm == "performer":
        model = convert_to_dark(model, geometry_scale=1.0, train_geometry=False, **options)
    return model


def run_arm(arm, preset, data, args):
    say(f"{ARMS[arm]}: loading {preset}" + ("" if arm == "exact" else " and converting it"))
    model = load_arm(arm, preset, args)
    compile_for_training(
        model, keras.optimizers.schedules.CosineDecay(args.finetune_rate, args.finetune_steps)
    )
    stages, finetune = {}, data["finetune"]

    def judge(stage):
        stages[stage] = perplexity(model, data["test"], args.batch_size)
        say(f"{ARMS[arm]}, {stage}: perplexity {stages[stage]:.2f}")

    judge("converted")
    times, spikes = StepTimes(), LossSpikeCounter()
    # The windows are drawn at random: no need to shuffle them.
    if arm == "dark":
        print(conversion_report(model))
        calibrate(model, data["calibrate"], seed=args.seed)
        judge("calibrated")
        transfer_attention(
            model,
            data["transfer"],
            steps=args.transfer_steps,
            learning_rate=1e-2,
            batch_size=args.batch_size,
        )
        judge("transferred")
        report = approximation_report(model, data["calibrate"][: args.batch_size])
        print(report)
        report.plot(args.output / "approximation.png")
        # Half of the steps to learn the exact model's logits, the rest like the others.
        half = args.finetune_steps // 2
        distil(
            model,
            load_arm("exact", preset, args),
            finetune[: half * args.batch_size],
            steps=half,
            train="all",
            learning_rate=args.finetune_rate,
            batch_size=args.batch_size,
        )
        judge("distilled")
        finetune = finetune[half * args.batch_size :]
        compile_for_training(
            model, keras.optimizers.schedules.CosineDecay(args.finetune_rate, half)
        )
    model.fit(finetune, batch_size=args.batch_size, callbacks=[times, spikes], shuffle=False)
    judge("finetuned")
    say(f"{ARMS[arm]}: writing {args.generate_length} tokens")
    text, generate_seconds = generate(model, args)
    tokens_per_step = args.batch_size * args.sequence_length
    return model, {
        "arm": arm,
        "perplexities": stages,
        "loss_spikes": len(spikes.spikes),
        "train_tokens_per_second": tokens_per_step / float(np.median(times.seconds[1:])),
        "generate_tokens_per_second": args.generate_length / generate_seconds,
        "reading_tokens_per_second": {
            length: reading_speed(model, length) for length in READING_LENGTHS
        },
        "cache_bytes": {length: cache_bytes(model, length) for length in CACHE_LENGTHS},
        "finetuning_losses": times.losses,
        "text": text,
    }


def generate(model, args):
    model.generate(args.prompt, max_length=args.generate_length)  # compiles
    started = time.perf_counter()
    text = model.generate(args.prompt, max_length=args.generate_length)
    return text, time.perf_counter() - started


def cache_bytes(model, length):
    """What generation carries for one sequence: states, or keys and values."""
    if hasattr(model, "get_initial_cache"):
        leaves = keras.tree.flatten(model.get_initial_cache(1, length))
        sizes = [(math.prod(leaf.shape), leaf.dtype) for leaf in leaves]
    else:
        backbone = model.backbone
        per_token = backbone.num_layers * 2 * backbone.num_key_value_heads * backbone.head_dim
        sizes = [(per_token * length, model.compute_dtype)]
    return sum(
        count * (4 if keras.backend.standardize_dtype(dtype) == "float32" else 2)
        for count, dtype in sizes
    )


def reading_speed(model, length, repeats=5):
    """Tokens per second of the backbone's forward pass on 4,096 tokens in sequences of `length`."""
    shape = (max(READING_LENGTHS) // length, length)
    tokens = np.random.default_rng(0).integers(3, model.backbone.vocabulary_size, shape)
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    seconds = []
    for _ in range(repeats + 1):  # the first compiles
        started = time.perf_counter()
        model.backbone.predict_on_batch(inputs)
        seconds.append(time.perf_counter() - started)
    return tokens.size / float(np.median(seconds[1:]))


# === The results ===


def print_table(rows, args):
    table = Table(
        title=f"m = {args.num_features} features; perplexity after each stage; speeds in tokens "
        "per second; cache or state of one sequence in KiB"
    )
    columns = {
        "attention": lambda row: ARMS[row["arm"]],
        **{
            f"ppl.\n{stage}": lambda row, stage=stage: (
                f"{row['perplexities'][stage]:.2f}" if stage in row["perplexities"] else ""
            )
            for stage in STAGES
        },
        f"training\nat {args.sequence_length:,}": lambda row: (
            f"{row['train_tokens_per_second']:,.0f}"
        ),
    }
    for length in READING_LENGTHS[::2]:
        columns[f"reading\nat {length:,}"] = lambda row, length=length: (
            f"{row['reading_tokens_per_second'][length]:,.0f}"
        )
    columns["writing"] = lambda row: f"{row['generate_tokens_per_second']:,.0f}"
    for length in (1024, 65536):
        columns[f"cache\nat {length:,}"] = lambda row, length=length: (
            f"{row['cache_bytes'][length] / 1024:,.0f}"
        )
    for name in columns:
        table.add_column(name, justify="left" if name == "attention" else "right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    Console(width=140).print(table)


def save_plot(rows, path):
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    (losses, perplexities), (speed, memory) = axes
    colors = dict(zip(ARMS, ("black", "tab:blue", "tab:green", "tab:orange"), strict=True))
    for row in rows:
        # The linear ones' states and speeds are alike: dashes let all be seen.
        style = {"color": colors[row["arm"]], "label": ARMS[row["arm"]]}
        dashes = {"paper": "--", "performer": ":"}.get(row["arm"], "-")
        values = np.array(row["finetuning_losses"])
        width = max(1, len(values) // 10)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        losses.plot(np.arange(len(smooth)) + width, smooth, **style)
        for axis, key, unit in (
            (speed, "reading_tokens_per_second", 1),
            (memory, "cache_bytes", 1024),
        ):
            lengths = sorted(row[key])
            sizes = [row[key][length] / unit for length in lengths]
            axis.plot(lengths, sizes, marker="o", linestyle=dashes, **style)
    positions = np.arange(len(rows))
    for position, row in zip(positions, rows, strict=True):
        found = list(row["perplexities"].values())
        width = 0.84 / len(found)
        places = position + width * (np.arange(len(found)) - (len(found) - 1) / 2)
        bars = perplexities.bar(places, found, 0.94 * width, color=colors[row["arm"]])
        for bar, alpha in zip(bars, np.linspace(0.3, 1.0, len(found)), strict=True):
            bar.set_alpha(alpha)
        perplexities.bar_label(bars, fmt="%.1f", fontsize=8)
    losses.set(
        xlabel="step",
        ylabel="loss",
        title="finetuning on the next token",
    )
    perplexities.set(ylabel="perplexity", yscale="log", title="held-out text, stage by stage")
    perplexities.set_xticks(positions, [ARMS[row["arm"]] for row in rows], fontsize=8)
    speed.set(xlabel="sequence, tokens", ylabel="tokens per second", title="reading")
    memory.set(xlabel="context, tokens", ylabel="KiB", title="cache or state in generation")
    for axis, lengths in ((speed, READING_LENGTHS), (memory, CACHE_LENGTHS)):
        axis.set(xscale="log", yscale="linear" if axis is speed else "log")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.xaxis.minorticks_off()
    speed.set_ylim(bottom=0)
    for axis in (losses, speed, memory):
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


FRESH_PROCESS = """
import sys
import keras_darkformer  # with it imported, KerasHub knows the dark classes
import keras_hub
model = keras_hub.models.CausalLM.from_preset(sys.argv[1])
model.compile(sampler="greedy")
text = model.generate(sys.argv[2], max_length=int(sys.argv[3]))
sys.stdout.write(f"{type(model).__name__}\\n{text}")
"""


def check_fresh_process(preset, args, text):
    command = [sys.executable, "-c", FRESH_PROCESS, str(preset), args.prompt]
    command.append(str(args.generate_length))
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"Loading {preset} in a fresh process failed:\n{run.stderr}")
    class_name, _, loaded_text = run.stdout.partition("\n")
    if loaded_text != text:
        raise SystemExit(f"The fresh process wrote something else:\n{loaded_text}")
    print(f"A fresh process loaded a {class_name} and wrote the same text.")


def main():
    args = parse_arguments()
    keras.utils.set_random_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    length = CHARACTERS_PER_TOKEN * args.sequence_length
    parts = split_text(load_text(args.text), length)

    def windows(part, count, seed):
        return sample_windows(parts[part], count, length, args.seed + seed)

    data = {
        "calibrate": windows("train", 4 * args.batch_size, 4),
        "transfer": windows("train", args.transfer_steps * args.batch_size, 5),
        "finetune": windows("train", args.finetune_steps * args.batch_size, 2),
        "test": windows("test", args.test_windows, 3),
    }
    if args.preset:
        preset = args.preset
    else:
        say(f"training a tokenizer and a small Gemma on {keras.config.backend()}")
        model = build_gemma(train_tokenizer(parts["train"]), args.sequence_length)
        compile_for_training(
            model, keras.optimizers.schedules.CosineDecay(3e-3, args.train_steps, alpha=0.1)
        )
        model.fit(
            windows("train", args.train_steps * args.batch_size, 1),
            batch_size=args.batch_size,
            shuffle=False,
        )
        preset = str(args.output / "exact")
        model.save_to_preset(preset)
        del model

    rows = []
    for arm in ARMS:
        model, row = run_arm(arm, preset, data, args)
        rows.append(row)
        if arm == "dark":
            model.save_to_preset(str(args.output / "dark"))
        del model
        gc.collect()

    say("results")
    print_table(rows, args)
    (args.output / "table.json").write_text(
        json.dumps(
            {
                "rows": rows,
                "arguments": {name: str(value) for name, value in vars(args).items()},
                "backend": keras.config.backend(),
                "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
                "versions": {
                    module.__name__: module.__version__
                    for module in (keras, keras_hub, keras_darkformer, np)
                },
            },
            indent=1,
        )
    )
    save_plot(rows, args.output / "plot.png")
    dark = next(row for row in rows if row["arm"] == "dark")
    size = dark["cache_bytes"][CACHE_LENGTHS[0]]
    print(f"DARKFormer wrote, from a state of {size / 1024:.0f} KiB:\n\n{dark['text']}\n")
    check_fresh_process(args.output / "dark", args, dark["text"])
    say(f"done: {args.output}/table.json, {args.output}/plot.png, {args.output}/dark (preset)")


if __name__ == "__main__":
    main()
