"""
Title: Streaming a text that is longer than memory
Author: The keras_darkformer developers
Date created: 2026/11/26
Last modified: 2026/11/26
Description: Read a file piece by piece with a state of constant size, stop, and go on later.
Accelerator: None
"""

"""
## Introduction

A decoder with a key/value cache needs more memory with every token that it reads, so a long text
does not fit. The state of a dark model keeps its size, however much it has read. `hub.Stream` keeps
this state between calls. Here a text is read piece by piece, the state is saved to disk and loaded
again, and the model writes on from there.

The model here is a small Gemma that reads bytes, so it needs no tokenizer. It learns from the first
half of a file, in sequences of 256 bytes, and then reads the second half as one text.

## Setup
"""

import os
from pydoc_data import topics

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", or "tensorflow"

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_darkformer import calibrate, convert_to_dark, transfer_attention
from keras_darkformer.hub import Stream

QUICK = bool(os.environ.get("QUICK"))  # a few steps, to see that it runs
TEXT_FILE = os.environ.get("TEXT_FILE", topics.__file__)  # Python's own help topics
STATE_FILE = os.environ.get("STATE_FILE", "stream.npz")
STEPS, LENGTH, BATCH_SIZE = (2, 96, 4) if QUICK else (250, 256, 8)
PIECE = 128  # bytes
LONGEST, NUM_WRITTEN = (1_024, 8) if QUICK else (200_000, 200)  # bytes, as one text

"""
## A decoder with softmax attention

The decoder is trained on windows of the first half of the file.
"""

half = os.path.getsize(TEXT_FILE) // 2
first_half = np.fromfile(TEXT_FILE, "uint8", count=half)
starts = np.random.default_rng(0).integers(half - LENGTH, size=STEPS * BATCH_SIZE)
windows = first_half[starts[:, None] + np.arange(LENGTH + 1)].astype("int32")


def as_data(windows):
    tokens = windows[:, :-1]
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, windows[:, 1:]


keras.utils.set_random_seed(0)
backbone = keras_hub.models.GemmaBackbone(
    vocabulary_size=256, num_layers=2, num_query_heads=4, num_key_value_heads=2, hidden_dim=128,
    intermediate_dim=512, head_dim=32,
)  # fmt: skip
model = keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)
rate = keras.optimizers.schedules.CosineDecay(4e-3, STEPS)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(
    keras.optimizers.AdamW(rate, clipnorm=1.0), loss, weighted_metrics=[], sampler="top_k"
)
model.fit(*as_data(windows), batch_size=BATCH_SIZE, verbose=2)


def judge(stage):
    windows = np.fromfile(TEXT_FILE, "uint8", 32 * (LENGTH + 1), offset=half)
    nats = model.evaluate(*as_data(windows.reshape(32, -1).astype("int32")), verbose=0)
    print(f"windows of {LENGTH} bytes, {stage}: {nats / np.log(2):.2f} bits per byte")


judge("exact")

"""
## Its dark copy

All layers are converted. Each keeps the first 4 tokens and the last 64 exactly, and sums of 64
features stand for all that lies between. `calibrate` and `transfer_attention` fit the features.
"""

convert_to_dark(model, num_features=64, sliding_window=64, num_sinks=4)
some, _ = as_data(windows[: 16 * BATCH_SIZE])
calibrate(model, some, verbose=False)
transfer_attention(model, some, steps=len(windows) // BATCH_SIZE // 4 + 1, verbose=0)
judge("dark")

"""
## Reading

A generator yields pieces of the second half of the file, so no more than a piece is in memory.
`read` returns the logits of the byte that follows. That byte begins the next piece, so every piece
shows how well the model predicted its first byte, in bits.
"""


def pieces(position, end):
    with open(TEXT_FILE, "rb") as file:
        file.seek(half + position)
        while position < end and (piece := file.read(PIECE)):
            position += len(piece)
            yield np.frombuffer(piece, "uint8").astype("int32")


def read(stream, end):
    bits, logits = [], None
    for piece in pieces(stream.position, end):
        if logits is not None:
            known = ops.convert_to_numpy(ops.log_softmax(logits))
            bits.append(-known[0, piece[0]] / np.log(2))
        logits = stream.read(piece)
    stream.save(STATE_FILE)
    size, cache = os.path.getsize(STATE_FILE), stream.position * CACHE_OF_A_TOKEN
    print(f"{stream.position:>9,} bytes of text read, {np.mean(bits):.2f} bits per byte; "
          f"state {size / 1024:,.0f} KiB, keys and values {cache / 1024:,.0f} KiB")  # fmt: skip
    return logits


CACHE_OF_A_TOKEN = 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, their size, float32
stream = Stream(model)
for quarter in (1, 2, 3):
    read(stream, quarter * LONGEST // 4)

"""
## Going on later

Besides the model, another session needs only the file of the state. It reads on from where the text
was left, and gets the same logits as a stream that was never stopped. Then the model writes on.
"""

loaded = Stream.load(STATE_FILE, model)
logits = read(loaded, LONGEST)
for piece in pieces(stream.position, LONGEST):
    expected = stream.read(piece)
np.testing.assert_allclose(*map(ops.convert_to_numpy, (logits, expected)), rtol=0, atol=1e-4)
written = loaded.write(NUM_WRITTEN)[0]
print(bytes(written.tolist()).decode(errors="replace"))
