"""
Title: A small decoder, trained from scratch
Author: The keras_darkformer developers
Date created: 2026/11/21
Last modified: 2026/11/26
Description: Train a decoder of DarkTransformerBlocks with fit, and write from its state.
Accelerator: None
"""

"""
## Introduction

`DarkTransformerBlock` is a transformer block with linear attention. A model of such blocks trains
on whole sequences with `model.fit`. When it writes, each block carries a recurrent state, whose
size does not depend on how much was read.

The model here reads and writes bytes. It learns from the help topics that come with Python, or from
the file that `TEXT_FILE` names.

## Setup
"""

import os
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", or "tensorflow"

import keras
import numpy as np
from keras import ops

from keras_darkformer import DarkTransformerBlock

QUICK = bool(os.environ.get("QUICK"))  # a few steps, to see that it runs
TEXT_FILE = os.environ.get("TEXT_FILE")
EPOCHS, LENGTH, BATCH_SIZE = (1, 16, 9) if QUICK else (2, 256, 8)
PROMPT, WRITTEN = "The statement ", 4 if QUICK else 200

"""
## The text

The text is cut into windows of `LENGTH` bytes, with one more byte to predict. One in ten is held
out.
"""

if TEXT_FILE:
    text = Path(TEXT_FILE).read_bytes()
else:
    text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()
count = 20 if QUICK else len(text) // (LENGTH + 1)
windows = np.frombuffer(text, "uint8", count * (LENGTH + 1)).reshape(count, -1).astype("int32")
held_out = windows[9::10]
train = np.delete(windows, np.s_[9::10], axis=0)

"""
## The model

Each block meets the last 32 bytes exactly, and sums of 64 features stand for all that came before.
With `states`, the model goes on where the call that returned them ended.
"""


class Decoder(keras.Model):
    def __init__(self, num_blocks=2, hidden_dim=128, num_heads=4):
        super().__init__()
        self.embedding = keras.layers.Embedding(256, hidden_dim)
        self.blocks = [
            DarkTransformerBlock(
                4 * hidden_dim,
                num_heads,
                num_features=64,
                sliding_window=32,
                rope_max_wavelength=10_000,
                activation="gelu",
                seed=seed,
            )
            for seed in range(num_blocks)
        ]
        self.norm = keras.layers.LayerNormalization()
        self.head = keras.layers.Dense(256)

    def call(self, tokens, states=None):
        x, new_states = self.embedding(tokens), []
        for i, block in enumerate(self.blocks):
            if states is None:
                x = block(x)
            else:
                x, state = block(x, initial_state=states[i], return_state=True)
                new_states.append(state)
        logits = self.head(self.norm(x))
        return logits if states is None else (logits, new_states)


"""
## Training

Dividing the loss by log 2 gives bits per byte. A model that knows nothing needs 8.
"""

keras.utils.set_random_seed(0)
model = Decoder()
steps = EPOCHS * -(-len(train) // BATCH_SIZE)
rate = keras.optimizers.schedules.CosineDecay(3e-3, steps, alpha=0.1)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.AdamW(rate, clipnorm=1.0), loss)
model.fit(train[:, :-1], train[:, 1:], batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=2)
nats = model.evaluate(held_out[:, :-1], held_out[:, 1:], batch_size=BATCH_SIZE, verbose=0)
print(f"held-out text: {nats / np.log(2):.3f} bits per byte")

"""
## Writing

The prompt is read in one call. After that, each call reads the byte that was written last.
"""


def write(prompt, length, temperature=0.8):
    rng = np.random.default_rng(0)
    states = [block.get_initial_state(batch_size=1) for block in model.blocks]
    tokens, written = np.frombuffer(prompt.encode(), "uint8")[None].astype("int32"), []
    for _ in range(length):
        logits, states = model(tokens, states=states)
        logits = ops.convert_to_numpy(logits)[0, -1].astype("float64") / temperature
        probabilities = np.exp(logits - logits.max())
        written.append(rng.choice(256, p=probabilities / probabilities.sum()))
        tokens = np.array([[written[-1]]], "int32")
    return prompt + bytes(written).decode(errors="replace")


print(write(PROMPT, WRITTEN))
