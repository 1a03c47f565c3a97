"""Finetunes the queries, keys and values of a trained Gemma: DARKFormer against Performer.

    python examples/finetune_projections.py
    python examples/finetune_projections.py --text book.txt --other another.txt

A small exact Gemma is trained on one text. Then its attention becomes linear, and its projections
of queries, keys and values learn another text, as in the paper: with Performer's isotropic
features, with DARKFormer's learned covariance, and with one that `calibrate` has started. All take
the same steps at the same rates; figures are of held-out text.
"""

import argparse
import inspect

import keras
from small_gemma import compile_for_training, train_gemma, windows
from text import load_text, split_text

from keras_darkformer import calibrate, convert_to_dark

PERFORMER = {"train_geometry": False, "geometry_scale": 1.0}
ARMS = {
    "exact attention": None,
    "Performer": PERFORMER,
    "DARKFormer": {"geometry_scale": 1.0},
    "DARKFormer, calibrated": {"tie_geometry": False},
}
TRAINED = ("query/kernel", "key/kernel", "value/kernel")


def other_text(path):
    """A file's text, or by default code: two modules that every Python carries."""
    return load_text(path) if path else inspect.getsource(argparse) + inspect.getsource(inspect)


def make_linear(preset, options, texts, num_features):
    """The trained model, its attention replaced."""
    model = keras.saving.load_model(preset, compile=False)
    if options is not None:
        convert_to_dark(model, num_features=num_features, seed=0, **options)
        if "tie_geometry" in options:
            calibrate(model, texts, verbose=False)
    return model


def train_projections_only(model):
    """Freezes all but the projections of queries, keys and values and the feature maps."""
    for variable in model.trainable_variables:
        chosen = variable.path.endswith(TRAINED) or "/feature_map/" in variable.path
        variable.trainable = chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a text file; default: Python's own help topics")
    parser.add_argument("--other", help="a text file to finetune on; default: code")
    parser.add_argument("--train-steps", type=int, default=400, help="of the exact model")
    parser.add_argument("--steps", type=int, default=60, help="of finetuning")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--num-features", type=int, default=64)
    parser.add_argument("--model", default="exact_gemma.keras", help="file of the exact model")
    args = parser.parse_args()
    keras.utils.set_random_seed(0)

    size, length = args.batch_size, args.sequence_length
    text = split_text(load_text(args.text), 6 * length)
    source = train_gemma(text["train"], args.train_steps, size, length)
    source.save(args.model)
    other = split_text(other_text(args.other), 6 * length)
    train = windows(other["train"], args.steps * size, length, 1)
    judged = {part: windows(other[part], 32, length, 2) for part in ("validation", "test")}

    print(f"\n{'':24s}{'before':>8s}{'after':>8s}{'rate':>8s}   held-out loss")
    for name, options in ARMS.items():
        tried = []
        for rate in args.rates:
            model = make_linear(args.model, options, train[: 2 * size], args.num_features)
            train_projections_only(model)
            compile_for_training(model, args.steps, rate)
            before = model.evaluate(judged["test"], batch_size=size, verbose=0)
            model.fit(train, batch_size=size, shuffle=False, verbose=0)
            losses = [model.evaluate(judged[part], batch_size=size, verbose=0) for part in judged]
            tried.append((losses[0], before, losses[1], rate))
        _, before, after, rate = min(tried)  # chosen on another part than it is judged by
        print(f"{name:24s}{before:8.3f}{after:8.3f}{rate:8.0e}", flush=True)


if __name__ == "__main__":
    main()
