"""Trains a small decoder of DarkTransformerBlocks on text with model.fit, then writes.

    python examples/train_decoder.py                    # Python's own help topics
    python examples/train_decoder.py --text book.txt    # any other text
    KERAS_BACKEND=torch python examples/train_decoder.py

The model reads bytes. It writes one byte at a time from a state whose size
does not depend on how much was read.
"""

import argparse

import keras
import numpy as np
from keras import ops
from text import load_text, sample_windows, split_text

from keras_darkformer import DarkTransformerBlock


@keras.saving.register_keras_serializable(package="examples")
class ByteDecoder(keras.Model):
    def __init__(
        self,
        num_blocks=2,
        hidden_dim=128,
        num_heads=4,
        num_features=64,
        train_geometry=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.config = {
            "num_blocks": num_blocks,
            "hidden_dim": hidden_dim,
            "num_heads": num_heads,
            "num_features": num_features,
            "train_geometry": train_geometry,
        }
        self.embedding = keras.layers.Embedding(256, hidden_dim)
        self.blocks = [
            DarkTransformerBlock(
                4 * hidden_dim,
                num_heads,
                num_features=num_features,
                train_geometry=train_geometry,
                rope_max_wavelength=10_000,
                activation="gelu",
                seed=seed,
            )
            for seed in range(num_blocks)
        ]
        self.norm = keras.layers.LayerNormalization()
        self.head = keras.layers.Dense(256)

    def call(self, tokens, states=None):
        """Logits of the next bytes; with `states` also the states after these bytes."""
        x = self.embedding(tokens)
        new_states = []
        for i, block in enumerate(self.blocks):
            if states is None:
                x = block(x)
            else:
                x, state = block(x, initial_state=states[i], return_state=True)
                new_states.append(state)
        logits = self.head(self.norm(x))
        return logits if states is None else (logits, new_states)

    def get_config(self):
        return {**super().get_config(), **self.config}


def write(model, prompt, length, seed=0, temperature=0.8):
    """Reads the prompt in one pass, then writes byte by byte from the state."""
    rng = np.random.default_rng(seed)
    states = [block.get_initial_state(batch_size=1) for block in model.blocks]
    tokens, written = np.frombuffer(prompt.encode(), "uint8")[None].astype("int32"), []
    for _ in range(length):
        logits, states = model(tokens, states=states)
        logits = ops.convert_to_numpy(logits)[0, -1].astype("float64") / temperature
        probabilities = np.exp(logits - logits.max())
        written.append(rng.choice(256, p=probabilities / probabilities.sum()))
        tokens = np.array([[written[-1]]], "int32")
    return prompt + bytes(written).decode(errors="replace")


def to_batches(windows):
    tokens = np.array([np.frombuffer(window, "uint8") for window in windows], "int32")
    return tokens[:, :-1], tokens[:, 1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="a text file; default: Python's own help topics")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=256, help="bytes per training sequence")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt", default="The statement ")
    parser.add_argument("--generate-length", type=int, default=200, help="bytes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)

    size = args.length + 1
    parts = {
        name: [stretch.encode() for stretch in stretches]
        for name, stretches in split_text(load_text(args.text), size).items()
    }
    train = to_batches(sample_windows(parts["train"], args.steps * args.batch_size, size, 1))
    test = to_batches(sample_windows(parts["test"], 64, size, 2))

    model = ByteDecoder()
    model.compile(
        optimizer=keras.optimizers.AdamW(2e-3, clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    print(f"{keras.config.backend()}: training on sequences of {args.length} bytes")
    model.fit(*train, batch_size=args.batch_size)
    loss = model.evaluate(*test, batch_size=args.batch_size, verbose=0)
    print(f"held-out text: {loss / np.log(2):.3f} bits per byte (uniform: 8)\n")
    print(write(model, args.prompt, args.generate_length))


if __name__ == "__main__":
    main()
