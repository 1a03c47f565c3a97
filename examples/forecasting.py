"""
Title: Forecasting a time series with a state of constant size
Description: A causal transformer trained on whole series and deployed hour by hour.
Accelerator: None

    python examples/forecasting.py
    KERAS_BACKEND=jax python examples/forecasting.py --epochs 4

A transformer that forecasts a stream keeps keys and values of all of the past, or reads it again
for every sample. `DarkTransformerBlock` keeps sums of constant size instead. The model is trained
on whole series with `model.fit`; deployed, it reads a day or an hour at a time, carries its state,
and forecasts the same.
"""

import argparse

import keras
import numpy as np
from keras import ops

from keras_darkformer import DarkTransformerBlock

DAY, WEEK = 24, 168
HORIZON = DAY
OPTIONS = {"num_features": 64, "activation": "gelu"}

"""
The rule of the series: each has a daily wave of two harmonics and a weekly wave, with amplitudes
and phases of its own, a level that jumps every four days on average, and noise of standard
deviation 0.3. The waves have to be read off weeks of the past. The inputs of an hour are its value,
and the hour and the weekday as sines and cosines; the targets are the values of the next 24 hours.
"""


def make_series(count, length, rng):
    """Inputs `(count, length, 5)` and targets `(count, length, HORIZON)`."""
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
With `states` the model goes on where the call that returned them has ended. The exact model is of
the same blocks with `attention_mode="exact"`: attention quadratic in the length.
"""


class Forecaster(keras.Model):
    def __init__(self, attention_mode="linear", hidden_dim=64, num_blocks=2, **kwargs):
        super().__init__(**kwargs)
        self.embedding = keras.layers.Dense(hidden_dim)
        self.blocks = [
            DarkTransformerBlock(
                2 * hidden_dim, num_heads=4, attention_mode=attention_mode, seed=seed, **OPTIONS
            )
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


def train(attention_mode, data, epochs, batch_size):
    keras.utils.set_random_seed(0)
    model = Forecaster(attention_mode)
    steps = epochs * -(-len(data[0]) // batch_size)
    schedule = keras.optimizers.schedules.CosineDecay
    rate = schedule(0.0, steps, warmup_target=3e-3, warmup_steps=steps // 10)
    model.compile(keras.optimizers.AdamW(rate, clipnorm=1.0), "mse")
    model.fit(*data, batch_size=batch_size, epochs=epochs, verbose=2)
    return model


"""
In deployment a series comes in pieces of any length. Nothing but the states is kept between them.
"""


def stream(model, inputs, size):
    """Forecasts of a series that comes `size` hours at a time, and the states' bytes by then."""
    states = [block.get_initial_state(len(inputs)) for block in model.blocks]
    forecasts, num_bytes = [], []
    for start in range(0, inputs.shape[1], size):
        forecast, states = model(inputs[:, start : start + size], states=states)
        forecasts.append(ops.convert_to_numpy(forecast))
        num_bytes.append(sum(4 * int(np.prod(x.shape)) for x in keras.tree.flatten(states)))
    return np.concatenate(forecasts, axis=1), num_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--series", type=int, default=512, help="to train on")
    parser.add_argument("--weeks", type=int, default=3, help="of a series to train on")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    data = make_series(args.series, args.weeks * WEEK, rng)
    inputs, targets = make_series(64, (args.weeks + 1) * WEEK, rng)

    values = np.concatenate([inputs[..., 0], targets[:, -1]], axis=1)
    hours = np.arange(inputs.shape[1])[:, None] + np.arange(1, HORIZON + 1)
    forecasts = {
        "the same hour yesterday": values[:, hours - DAY],
        "the same hour last week": values[:, hours - WEEK],
    }
    for mode in ("exact", "linear"):
        model = train(mode, data, args.epochs, args.batch_size)
        forecasts[f"{mode} attention"] = model.predict(inputs, batch_size=16, verbose=0)
    print("\nroot mean squared error of 24 hours, held-out series from their second week on")
    for name, forecast in forecasts.items():
        error = np.sqrt(np.mean((forecast - targets)[:, WEEK:] ** 2))
        print(f"{name:26s}{error:8.3f}")

    one = inputs[:1]
    whole = ops.convert_to_numpy(model(one))
    for name, size in (("day by day", DAY), ("hour by hour", 1)):
        piecewise, num_bytes = stream(model, one, size)
        difference = np.abs(piecewise - whole).max()
        assert difference < 1e-3
        assert len(set(num_bytes)) == 1
        print(f"{name}: differs from the whole by {difference:.1e} at most")
    cache = 2 * 4 * sum(block.num_heads * block.attention.head_dim for block in model.blocks)
    print(f"state: {num_bytes[-1]:,} bytes at any hour; keys and values: {cache:,} for each hour")


if __name__ == "__main__":
    main()
