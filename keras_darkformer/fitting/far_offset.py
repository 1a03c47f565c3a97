"""The scale of features behind a sliding window, from the mass softmax has there."""

import numpy as np

BOUND = 80.0  # of an offset: far beyond what float32 can tell from infinity


class FarOffset:
    """Finds the offset at which a feature map gives the far part softmax's mass.

    Features underestimate: an average of exponentials lies below its expectation more often than
    not. One offset d per head, added to the far part's log-weights, makes the masses agree,

        sum_t sigmoid(z_t + d) = sum_t p_t,

    z_t being the log-odds of the far part and p_t softmax's far mass. It is the offset that
    minimises the divergence of near/far from softmax's.
    """

    def __init__(self) -> None:
        self._log_odds: list[list[np.ndarray]] = []
        self._exact: list[list[np.ndarray]] = []

    def add(self, log_odds: np.ndarray, exact_log_odds: np.ndarray, counts: np.ndarray) -> None:
        """Adds a batch of queries.

        Args:
            log_odds: of the far part by the features, without an offset, of shape `(b, n, t)`.
            exact_log_odds: those by softmax.
            counts: bool, broadcastable to the same shape. Queries that see nothing on one side have
                no odds and must not count.
        """
        counts = np.broadcast_to(counts, log_odds.shape)
        for kept, odds in ((self._log_odds, log_odds), (self._exact, exact_log_odds)):
            odds = np.asarray(odds, "float64")
            kept.append([odds[:, head][counts[:, head]] for head in range(odds.shape[1])])

    def solve(self) -> np.ndarray:
        """d per head, float32 of shape `(n,)`; 0 for a head of which nothing counted.

        Raises:
            ValueError: if nothing was added.
        """
        if not self._exact:
            raise ValueError("No query was added: there is no far mass to agree with.")
        heads = range(len(self._exact[0]))
        return np.array([self._solve_head(head) for head in heads], "float32")

    def _solve_head(self, head: int) -> float:
        log_odds = np.concatenate([batch[head] for batch in self._log_odds])
        if not len(log_odds):
            return 0.0
        mass = _sigmoid(np.concatenate([batch[head] for batch in self._exact])).sum()
        low, high = -BOUND, BOUND  # the sum rises with d: bisection
        for _ in range(60):
            middle = (low + high) / 2
            if _sigmoid(log_odds + middle).sum() < mass:
                low = middle
            else:
                high = middle
        return (low + high) / 2


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))
