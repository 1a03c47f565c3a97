"""The schedule of the fits of this package; its two rates are tried in test_distil.py."""

import numpy as np
import pytest
from backends import further

from keras_darkformer.training.optimizers import warm_cosine


@pytest.mark.parametrize("steps", [1, 9, 10, *further(40, 300)])
def test_the_rate_rises_in_the_first_tenth_and_falls_by_a_cosine(steps):
    schedule = warm_cosine(0.5, steps)

    found = [float(schedule(step)) for step in range(steps)]

    warmup = steps // 10
    rising = 0.5 * np.arange(1, warmup + 1) / (warmup + 1)
    done = np.arange(steps - warmup) / (steps - warmup)
    falling = 0.5 * (1 + np.cos(np.pi * done)) / 2
    np.testing.assert_allclose(found, np.concatenate([rising, falling]), rtol=1e-5, atol=1e-7)
