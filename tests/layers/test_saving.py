import keras
import numpy as np
import pytest
from backends import DEFAULT_JIT
from fresh_process import run_python

from keras_darkformer import DarkAttention, DarkTransformerBlock
from keras_darkformer.layers import FeatureMap

from .helpers import HEADS, LENGTH, PADDING, WIDTH, arrays, assert_close, normal, scrambled

TOKENS = np.where(PADDING, np.arange(1, LENGTH + 1), 0)


def attend(x):
    memory = DarkAttention(**HEADS, attention_mode="exact", geometry_scale=0.5)(x, x)
    # No seed: the projection is a weight, so that saving keeps it.
    return DarkAttention(**HEADS, rope_max_wavelength=100.0)(x, memory, use_causal_mask=True)


def transform(x):
    for seed in range(2):
        x = DarkTransformerBlock(24, 4, num_features=8, seed=seed, activation="gelu")(x)
    return x


def calibrated(x):
    """Both classes of feature maps, and a window."""
    for method in ("spectral", "clusters"):
        block = DarkTransformerBlock(24, 4, num_features=8, seed=1, name=method)
        x = block(x)
        block.attention.swap_feature_map("exponential" if method == "clusters" else "dark")
        query = normal(2, 12, 4, WIDTH // 4)
        block.attention.feature_map.calibrate(query, query[::-1], method=method, refine=False)
    attention = DarkAttention(**HEADS, seed=2, sliding_window=3, tie_geometry=False)
    y = attention(x, x, use_causal_mask=True)
    query, key = normal(2, 12, 4, 4), normal(2, 12, 2, 4, seed=1)
    attention.feature_map.calibrate(query, key, causal=True)
    attention.feature_map.far_offset.assign(np.arange(4))
    return y


MODELS = {"attention": attend, "blocks": transform, "calibrated": calibrated}


def models():
    for name, layers in MODELS.items():
        tokens = keras.Input((LENGTH,), dtype="int32")
        x = keras.layers.Embedding(LENGTH + 1, WIDTH, mask_zero=True)(tokens)
        yield name, scrambled(keras.Model(tokens, layers(x)))


def outputs(model):
    """As `predict` gives them on JAX, which compiles that once for all models of a kind."""
    return model.predict(TOKENS, verbose=0) if DEFAULT_JIT else arrays(model(TOKENS))


def feature_maps(model):
    return [x for x in model._flatten_layers() if isinstance(x, FeatureMap)]


def test_models_come_back_from_a_file_as_they_were(tmp_path):
    for name, model in models():
        path = tmp_path / f"{name}.keras"
        model.save(path)
        restored = keras.models.load_model(path)
        assert [type(layer) for layer in restored.layers] == [type(x) for x in model.layers]
        kinds = [x.kind for x in feature_maps(model)]
        assert [x.kind for x in feature_maps(restored)] == kinds
        assert ("exponential" in kinds) == (name == "calibrated")
        assert_close(outputs(restored), outputs(model), 1e-6)

        for weight in restored.weights:
            weight.assign(0.0 * weight)
        path = tmp_path / f"{name}.weights.h5"
        model.save_weights(path)
        restored.load_weights(path)
        for before, after in zip(model.get_weights(), restored.get_weights(), strict=True):
            np.testing.assert_array_equal(after, before)


@pytest.mark.slow
def test_models_come_back_in_another_process(tmp_path):
    code = """
        import sys
        from pathlib import Path

        import keras
        import numpy as np

        import keras_darkformer

        folder = Path(sys.argv[1])
        tokens = np.load(folder / "tokens.npy")
        compiles = keras.backend.backend() == "jax"
        for path in sorted(folder.glob("*.keras")):
            model = keras.models.load_model(path)
            output = model.predict(tokens, verbose=0) if compiles else model(tokens)
            np.save(path.with_suffix(".npy"), keras.ops.convert_to_numpy(output))
            print(path.stem, *sorted({type(layer).__name__ for layer in model.layers}))
    """
    expected = {}
    np.save(tmp_path / "tokens.npy", TOKENS)
    for name, model in models():
        model.save(tmp_path / f"{name}.keras")
        expected[name] = outputs(model)
    assert run_python(code, tmp_path).splitlines()[-3:] == [
        "attention DarkAttention Embedding InputLayer",
        "blocks DarkTransformerBlock Embedding InputLayer",
        "calibrated DarkAttention DarkTransformerBlock Embedding InputLayer",
    ]
    for name, output in expected.items():
        assert_close(np.load(tmp_path / f"{name}.npy"), output, 1e-6)
