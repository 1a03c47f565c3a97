"""How properties are tried: the same examples every time, as many as a backend has time for."""

from backends import BACKEND
from hypothesis import HealthCheck, settings

# JAX compiles every example for itself.
EXAMPLES = {"torch": 150, "tensorflow": 40, "jax": 6}[BACKEND]


def tried(share=1.0):
    """The settings of a property."""
    return settings(
        max_examples=max(4, int(share * EXAMPLES)),
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
