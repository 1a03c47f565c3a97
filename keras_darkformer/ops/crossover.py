"""Up to which length the kernel itself is computed faster than features estimate it."""

from typing import NamedTuple

from keras_darkformer.ops.backend import accelerated, backend


class Crossover(NamedTuple):
    """Where the two forms take equally long, fitted to `benchmarks/results/crossover_*.json`.

    Attributes:
        length: tokens at which they do for 128 features, heads of size 64 and no groups.
        features, head_dim, groups: with which powers of the three that grows.
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


# Of forward passes on one thread of a CPU, by backend and whether they are causal.
MEASURED = {
    "torch": {
        True: Crossover(2254, 0.92, -0.47, -0.56),
        False: Crossover(817, 0.57, -0.38, -0.39),
    },
    "jax": {
        True: Crossover(373, 0.87, -0.19, -0.61),
        False: Crossover(271, 0.75, -0.31, -0.55),
    },
    "tensorflow": {
        True: Crossover(512, 0.75, -0.06, -0.50),
        False: Crossover(304, 0.75, -0.06, -0.50),
    },
}
# On accelerators it is only estimated, for every call: flash attention keeps its lead longer there.
ON_ACCELERATOR = 4096


def crossover(head_dim: int, num_features: int, groups: int, *, causal: bool) -> int:
    """The length below which a forward pass is faster exactly.

    Args:
        head_dim: int. Size h of a head.
        num_features: int. Features m.
        groups: int. Query heads for each key/value head.
        causal: bool. Whether query t attends to keys up to t.

    Returns:
        Tokens, queries and keys being as many.

    Example:

    >>> crossover(64, 128, 1, causal=False) > 0
    True
    """
    if accelerated():
        return ON_ACCELERATOR
    return MEASURED[backend()][causal].at(num_features, head_dim, groups)
