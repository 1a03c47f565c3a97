import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports tensorflow

import keras
import numpy as np
import pytest

if keras.backend.backend() == "torch":
    import torch

    # Tiny tensors: a second thread only waits for the first.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
