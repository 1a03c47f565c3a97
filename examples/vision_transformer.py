"""
Title: A vision transformer over small patches, converted
Author: The keras_darkformer developers
Date created: 2026/11/26
Last modified: 2026/11/26
Description: Convert a Keras model of your own, and compare accuracy and time.
Accelerator: None
"""

"""
## Introduction

An image of 64 x 64 pixels has 1,024 patches of 2 x 2, and the cost of attention grows with the
square of their number. We train a small ViT of Keras' own layers and give a copy DARKFormer
attention, whose cost is linear. The same calls convert any model with `MultiHeadAttention` in it.

## Setup
"""

import os
import time

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", or "tensorflow"

import keras
import matplotlib.pyplot as plt
import numpy as np

from keras_darkformer import calibrate, convert_to_dark, transfer_attention

QUICK = bool(os.environ.get("QUICK"))  # a few steps, to see that it runs
SIZE, NUM_IMAGES, EPOCHS = (16, 32, 1) if QUICK else (64, 1024, 4)
TIMED_SIZES, REPEATS = ((16,), 2) if QUICK else ((32, 64, 128), 7)
PATCH, BATCH_SIZE = 2, 8

"""
## The images

An image is noise with two striped squares, one in the left half and one in the right. The stripes
run across or down, and the label says whether both run the same way. One square alone says nothing.
"""


def make_images(count, size, rng):
    width, half = size // 4, size // 2
    across = np.tile(np.where(np.arange(width) % 2, 1.0, -1.0)[:, None], (1, width))
    images = rng.normal(0, 0.8, (count, size, size, 1))
    ways = rng.integers(0, 2, (count, 2))
    for (i, side), way in np.ndenumerate(ways):
        top = PATCH * rng.integers((size - width) // PATCH + 1)
        left = PATCH * rng.integers((half - width) // PATCH + 1) + side * half
        images[i, top : top + width, left : left + width, 0] += across.T if way else across
    return images.astype("float32"), (ways[:, 0] == ways[:, 1]).astype("int32")


"""
## The exact model
"""


@keras.saving.register_keras_serializable(package="examples")
class AddPositions(keras.layers.Layer):
    def build(self, shape):
        self.positions = self.add_weight(name="positions", shape=shape[1:], initializer="normal")

    def call(self, inputs):
        return inputs + self.positions


def compile_for_training(model, rate):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(rate, clipnorm=1.0), loss, metrics=["accuracy"])


def make_vit(size):
    images = keras.Input((size, size, 1))
    x = keras.layers.Conv2D(32, PATCH, PATCH)(images)
    x = AddPositions()(keras.layers.Reshape((-1, 32))(x))
    for _ in range(2):
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(num_heads=2, key_dim=16)(y, y)
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.Dense(32)(keras.layers.Dense(64, "gelu")(y))
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    model = keras.Model(images, keras.layers.Dense(2)(x))
    compile_for_training(model, 3e-3)
    return model


keras.utils.set_random_seed(0)
accuracy, rng = {}, np.random.default_rng(0)
images, labels = make_images(NUM_IMAGES, SIZE, rng)
test = make_images(64 if QUICK else 512, SIZE, rng)


def judge(model, stage):
    accuracy[stage] = model.evaluate(*test, batch_size=BATCH_SIZE, verbose=0)[1]
    print(f"accuracy on held-out images, {stage}: {accuracy[stage]:.3f}", flush=True)


exact = make_vit(SIZE)
exact.fit(images, labels, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=2)
judge(exact, "exact")

"""
## The dark model

The copy only guesses until `calibrate` fits its features. Then each layer learns its own softmax.
"""

dark = convert_to_dark(exact, copy=True, num_features=64)
judge(dark, "converted")
calibrate(dark, images[:32], verbose=False)
judge(dark, "calibrated")
transfer_attention(dark, images, steps=NUM_IMAGES // 32, verbose=0)
judge(dark, "transferred")
for name, model in {"exact": exact, "dark": dark}.items():
    compile_for_training(model, 1e-3)
    model.fit(images, labels, batch_size=BATCH_SIZE, verbose=2)
    judge(model, f"{name}, one epoch more")

"""
## Time

Both models take turns. The first two calls, which may compile, do not count.
"""

milliseconds = {}
for size in TIMED_SIZES:
    batch, exact = make_images(BATCH_SIZE, size, rng)[0], make_vit(size)
    dark = convert_to_dark(exact, copy=True, num_features=64)
    seconds = {"exact": [], "dark": []}
    for _ in range(2 + REPEATS):
        for name, model in {"exact": exact, "dark": dark}.items():
            start = time.perf_counter()
            model.predict_on_batch(batch)
            seconds[name].append(time.perf_counter() - start)
    ms = {name: 1000 * np.median(x[2:]) for name, x in seconds.items()}
    milliseconds[f"{(size // PATCH) ** 2:,}"] = ms
    print(f"{size} x {size}: exact {ms['exact']:.1f} ms, dark {ms['dark']:.1f} ms")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.barh(list(accuracy), accuracy.values())
left.set(title="accuracy, held-out images", xlim=(0.4, 1))
for name in ("exact", "dark"):
    right.semilogy(list(milliseconds), [ms[name] for ms in milliseconds.values()], label=name)
right.set(title="milliseconds of a batch, forward", xlabel="tokens")
right.legend(frameon=False)
figure.savefig("vision_transformer.png", dpi=110)
