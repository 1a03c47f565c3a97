"""A bounded sample of the sequences of one layer."""

from collections.abc import Sequence

import numpy as np

from keras_darkformer.fitting.sequences import HeadSample


class Reservoir:
    """A random sample of the sequences it is offered, bounded in tokens.

    Args:
        max_tokens: int. Tokens in the sample; longer sequences are cut to this.
        seed: int. Seed of the sample.
    """

    def __init__(self, max_tokens: int, seed: int) -> None:
        self.max_tokens = max_tokens
        self._rng = np.random.default_rng(seed)
        # By rank: query, key and their masks.
        self._kept: list[tuple[float, list[np.ndarray]]] = []
        self._causal = False

    def add(self, batch: Sequence[np.ndarray], causal: bool) -> None:
        """Offers queries `(b, t, n, h)`, keys `(b, s, k, h)`, and their masks.

        Sequences with the lowest random numbers stay.
        """
        self._causal = causal
        for sequence in zip(*batch, strict=True):
            cut = [np.array(x[: self.max_tokens]) for x in sequence]
            self._kept.append((float(self._rng.random()), cut))
        self._kept.sort(key=lambda item: item[0])
        total = 0
        for count, (_, (query, key, *_)) in enumerate(self._kept):
            total += max(len(query), len(key))
            if total > self.max_tokens and count:
                del self._kept[count:]
                break

    def of_head(self, head: int) -> HeadSample | None:
        """The sample of a key/value head, padded to one length; `None` if it is empty."""
        if not self._kept:
            return None
        queries, keys, query_masks, key_masks = zip(*(x for _, x in self._kept), strict=True)
        groups = queries[0].shape[1] // keys[0].shape[1]
        group = slice(head * groups, (head + 1) * groups)
        return HeadSample(
            _stacked([query[:, group] for query in queries]),
            _stacked([key[:, head] for key in keys]),
            _stacked(query_masks),
            _stacked(key_masks),
            self._causal,
        )


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one array, padded with zeros at the end."""
    length = max(len(row) for row in rows)
    stacked = np.zeros((len(rows), length, *rows[0].shape[1:]), rows[0].dtype)
    for row, into in zip(rows, stacked, strict=True):
        into[: len(row)] = row
    return stacked
