"""The length up to which the kernel itself is faster to compute than its estimate."""

from typing import NamedTuple

from keras_darkformer.ops.backend import accelerated, backend


class Crossover(NamedTuple):
    """Where both forms take equally long, fitted to `benchmarks/results/crossover_*.json`.

    Attributes:
        length: that number of tokens for 128 features, heads of size 64 and no groups.
        features, head_dim, groups: the powers of these three with which it grows.
    """

    length: float
    features: float
    head_dim: float
    groups: float

    def at(self, num_features: int, head_dim: int, groups: int) -> int:
        """Tokens below which the exact form is faster."""
        parts = (
            (num_features / 128) ** self.features,
            (head_dim / 64) ** self.head_dim,
            groups**self.groups,
        )
        return round(self.length * parts[0] * parts[1] * parts[2])


# Measured for forward passes on one CPU thread, by backend and whether they are causal. For causal
# calls, one sequence of four heads gives 2,130 tokens on PyTorch and 535 on JAX. With 8 to 32
# heads, or batches, features in float32 win there by 1.1 to 1.6 times
# (`benchmarks/results/use_*.json`), so it is 0.7 times that. In bfloat16, which some CPUs multiply
# faster, PyTorch's features lose at 2,048 tokens by 1.8 times.
MEASURED = {
    "torch": {
        True: Crossover(1490, 0.77, -0.48, -0.62),
        False: Crossover(665, 0.57, -0.35, -0.31),
    },
    "jax": {
        True: Crossover(375, 0.69, 0.0, -0.58),
        False: Crossover(336, 0.81, -0.31, -0.47),
    },
    "tensorflow": {
        True: Crossover(512, 0.75, -0.06, -0.50),
        False: Crossover(304, 0.75, -0.06, -0.50),
    },
}
# On an accelerator, for every call: on an H200 in bfloat16, one causal sequence of 16 heads of 64
# takes as long either way at about 17,000 tokens on JAX. On PyTorch, which starts every operation
# by itself, it is about 53,000 (`benchmarks/README.md`), and less for a batch, which fills the
# device sooner, and with gradients. TensorFlow is taken to be like JAX.
ON_ACCELERATOR = {"torch": 32768, "jax": 16384, "tensorflow": 16384}


def crossover(head_dim: int, num_features: int, groups: int, *, causal: bool) -> int:
    """The length below which the exact form of a forward pass is faster.

    Args:
        head_dim: int. Size h of a head.
        num_features: int. Features m.
        groups: int. Query heads for each key/value head.
        causal: bool. Whether query t attends to keys up to t.

    Returns:
        A number of tokens, for as many queries as keys.

    Example:

    >>> crossover(64, 128, 1, causal=False) > 0
    True
    """
    if accelerated():
        return ON_ACCELERATOR[backend()]
    return MEASURED[backend()][causal].at(num_features, head_dim, groups)
