"""A fit that is interrupted goes on to where an undisturbed one ends."""

import errno
import os

import keras
import numpy as np
import pytest
from backends import BACKEND, further, on_one_backend
from hub.models import LENGTH, inputs, values

from keras_darkformer import distil, transfer_attention
from keras_darkformer.training.saved_arrays import load_arrays, save_arrays

from .models import dark_gemma, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting"),
    pytest.mark.usefixtures("few_steps"),
]

DATA = [inputs(14, 9, 5), inputs(7, 14, 12), inputs(14, 14, 3)]
HELD_OUT = {"token_ids": tokens(seed=9), "padding_mask": np.ones((3, LENGTH), "int32")}


class KilledError(Exception):
    """Instead of a signal."""


class KillAfter(keras.callbacks.Callback):
    """Ends the fit after a number of steps, in the middle of an epoch."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise KilledError


def transferred(model, stock, **options):
    return transfer_attention(
        model,
        DATA,
        steps=7,
        validate_every=2,
        validation_data=HELD_OUT,
        learning_rate=0.05,
        redraw=True,
        position_offset=20,
        verbose=0,
        **options,
    ).history


def distilled(model, stock, **options):
    return distil(
        model,
        stock,
        DATA,
        steps=7,
        validate_every=2,
        validation_data=HELD_OUT,
        learning_rate=0.01,
        verbose=0,
        **options,
    ).history


FITS = {"transfer": transferred, "distil": distilled}


@pytest.fixture(scope="module", params=["transfer", *further("distil")])
def undisturbed(request):
    """What fits, and the weights and the history it comes to."""
    keras.utils.set_random_seed(0)
    stock, model = dark_gemma()
    history = FITS[request.param](model, stock)
    return FITS[request.param], values(model), history


def test_it_comes_to_the_same_weights_and_history(undisturbed, tmp_path):
    fit, expected, expected_history = undisturbed
    backup = tmp_path / "backup.npz"
    # Within an epoch, before the next ends, in the last. Others compile for each.
    for steps in (5, 1, 3) if BACKEND == "torch" else (5,):
        stock, model = dark_gemma()
        with pytest.raises(KilledError):
            fit(model, stock, backup=backup, callbacks=[KillAfter(steps)])
    stock, model = dark_gemma()
    history = fit(model, stock, backup=backup)

    found = values(model)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-6, err_msg=path)
    assert set(history) == set(expected_history)
    for name, value in expected_history.items():
        np.testing.assert_allclose(history[name], value, rtol=1e-4, err_msg=name)

    # One that was done makes no step more.
    stock, again = dark_gemma()
    assert fit(again, stock, backup=backup, callbacks=[KillAfter(1)]) == history
    for path, value in values(again).items():
        np.testing.assert_array_equal(value, found[path], err_msg=path)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A file that a fit has left after one epoch."""
    backup = tmp_path_factory.mktemp("begun") / "backup.npz"
    stock, model = dark_gemma()
    with pytest.raises(KilledError):
        transferred(model, stock, backup=backup, callbacks=[KillAfter(3)])
    return backup


@on_one_backend
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_never_loaded(begun, damage, tmp_path):
    content = bytearray(begun.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    backup = tmp_path / "damaged.npz"
    backup.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(damage)])
    stock, model = dark_gemma()
    before = values(model)
    with pytest.raises(ValueError, match=r"damaged\.npz.* is damaged"):
        transferred(model, stock, backup=backup)
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, before[path])


@on_one_backend
def test_a_file_of_another_fit_is_refused(begun):
    stock, model = dark_gemma(num_features=8)
    with pytest.raises(ValueError, match=r"`backup` is of another fit: .*steps=7"):
        transferred(model, stock, backup=begun)
    stock, model = dark_gemma()
    with pytest.raises(ValueError, match=r"`backup` is of another fit: .*this one has steps=4"):
        transfer_attention(model, DATA, steps=4, backup=begun, verbose=0)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "arrays.npz"
    save_arrays(path, {"x": np.arange(3)}, {"step": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_arrays(path, {"x": np.arange(4)}, {"step": 2})
    arrays, facts = load_arrays(path)
    np.testing.assert_array_equal(arrays["x"], np.arange(3))
    assert facts == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]
