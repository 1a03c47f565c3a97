"""
Title: Learning rates and loss spikes
Author: The keras_darkformer developers
Date created: 2026/11/26
Last modified: 2026/11/26
Description: Train one small decoder at several learning rates, and count the spikes of its loss.
Accelerator: None
"""

"""
## Introduction

High learning rates make losses jump. This example trains the same small decoder at one rate after
another, once with DARKFormer's learned covariance and once with Performer's fixed one, and counts
the spikes with `LossSpikeCounter`. As in the paper, a spike is a step whose loss is more than 0.3
above the median of the ten steps before it.

## Setup
"""

import os
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", or "tensorflow"

import keras
import matplotlib.pyplot as plt
import numpy as np

from keras_darkformer import DarkTransformerBlock, LossSpikeCounter

QUICK = bool(os.environ.get("QUICK"))  # a few steps, to see that it runs
TEXT_FILE = os.environ.get("TEXT_FILE")
RATES = (1e-3,) if QUICK else (1e-3, 1e-2, 3e-2, 1e-1)
STEPS, LENGTH, BATCH_SIZE = (3, 16, 8) if QUICK else (100, 128, 8)
ARMS = {"DARKFormer": True, "Performer": False}  # whether the geometry is trained

"""
## The text

Every run learns from the same random windows of bytes, in the same order.
"""

if TEXT_FILE:
    text = Path(TEXT_FILE).read_bytes()
else:
    text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()
text = np.frombuffer(text, "uint8").astype("int32")
starts = np.random.default_rng(1).integers(len(text) - LENGTH, size=STEPS * BATCH_SIZE)
windows = text[starts[:, None] + np.arange(LENGTH + 1)]

"""
## The model, and one run

A callback records the loss of every step. Keras reports the mean of all steps so far, from which
the loss of a single step is computed.
"""


def make_decoder(train_geometry):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(256, 128)(tokens)
    for seed in range(2):
        x = DarkTransformerBlock(
            512,
            num_heads=4,
            num_features=64,
            train_geometry=train_geometry,
            rope_max_wavelength=10_000,
            activation="gelu",
            seed=seed,
        )(x)
    return keras.Model(tokens, keras.layers.Dense(256)(keras.layers.LayerNormalization()(x)))


class MeanLosses(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])


def train(rate, train_geometry):
    keras.utils.set_random_seed(0)
    model = make_decoder(train_geometry)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(rate), loss)
    spikes, means = LossSpikeCounter(), MeanLosses()
    model.fit(windows[:, :-1], windows[:, 1:], batch_size=BATCH_SIZE, shuffle=False, verbose=0,
              callbacks=[spikes, means])  # fmt: skip
    sums = np.array(means.losses) * np.arange(1, len(means.losses) + 1)
    return np.diff(sums, prepend=0.0), spikes.spikes


"""
## All runs

Triangles in the figure mark spikes.
"""

figure, axes = plt.subplots(
    1, len(RATES), figsize=(3.2 * len(RATES), 3), sharey=True, squeeze=False, layout="constrained"
)
for axis, rate in zip(axes[0], RATES, strict=True):
    for name, train_geometry in ARMS.items():
        losses, spikes = train(rate, train_geometry)
        last = np.mean(losses[-10:]) / np.log(2)
        print(f"{name}, rate {rate:g}: {last:.2f} bits per byte, {len(spikes)} spikes", flush=True)
        (line,) = axis.plot(losses / np.log(2), lw=1, label=name)
        axis.plot(spikes, losses[spikes] / np.log(2), "v", color=line.get_color())
    axis.set(title=f"rate {rate:g}", xlabel="step", ylim=(0, 12))
axes[0, 0].set_ylabel("bits per byte")
axes[0, 0].legend(frameon=False)
figure.savefig("learning_rates.png", dpi=110)
print("wrote learning_rates.png")
