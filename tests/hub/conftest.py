import re
from pydoc_data.topics import topics

import pytest
from backends import BACKEND
from keras_hub.models import GemmaCausalLMPreprocessor, GemmaTokenizer

from .models import LENGTH, VOCABULARY, gemma_proto
from .saved import Saved


@pytest.fixture(scope="package", autouse=True)
def quick_backend():
    """Settings for models this small, here and in fresh processes.

    Torch's threads only get into each other's way, and XLA takes longer to
    optimise a program than to run it; the tests of ops and layers let it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if BACKEND == "torch":
            import torch

            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            patch.setenv("OMP_NUM_THREADS", "1")
            yield
            torch.set_num_threads(threads)
        elif BACKEND == "jax":
            import jax

            jax.config.update("jax_disable_most_optimizations", True)
            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
            yield
            jax.config.update("jax_disable_most_optimizations", False)
        else:
            yield


@pytest.fixture(scope="session")
def texts():
    """Sentences from the text that every Python carries."""
    words = re.sub(r"\W+", " ", topics["assignment"] + topics["lambda"]).lower().split()
    return [" ".join(words[i : i + 12]) for i in range(0, len(words) - 12, 12)]


@pytest.fixture(scope="session")
def sentencepiece_proto(texts):
    return gemma_proto(texts, vocab_size=VOCABULARY, user_defined_symbols=["<end_of_turn>"])


@pytest.fixture(scope="session")
def saved(sentencepiece_proto, tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("saved"), sentencepiece_proto)


@pytest.fixture
def preprocessor(sentencepiece_proto):
    tokenizer = GemmaTokenizer(proto=sentencepiece_proto)
    return GemmaCausalLMPreprocessor(tokenizer, sequence_length=LENGTH)
