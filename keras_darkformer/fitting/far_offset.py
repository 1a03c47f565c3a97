"""The scale of features beside an exact memory, from softmax's mass on far keys."""

import numpy as np

BOUND = 80.0  # of an offset: far beyond what float32 can distinguish from infinity


class FarOffset:
    """Finds the offset at which a feature map gives the far part softmax's mass.

    Features tend to underestimate: an average of exponentials is more often below its expectation
    than above. One offset d per head, added to the far part's log-weights, makes the masses agree,

        sum_t sigmoid(z_t + d) = sum_t p_t,

    where z_t are the log-odds of the far part and p_t is softmax's far mass. This offset minimises
    the divergence of the near/far split from softmax's.
    """

    def __init__(self) -> None:
        self._log_odds: list[list[np.ndarray]] = []
        self._exact: list[list[np.ndarray]] = []

    def add(self, log_odds: np.ndarray, exact_log_odds: np.ndarray, counts: np.ndarray) -> None:
        """Adds a batch of queries.

        Args:
            log_odds: shape `(b, n, t)`, log-odds of the far part by the features, without an
                offset.
            exact_log_odds: the same by softmax.
            counts: bool, broadcastable to the same shape: which queries count. Those that see
                nothing on one side have no odds and must not count.
        """
        counts = np.broadcast_to(counts, log_odds.shape)
        for kept, odds in ((self._log_odds, log_odds), (self._exact, exact_log_odds)):
            odds = np.asarray(odds, "float64")
            kept.append([odds[:, head][counts[:, head]] for head in range(odds.shape[1])])

    def solve(self) -> np.ndarray:
        """The offset d per head, float32 of shape `(n,)`; 0 for a head in which no query counted.

        Raises:
            ValueError: if nothing was added.
        """
        if not self._exact:
            raise ValueError("No query was added, so there is no far mass to match.")
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
