"""Models whose queries and keys are anything but isotropic, and plain Keras models."""

import keras
import numpy as np
from backends import to_numpy
from hub.models import VOCABULARY, attentions, gemma

from keras_darkformer import DarkTransformerBlock, convert_to_dark

SPREAD = np.array([1.6, 1.2, 0.4, 0.1, 1.3, 0.9, 0.2, 0.1], "float32")


def anisotropic(model):
    """A stock model whose heads have a few strong directions."""
    for attention in attentions(model):
        for dense in (attention.query_dense, attention.key_dense):
            dense.kernel.assign(to_numpy(dense.kernel.value) * SPREAD)
    return model


def dark_gemma(build=gemma, **options):
    """A stock model and its dark copy."""
    stock = anisotropic(build())
    return stock, convert_to_dark(stock, **{"num_features": 16, "copy": True} | options)


def plain(vocabulary=VOCABULARY, seed=0, **options):
    """A causal model of two blocks around `DarkAttention`."""
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(vocabulary, 16)(tokens)
    options = {"num_features": 16, "rope_max_wavelength": 10_000.0, "head_dim": 4} | options
    for layer in range(2):
        x = DarkTransformerBlock(16, 4, num_key_value_heads=2, seed=layer, **options)(x)
    model = keras.Model(tokens, keras.layers.Dense(vocabulary)(x))
    rng = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        if weight.path.endswith(("kernel", "embeddings")):
            weight.assign(rng.standard_normal(weight.shape) * 2 / np.sqrt(weight.shape[0]))
    return model


def tokens(rows=3, length=14, seed=3):
    return np.random.default_rng(seed).integers(1, VOCABULARY, (rows, length)).astype("int32")


def feature_weights(feature_maps):
    """Arrays by path of all weights of feature maps."""
    return {w.path: to_numpy(w.value) for x in feature_maps for w in x.weights}
