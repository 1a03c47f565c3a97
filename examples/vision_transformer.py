"""
Title: A vision transformer over small patches, converted to linear attention
Description: Trains a ViT on 1,024 patches, converts it, and compares accuracy and time.
Accelerator: None

    python examples/vision_transformer.py              # writes vision_transformer.png

An image of 64 x 64 pixels has 1,024 patches of 2 x 2, and attention among these costs the square of
their number. A small ViT of Keras' own layers is trained from scratch, and a copy of it gets
DARKFormer attention, whose cost is linear. What that does to accuracy and time is printed.
"""

import argparse
import time
from functools import partial

import keras
import matplotlib.pyplot as plt
import numpy as np

from keras_darkformer import calibrate, convert_to_dark, transfer_attention

PATCH, BATCH_SIZE, NUM_FEATURES = 2, 8, 64

"""
The rule of the images: on noise of standard deviation 0.8 there are two striped squares, a quarter
of the image wide, one anywhere in the left half and one in the right. Their stripes of +1 and -1
run across or down. The label says whether both run the same way. Each pair of ways is as frequent,
so no square alone tells anything: one has to be compared with the other.
"""


def make_images(count, size, rng):
    width, half = size // 4, size // 2
    across = np.tile(np.where(np.arange(width) % 2, 1.0, -1.0)[:, None], (1, width))
    images = rng.normal(0, 0.8, (count, size, size, 1))
    ways = rng.integers(0, 2, (count, 2))
    for image, pair in zip(images, ways, strict=True):
        for side, way in enumerate(pair):
            top = PATCH * rng.integers((size - width) // PATCH + 1)
            left = PATCH * rng.integers((half - width) // PATCH + 1) + side * half
            image[top : top + width, left : left + width, 0] += across.T if way else across
    return images.astype("float32"), (ways[:, 0] == ways[:, 1]).astype("int32")


@keras.saving.register_keras_serializable(package="examples")
class AddPositions(keras.layers.Layer):
    def build(self, shape):
        self.positions = self.add_weight(name="positions", shape=shape[1:], initializer="normal")

    def call(self, inputs):
        return inputs + self.positions


def compile_for_training(model, rate):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(rate, clipnorm=1.0), loss, metrics=["accuracy"])


def make_vit(size, hidden_dim=32, num_heads=2, num_blocks=2):
    images = keras.Input((size, size, 1))
    x = keras.layers.Conv2D(hidden_dim, PATCH, PATCH)(images)
    x = AddPositions()(keras.layers.Reshape((-1, hidden_dim))(x))
    for _ in range(num_blocks):
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(num_heads, hidden_dim // num_heads)(y, y)
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.Dense(hidden_dim)(keras.layers.Dense(2 * hidden_dim, "gelu")(y))
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    model = keras.Model(images, keras.layers.Dense(2)(x))
    compile_for_training(model, 3e-3)
    return model


"""
Timed models take turns, so that whatever else the machine does falls on both alike. The first two
calls, which may compile, do not count.
"""


def median_milliseconds(calls, repeats=9):
    seconds = {name: [] for name in calls}
    for _ in range(2 + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * float(np.median(times[2:])) for name, times in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("--size", type=int, default=64, help="of an image, in pixels")
    parser.add_argument("--images", type=int, default=1024, help="to train on")
    parser.add_argument("--epochs", type=int, default=4, help="of the exact model")
    parser.add_argument("--timed-sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--output", default="vision_transformer.png")
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    accuracy, forward, rng = {}, {}, np.random.default_rng(0)
    images, labels = make_images(args.images, args.size, rng)
    test = make_images(512, args.size, rng)

    def judge(model, stage):
        accuracy[stage] = model.evaluate(*test, batch_size=BATCH_SIZE, verbose=0)[1]
        print(f"accuracy on held-out images, {stage}: {accuracy[stage]:.3f}", flush=True)

    exact = make_vit(args.size)
    exact.fit(images, labels, batch_size=BATCH_SIZE, epochs=args.epochs, verbose=2)
    judge(exact, "exact")
    dark = convert_to_dark(exact, copy=True, num_features=NUM_FEATURES)
    judge(dark, "converted")
    calibrate(dark, images[:32], verbose=False)
    judge(dark, "calibrated")
    transfer_attention(dark, images, steps=len(images) // 32, verbose=0)
    judge(dark, "transferred")
    for name, model in {"exact": exact, "dark": dark}.items():
        compile_for_training(model, 1e-3)
        model.fit(images, labels, batch_size=BATCH_SIZE, verbose=2)
        judge(model, f"{name}, one epoch more")

    for size in args.timed_sizes:
        batch, exact = make_images(BATCH_SIZE, size, rng), make_vit(size)
        dark = convert_to_dark(exact, copy=True, num_features=NUM_FEATURES)
        pair, tokens = {"exact": exact, "dark": dark}, (size // PATCH) ** 2
        calls = {name: partial(x.predict_on_batch, batch[0]) for name, x in pair.items()}
        times = {"forward": median_milliseconds(calls)}
        forward[tokens] = times["forward"]
        if size <= args.size:
            calls = {name: partial(x.train_on_batch, *batch) for name, x in pair.items()}
            times["training step"] = median_milliseconds(calls)
        for what, ms in times.items():
            shown = f"exact {ms['exact']:.1f} ms, dark {ms['dark']:.1f} ms"
            print(f"{tokens} tokens, {what} of a batch of {BATCH_SIZE}: {shown}", flush=True)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colours = ["C0" if stage.startswith("exact") else "C1" for stage in accuracy]
    left.barh(list(accuracy), accuracy.values(), color=colours)
    left.set(title="accuracy, held-out images", xlim=(0.4, 1), ylim=(len(accuracy) - 0.5, -0.5))
    for name in ("exact", "dark"):
        times = [ms[name] for ms in forward.values()]
        right.semilogy([str(tokens) for tokens in forward], times, "o-", label=name)
    right.set(title="milliseconds of a batch, forward", xlabel="tokens")
    right.legend(frameon=False)
    figure.savefig(args.output, dpi=110)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
