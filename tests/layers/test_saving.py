import keras
import numpy as np
import pytest
from fresh_process import run_python

from keras_darkformer import DarkAttention, DarkTransformerBlock

from .helpers import HEADS, LENGTH, PADDING, WIDTH, assert_close, scrambled

TOKENS = np.where(PADDING, np.arange(1, LENGTH + 1), 0)


def attend(x):
    memory = DarkAttention(**HEADS, attention_mode="exact", geometry_scale=0.5)(x, x)
    # No seed: the projection is a weight, so that saving keeps it.
    return DarkAttention(**HEADS, rope_max_wavelength=100.0)(x, memory, use_causal_mask=True)


def transform(x):
    for seed in range(2):
        x = DarkTransformerBlock(24, 4, num_features=8, seed=seed, activation="gelu")(x)
    return x


def models():
    for name, layers in {"attention": attend, "blocks": transform}.items():
        tokens = keras.Input((LENGTH,), dtype="int32")
        x = keras.layers.Embedding(LENGTH + 1, WIDTH, mask_zero=True)(tokens)
        yield name, scrambled(keras.Model(tokens, layers(x)))


def test_models_come_back_from_a_file_as_they_were(tmp_path):
    for name, model in models():
        path = tmp_path / f"{name}.keras"
        model.save(path)
        restored = keras.models.load_model(path)
        assert [type(layer) for layer in restored.layers] == [type(x) for x in model.layers]
        assert_close(restored.predict(TOKENS, verbose=0), model.predict(TOKENS, verbose=0), 1e-6)

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
        for path in sorted(folder.glob("*.keras")):
            model = keras.models.load_model(path)
            np.save(path.with_suffix(".npy"), model.predict(tokens, verbose=0))
            print(path.stem, *sorted({type(layer).__name__ for layer in model.layers}))
    """
    expected = {}
    np.save(tmp_path / "tokens.npy", TOKENS)
    for name, model in models():
        model.save(tmp_path / f"{name}.keras")
        expected[name] = model.predict(TOKENS, verbose=0)
    assert run_python(code, tmp_path).splitlines()[-2:] == [
        "attention DarkAttention Embedding InputLayer",
        "blocks DarkTransformerBlock Embedding InputLayer",
    ]
    for name, output in expected.items():
        assert_close(np.load(tmp_path / f"{name}.npy"), output, 1e-6)
