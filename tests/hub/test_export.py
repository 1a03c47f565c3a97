"""Exported models answer as the model does, wherever stock KerasHub can be exported."""

import keras
import numpy as np
import pytest
from backends import BACKEND, further, to_numpy

from .models import LENGTH, dark, inputs, outputs, row

BUILDERS = {
    "Llama": lambda: row("Llama", num_layers=1),
    "GPT2": lambda: row("GPT2", num_layers=1),
}
OPTIONS = {"Llama": {"sliding_window": 3}, "GPT2": {}}
BATCHES = inputs(LENGTH, 5, 9), inputs(4, LENGTH)
SHORTER = inputs(9, 4, 6, total=9)


@pytest.fixture(params=["Llama", *further("GPT2")])
def models(request):
    """A stock model and a dark one."""
    build = BUILDERS[request.param]
    pair = build(), dark(build(), **OPTIONS[request.param])
    for model in pair:
        outputs(model, BATCHES[0])  # ONNX wants models that have been called
    return pair


def signature(length):
    return [{name: keras.InputSpec("int32", (None, length), name=name) for name in BATCHES[0]}]


def failure(model, path, **options):
    """Why the model can't be exported; `None` if it was."""
    try:
        model.export(path, verbose=False, **options)
    except Exception as error:
        return error


def check(model, exported, batches):
    for batch in batches:
        expected = outputs(model, batch)
        tolerance = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(exported(batch), expected, rtol=0, atol=tolerance)


def saved_model(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)  # which holds the variables
    return lambda batch: loaded.serve(batch).numpy()


@pytest.mark.parametrize("length", [LENGTH, None], ids=["fixed_length", "any_length"])
def test_saved_models_of_tensorflow(models, length, tmp_path):
    stock, model = models
    path, options = str(tmp_path / "model"), {"input_signature": signature(length)}
    if BACKEND == "torch" or (BACKEND == "jax" and length is None):
        # Keras' exporter takes no dicts on torch; on JAX it gives the two
        # inputs lengths that it does not know to be the same.
        assert failure(stock, path, **options) is not None
        assert failure(model, path, **options) is not None
        return
    model.export(path, verbose=False, **options)
    check(model, saved_model(path), BATCHES if length else (*BATCHES, SHORTER))


@pytest.mark.skipif(BACKEND != "torch", reason="a format of torch")
def test_exported_programs_of_torch(models, tmp_path):
    import torch

    model, path = models[1], tmp_path / "model.pt2"
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    shapes = {"dynamic_shapes": [dict.fromkeys(BATCHES[0], rows)]}
    sizes = {"input_signature": signature(LENGTH)}
    model.export(path, format="torch", verbose=False, **sizes, **shapes)
    program = torch.export.load(path).module()

    def run(batch):
        return to_numpy(program({name: torch.tensor(x) for name, x in batch.items()}))

    check(model, run, BATCHES)


def test_onnx(models, tmp_path):
    stock, model = models
    options = {"format": "onnx", "input_signature": signature(LENGTH)}
    path = str(tmp_path / "model.onnx")
    if (error := failure(stock, path, **options)) is not None:
        assert type(failure(model, path, **options)) is type(error)
        pytest.skip(f"stock models fail alike: {type(error).__name__}: {str(error)[:60]}")
    model.export(path, verbose=False, **options)
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    check(model, lambda batch: session.run(None, batch)[0], BATCHES)
