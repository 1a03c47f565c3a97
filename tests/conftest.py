import gc
import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before anything imports tensorflow
# JAX compiles a program once, whichever test and whichever process asks for it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Nearly all of the time is XLA's, on TensorFlow and JAX alike, for programs that run once: half of
# it goes without LLVM's optimizations, half of the rest without its newer way to compile fusions.
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]


def is_known(package, version):
    """Whether a package is of the version that knows a flag, or is not there."""
    try:
        return importlib.metadata.version(package).startswith(version)
    except importlib.metadata.PackageNotFoundError:
        return True


# A flag that XLA does not know ends the process: jaxlib 0.5 and 0.12 do not know this one.
if is_known("jaxlib", "0.10.") and is_known("tensorflow", "2.21."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)

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
