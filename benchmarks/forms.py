"""What becomes of a model that is trained in one form of attention and used in the other.

    KERAS_BACKEND=torch python benchmarks/forms.py --text book.txt

With `attention_mode="auto"` a model computes short texts with the kernel itself and long ones with
features that estimate it. A small Gemma is trained, converted and calibrated, then finetuned in
either form, and each result is judged in both, on held-out text. Writes results/forms_BACKEND.json.
"""

import pathlib
import tempfile

import common
import keras_hub
from small_gemma import compile_for_training, train_gemma, windows
from text import load_text, split_text

from keras_darkformer import calibrate, convert_to_dark

# Both by "auto", so that all else is the same.
FORMS = {"linear": {"exact_below": 1}, "exact": {"exact_below": 1_000_000}}


def parse_arguments():
    made = common.parser(__doc__)
    add = made.add_argument
    add("--text", required=True, help="a text file")
    add("--num-features", type=int, nargs="*", default=[64, 256])
    add("--sequence-length", type=int, default=256)
    add("--batch-size", type=int, default=8)
    add("--train-steps", type=int, default=600)
    add("--finetune-steps", type=int, default=200)
    add("--finetune-rate", type=float, default=1e-3)
    add("--test-windows", type=int, default=64, help="held-out sequences")
    add("--seeds", type=int, default=3)
    args = made.parse_args()
    if args.quick:
        args.sequence_length, args.test_windows, args.num_features = 32, 8, [64]
        args.train_steps, args.finetune_steps, args.seeds = 3, 4, 1
    return args


def run(preset, num_features, seed, data, args):
    """Losses by how the model was trained and in which form it is judged."""
    models = {}
    for form, options in FORMS.items():
        model = keras_hub.models.CausalLM.from_preset(preset)
        model.preprocessor.sequence_length = args.sequence_length
        options = {"num_features": num_features, "seed": seed, "attention_mode": "auto"} | options
        models[form] = convert_to_dark(model, **options)
    calibrate(models["linear"], data["calibrate"], seed=seed, verbose=False)
    calibrated = models["linear"].get_weights()
    losses = {}

    def judge(stage, weights):
        losses[stage] = {}
        for form, model in models.items():
            model.set_weights(weights)
            compile_for_training(model, args.finetune_steps, args.finetune_rate)
            found = model.evaluate(data["test"], batch_size=args.batch_size, verbose=0)
            losses[stage][form] = round(found, 4)
        print(num_features, seed, stage, losses[stage], flush=True)

    judge("calibrated", calibrated)
    for form, model in models.items():
        model.set_weights(calibrated)
        compile_for_training(model, args.finetune_steps, args.finetune_rate)
        text = data["finetune"][seed]
        model.fit(text, batch_size=args.batch_size, shuffle=False, verbose=0)
        judge(f"finetuned {form}", model.get_weights())
    return {"num_features": num_features, "seed": seed, "losses": losses}


def main():
    args = parse_arguments()
    length, size = args.sequence_length, args.batch_size
    parts = split_text(load_text(args.text), 8192)
    model = train_gemma(parts["train"], args.train_steps, size, length)
    count = args.finetune_steps * size
    data = {
        "test": windows(parts["test"], args.test_windows, length, 0),
        "calibrate": windows(parts["train"], 4 * size, length, 1),
        "finetune": [windows(parts["train"], count, length, 100 + x) for x in range(args.seeds)],
    }
    source = round(model.evaluate(data["test"], batch_size=size, verbose=0), 4)
    print("source", source)
    with tempfile.TemporaryDirectory() as folder:
        preset = str(pathlib.Path(folder) / "small_gemma")
        model.save_to_preset(preset)
        rows = [
            run(preset, m, seed, data, args)
            for m in args.num_features
            for seed in range(args.seeds)
        ]
    if not args.quick:
        payload = {"unit": "loss a token, held-out text", "source": source, "rows": rows}
        payload["arguments"] = {k: v for k, v in vars(args).items() if k not in ("text", "measure")}
        common.write("forms", payload | common.environment("keras-hub"))


if __name__ == "__main__":
    main()
