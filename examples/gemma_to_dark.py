"""Takes a Gemma through its whole life with linear attention.

Trains a small Gemma on text (or takes a preset), converts it, fits its features
to the model, has each layer learn its own softmax and the whole the exact
model's logits, and finetunes it on the next token. Then it writes text with a
state of constant size, is saved as a preset, and a fresh process loads it and
writes the same.

    python examples/gemma_to_dark.py                       # Python's own help topics
    python examples/gemma_to_dark.py --text book.txt       # any other text
    python examples/gemma_to_dark.py --preset gemma_2b_en  # a real Gemma
"""

import argparse
import math
import subprocess
import sys

import keras
import keras_hub
from small_gemma import CHARACTERS_PER_TOKEN, compile_for_training, train_gemma, windows
from text import load_text, split_text

from keras_darkformer import (
    approximation_report,
    calibrate,
    conversion_report,
    convert_to_dark,
    distil,
    transfer_attention,
)

BATCH = 8
FRESH_PROCESS = """
import sys
import keras_hub
import keras_darkformer.hub  # with it imported, KerasHub knows the dark classes
model = keras_hub.models.CausalLM.from_preset(sys.argv[1])
model.compile(sampler="greedy")
text = model.generate(sys.argv[2], max_length=int(sys.argv[3]))
sys.stdout.write(f"{type(model).__name__}\\n{text}")
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a text file; default: Python's own help topics")
    parser.add_argument("--preset", help="a Gemma preset to start from instead of training one")
    parser.add_argument("--output", default="results/gemma_to_dark/dark", help="where to save it")
    parser.add_argument("--num-layers", type=int, default=4, help="of the Gemma it trains")
    parser.add_argument("--num-features", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens")
    parser.add_argument("--train-steps", type=int, default=600, help="of the exact Gemma")
    parser.add_argument("--transfer-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=150, help="to distil, and to finetune")
    parser.add_argument("--prompt", default="The statement is")
    parser.add_argument("--generate-length", type=int, default=128, help="tokens")
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    length = args.sequence_length
    text = split_text(load_text(args.text), CHARACTERS_PER_TOKEN * length)

    if args.preset:
        exact = keras_hub.models.CausalLM.from_preset(args.preset)
        exact.preprocessor.sequence_length = length
    else:
        print(f"training a small Gemma on {keras.config.backend()}")
        exact = train_gemma(
            text["train"], args.train_steps, BATCH, length, num_layers=args.num_layers
        )

    test = windows(text["test"], 12 * BATCH, length, seed=3)

    def judge(model, stage):
        compile_for_training(model, args.steps, 2e-3)
        perplexity = math.exp(model.evaluate(test, batch_size=BATCH, verbose=0))
        print(f"perplexity of held-out text, {stage}: {perplexity:.2f}", flush=True)

    judge(exact, "exact")

    # The converted model has the same weights, and features that fit nothing yet.
    model = convert_to_dark(exact, num_features=args.num_features, tie_geometry=False, copy=True)
    print(conversion_report(model))
    judge(model, "converted")

    # One pass, no training: features that fit the model's queries and keys.
    some = windows(text["train"], 4 * BATCH, length, seed=4)
    calibrate(model, some)
    judge(model, "calibrated")

    # Each layer learns its own softmax.
    steps = args.transfer_steps
    data = windows(text["train"], steps * BATCH, length, seed=5)
    transfer_attention(model, data, steps=steps, learning_rate=1e-2, batch_size=BATCH)
    judge(model, "transferred")
    print(approximation_report(model, some[:BATCH]))

    # The whole learns the exact model's logits, then the next token.
    data = windows(text["train"], 2 * args.steps * BATCH, length, seed=2)
    half = args.steps * BATCH
    options = {"train": "all", "learning_rate": 2e-3, "batch_size": BATCH}
    distil(model, exact, data[:half], steps=args.steps, **options)
    judge(model, "distilled")
    model.fit(data[half:], batch_size=BATCH, shuffle=False)
    judge(model, "finetuned")

    written = model.generate(args.prompt, max_length=args.generate_length)
    state = keras.tree.flatten(model.get_initial_cache(1, args.generate_length))
    size = 4 * sum(math.prod(leaf.shape) for leaf in state)
    print(f"From a state of {size / 1024:.0f} KiB it wrote:\n\n{written}\n")

    model.save_to_preset(args.output)
    command = [sys.executable, "-c", FRESH_PROCESS, args.output, args.prompt]
    command.append(str(args.generate_length))
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"A fresh process could not load {args.output}:\n{run.stderr}")
    name, _, text = run.stdout.partition("\n")
    if text != written:
        raise SystemExit(f"A fresh process wrote something else:\n{text}")
    print(f"A fresh process loaded a {name} from {args.output} and wrote the same text.")


if __name__ == "__main__":
    main()
