"""Trains a small decoder from scratch at one learning rate after another, and counts its spikes.

    python examples/learning_rates.py                  # writes learning_rates.png
    python examples/learning_rates.py --rates 1e-3 1e-2 --steps 100

A spike is a step whose loss is above the median of the ten before it by 0.3, as the paper counts
them. Each rate is tried with a learned covariance (DARKFormer) and with a fixed one (Performer).
"""

import argparse

import keras
import matplotlib
import numpy as np
from text import load_text, sample_windows, split_text
from train_decoder import ByteDecoder, to_batches

from keras_darkformer import LossSpikeCounter

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ARMS = {"DARKFormer": True, "Performer": False}  # whether the geometry is trained


class StepLosses(keras.callbacks.Callback):
    """The mean loss so far, step by step."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])


def train(data, rate, train_geometry, batch_size):
    """Losses of all steps, and the numbers of those that spiked."""
    keras.utils.set_random_seed(0)
    model = ByteDecoder(train_geometry=train_geometry)
    model.compile(
        optimizer=keras.optimizers.AdamW(rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    spikes, steps = LossSpikeCounter(), StepLosses()
    model.fit(*data, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[spikes, steps])
    totals = np.array(steps.losses) * np.arange(1, len(steps.losses) + 1)
    return np.diff(totals, prepend=0.0), spikes.spikes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a text file; default: Python's own help topics")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-2, 3e-2, 1e-1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=128, help="bytes per training sequence")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", default="learning_rates.png")
    args = parser.parse_args()

    size = args.length + 1
    stretches = [x.encode() for x in split_text(load_text(args.text), size)["train"]]
    data = to_batches(sample_windows(stretches, args.steps * args.batch_size, size, 1))
    figure, axes = plt.subplots(
        1, len(args.rates), figsize=(3.2 * len(args.rates), 3), sharey=True, squeeze=False
    )
    for axis, rate in zip(axes[0], args.rates, strict=True):
        for name, train_geometry in ARMS.items():
            losses, spikes = train(data, rate, train_geometry, args.batch_size)
            last = np.mean(losses[-10:]) / np.log(2)
            print(f"{name}, rate {rate:g}: {last:.2f} bits per byte, {len(spikes)} spikes")
            (line,) = axis.plot(losses / np.log(2), lw=1, label=name)
            axis.plot(spikes, losses[spikes] / np.log(2), "v", color=line.get_color())
        axis.set(title=f"rate {rate:g}", xlabel="step", ylim=(0, 12))
    axes[0, 0].set_ylabel("bits per byte")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(args.output, dpi=110)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
