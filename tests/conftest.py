import gc
import os
from pathlib import Path

from xla import quick_flags

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports tensorflow
# JAX compiles a program once, whichever test and whichever process asks for it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["XLA_FLAGS"] = quick_flags()

import keras
import numpy as np
import pytest
from backends import untraced

if keras.backend.backend() == "torch":
    import torch

    # Tiny tensors: a second thread only waits for the first.
    torch.set_num_threads(1)
elif keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Grappler, too, takes longer to improve a graph than it takes to run it once.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Rubbish is collected once a module, and what is left is not looked through again."""
    gc.set_threshold(50_000, 50, 100)
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture
def few_steps():
    """For tests of training that would find the same however its few steps are run."""
    with untraced():
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)
