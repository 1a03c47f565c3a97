"""
Title: Forecasting a time series with a state of constant size
Author: The keras_darkformer developers
Date created: 2026/11/26
Last modified: 2026/11/26
Description: A causal transformer trained on whole series and deployed hour by hour.
Accelerator: None
"""

"""
## Introduction

A transformer that forecasts a stream keeps the keys and values of all of the past, or reads the
past again for every sample. `DarkTransformerBlock` keeps sums of constant size instead. The model
is trained on whole series with `model.fit`. Deployed, it reads a day or an hour at a time, carries
its state, and makes the same forecasts.

## Setup
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", or "tensorflow"

import keras
import numpy as np
from keras import ops

from keras_darkformer import DarkTransformerBlock

QUICK = bool(os.environ.get("QUICK"))  # a few steps, to see that it runs
EPOCHS, NUM_SERIES, WEEKS = (1, 16, 1) if QUICK else (8, 256, 3)  # to train on
DAY, WEEK = 24, 168
HORIZON, BATCH_SIZE = DAY, 16

"""
## The series

Each series has a daily wave of two harmonics and a weekly wave, with amplitudes and phases of its
own, a level that jumps every four days on average, and noise of standard deviation 0.3. A model has
to learn the waves from weeks of the past. The inputs of an hour are its value, and the hour and the
weekday as sines and cosines. The targets are the values of the next 24 hours.
"""


def make_series(count, length, rng):
    hours = np.arange(length + HORIZON)
    values = rng.normal(0, 0.3, (count, len(hours)))
    for period, scale in ((DAY, 1.0), (DAY / 2, 0.5), (WEEK, 0.7)):
        amplitude, phase = rng.normal(0, scale, (count, 1)), rng.uniform(0, 2 * np.pi, (count, 1))
        values += amplitude * np.sin(2 * np.pi * hours / period + phase)
    jumps = rng.random(values.shape) < 1 / (4 * DAY)
    levels = rng.normal(0, 0.5, values.shape)
    last_jump = np.maximum.accumulate(np.where(jumps, hours, 0), axis=1)
    values += np.take_along_axis(levels, last_jump, axis=1)
    angles = [2 * np.pi * hours / period for period in (DAY, WEEK)]
    calendar = np.stack([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=-1)
    calendar = np.broadcast_to(calendar, (count, *calendar.shape))
    inputs = np.concatenate([values[..., None], calendar], axis=-1)[:, :length]
    targets = np.lib.stride_tricks.sliding_window_view(values[:, 1:], HORIZON, axis=1)
    return inputs.astype("float32"), targets.astype("float32")


"""
## The model

With `states`, the model goes on where the call that returned them ended. The exact model has the
same blocks with `attention_mode="exact"`, whose cost is quadratic in the length.
"""


class Forecaster(keras.Model):
    def __init__(self, attention_mode, hidden_dim=64, num_blocks=2):
        super().__init__()
        options = {"num_features": 64, "activation": "gelu", "attention_mode": attention_mode}
        self.embedding = keras.layers.Dense(hidden_dim)
        self.blocks = [
            DarkTransformerBlock(2 * hidden_dim, num_heads=4, seed=seed, **options)
            for seed in range(num_blocks)
        ]
        self.norm = keras.layers.LayerNormalization()
        self.head = keras.layers.Dense(HORIZON)

    def call(self, inputs, states=None):
        x, new_states = self.embedding(inputs), []
        for i, block in enumerate(self.blocks):
            if states is None:
                x = block(x)
            else:
                x, state = block(x, initial_state=states[i], return_state=True)
                new_states.append(state)
        forecast = self.head(self.norm(x))
        return forecast if states is None else (forecast, new_states)


"""
## Training

Both models are compared with two forecasts that need no training: the same hour of the last day,
and of the last week.
"""

rng = np.random.default_rng(0)
train = make_series(NUM_SERIES, WEEKS * WEEK, rng)
inputs, targets = make_series(64, (WEEKS + 1) * WEEK, rng)
values = np.concatenate([inputs[..., 0], targets[:, -1]], axis=1)
hours = np.arange(inputs.shape[1])[:, None] + np.arange(1, HORIZON + 1)
forecasts = {"same hour yesterday": values[:, hours - DAY]}
forecasts["same hour last week"] = values[:, hours - WEEK]
for mode in ("exact", "linear"):
    keras.utils.set_random_seed(0)
    model = Forecaster(mode)
    steps = EPOCHS * -(-NUM_SERIES // BATCH_SIZE)
    schedule = keras.optimizers.schedules.CosineDecay
    rate = schedule(0.0, steps, warmup_target=3e-3, warmup_steps=steps // 10)
    model.compile(keras.optimizers.AdamW(rate, clipnorm=1.0), "mse")
    model.fit(*train, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=2)
    forecasts[f"{mode} attention"] = model.predict(inputs, batch_size=BATCH_SIZE, verbose=0)
print("root mean squared error of 24 hours, held-out series from their second week on")
for name, forecast in forecasts.items():
    print(f"{name:20s}{np.sqrt(np.mean((forecast - targets)[:, WEEK:] ** 2)):8.3f}")

"""
## Deployment

A series arrives in pieces of any length. Nothing but the states is kept between them.
"""

one = inputs[:1]
whole = ops.convert_to_numpy(model(one))
for name, size in (("day by day", DAY), ("hour by hour", 1)):
    states, pieces = [block.get_initial_state(1) for block in model.blocks], []
    for start in range(0, one.shape[1], size):
        forecast, states = model(one[:, start : start + size], states=states)
        pieces.append(ops.convert_to_numpy(forecast))
    difference = np.abs(np.concatenate(pieces, axis=1) - whole).max()
    assert difference < 1e-3
    print(f"{name}: differs from the whole by {difference:.1e} at most")
num_bytes = sum(4 * int(np.prod(x.shape)) for x in keras.tree.flatten(states))
cache = 2 * 4 * sum(block.num_heads * block.attention.head_dim for block in model.blocks)
print(f"state: {num_bytes:,} bytes at any hour; keys and values: {cache:,} for each hour")
