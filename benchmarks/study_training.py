"""Trains many replicas of one model at once: every rate with every seed, in one program of JAX.

Replicas differ in their weights, their draws, their batches and their rate, and in nothing else:
all take the same steps of AdamW. Weights stand in stacks, the replica first.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import keras
import numpy as np

SEGMENT = 50  # steps between two draws of random features, and in one call of the program


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a replica is trained, but for its rate.

    Attributes:
        steps: int.
        batch_size: int. Windows a step.
        guarded: whether the rate warms up in the first twentieth of the steps and falls by a cosine
            to a tenth, and gradients are clipped to a norm of 1; else neither.
    """

    steps: int
    batch_size: int = 8
    guarded: bool = True

    def share_of_rate(self):
        """Of the rate, what each step takes, `(steps,)`."""
        if not self.guarded:
            return np.ones(self.steps, "float32")
        step, warm = np.arange(self.steps), max(1, self.steps // 20)
        left = np.clip((step - warm) / max(1, self.steps - warm), 0.0, 1.0)
        falling = 0.1 + 0.9 * 0.5 * (1.0 + np.cos(math.pi * left))
        return np.where(step < warm, (step + 1) / warm, falling).astype("float32")

    def optimizer(self):
        clip = {"global_clipnorm": 1.0} if self.guarded else {}
        return keras.optimizers.AdamW(1.0, weight_decay=0.01, beta_2=0.98, **clip)


def values(variables):
    return [np.asarray(variable.value) for variable in variables]


class Replicas:
    """Copies of a model in training.

    Args:
        model: the model, which lends its layers; its own weights stay as they are.
        weights: by seed, what `values` gives of its trainable and of its other variables.
        recipe: `Recipe`.
    """

    def __init__(self, model, weights, recipe):
        self.model, self.weights, self.recipe = model, weights, recipe
        self.seeds = len(weights)
        self.optimizer = recipe.optimizer()
        self.optimizer.build(model.trainable_variables)
        paths = [variable.path for variable in self.optimizer.variables]
        self.at_rate = next(i for i, path in enumerate(paths) if path.endswith("learning_rate"))

    def begin(self, rates):
        """Gives all replicas the weights they start from.

        Args:
            rates: a list of floats; replica `r` has rate `r // seeds` and seed `r % seeds`.
        """
        self.count = len(rates) * self.seeds
        self.rates = jnp.repeat(jnp.array(rates, "float32"), self.seeds)
        trained, others = zip(*self.weights, strict=True)
        own = [self.repeated([value] * self.seeds) for value in values(self.optimizer.variables)]
        self.state = (self.stacked(trained), self.stacked(others), own)

    def stacked(self, by_seed):
        return [self.repeated(values) for values in zip(*by_seed, strict=True)]

    def repeated(self, by_seed):
        """Of every seed a value: of every replica."""
        stack = np.stack(by_seed)
        return jnp.asarray(np.tile(stack, (self.count // self.seeds,) + (1,) * (stack.ndim - 1)))

    def replace(self, index, by_seed):
        """Gives variable number `index` that is not trained a value for every seed."""
        self.state[1][index] = self.repeated(by_seed)

    def loss(self, trained, others, window):
        logits, others = self.model.stateless_call(trained, others, inputs(window), training=True)
        return losses(logits, window).mean(), others

    def step(self, state, rate, window):
        """One replica's step."""
        trained, others, own = state
        gradient = jax.value_and_grad(self.loss, has_aux=True)
        (loss, others), gradients = gradient(trained, others, window)
        own = [rate if i == self.at_rate else value for i, value in enumerate(own)]
        trained, own = self.optimizer.stateless_apply(own, gradients, trained)
        return (trained, others, own), loss

    @functools.cached_property
    def segment(self):
        """The program: state, rates `(t, r)` and windows `(t, seeds, b, length + 1)` to state and
        losses `(t, r)`."""
        seed_of = jnp.arange(self.count) % self.seeds

        def one(state, now):
            rates, windows = now
            return jax.vmap(self.step)(state, rates, windows[seed_of])

        def all_steps(state, *of_steps):
            return jax.lax.scan(one, state, of_steps)

        return jax.jit(all_steps, donate_argnums=0)

    def train(self, windows, between=None):
        """Trains all replicas from where they are.

        Args:
            windows: by seed, `(steps * batch_size, length + 1)` token ids.
            between: function of the steps done, called between segments.

        Returns:
            The losses of all steps, `(steps, replicas)`.
        """
        steps, size = self.recipe.steps, self.recipe.batch_size
        by_step = np.stack([rows.reshape(steps, size, -1) for rows in windows], axis=1)
        rates = self.recipe.share_of_rate()[:, None] * self.rates
        found = []
        for start in range(0, steps, SEGMENT):
            if start and between:
                between(start)
            now = slice(start, min(start + SEGMENT, steps))
            self.state, of_steps = self.segment(self.state, rates[now], jnp.asarray(by_step[now]))
            found.append(np.asarray(of_steps))
        return np.concatenate(found)

    @functools.cached_property
    def judged(self):
        """The program: weights and windows `(b, length + 1)` to losses and shares of tokens right,
        each `(replicas, b)`."""

        def one(trained, others, window):
            logits, _ = self.model.stateless_call(trained, others, inputs(window), training=False)
            right = jnp.argmax(logits, -1) == window[:, 1:]
            return losses(logits, window).mean(-1), right.mean(-1)

        return jax.jit(jax.vmap(one, (0, 0, None)))

    def judge(self, windows):
        """Loss and share of tokens right in every window, each `(replicas, windows)`."""
        parts = np.split(windows, range(8, len(windows), 8))
        found = [self.judged(*self.state[:2], jnp.asarray(part)) for part in parts]
        return [np.concatenate([np.asarray(x) for x in of], 1) for of in zip(*found, strict=True)]


def inputs(window):
    """What a causal LM takes."""
    return {"token_ids": window[:, :-1], "padding_mask": jnp.ones_like(window[:, :-1])}


def losses(logits, window):
    """Of every next token, `(b, length)`."""
    log_shares = jax.nn.log_softmax(logits.astype("float32"))
    return -jnp.take_along_axis(log_shares, window[:, 1:, None], -1)[..., 0]
