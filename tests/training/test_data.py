"""Data of any kind that `fit` takes becomes the same batches."""

import keras
import numpy as np
import pytest

from keras_darkformer.training.data import batches

TEXTS = ["one", "two und drei", "größer", "four", "five"]


class Length:
    """A model whose preprocessor says how long texts are, and refuses all but lists of strings."""

    def preprocessor(self, texts):
        assert all(type(text) is str for text in texts)
        return {"token_ids": np.array([[len(text)] for text in texts])}, None


class Dataset(keras.utils.PyDataset):
    def __init__(self, items):
        super().__init__()
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def encoded(texts):
    return [text.encode() for text in texts]


def pieces(make=list):
    return [make(TEXTS[:2]), make(TEXTS[2:4]), make(TEXTS[4:])]


def tensorflow():
    return pytest.importorskip("tensorflow")


TEXT = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "bytes": lambda: encoded(TEXTS),
    "NumPy strings in a list": lambda: list(np.array(TEXTS)),
    "array": lambda: np.array(TEXTS),
    "array of objects": lambda: np.array(TEXTS, object),
    "array of bytes": lambda: np.array(encoded(TEXTS)),
    "array of bytes as objects": lambda: np.array(encoded(TEXTS), object),
    "column": lambda: np.array(TEXTS)[:, None],
    "with labels": lambda: (np.array(TEXTS), np.zeros(5)),
    "tensor": lambda: tensorflow().constant(TEXTS),
    "single strings": lambda: (text for text in TEXTS),
    "single bytes": lambda: iter(encoded(TEXTS)),
    "single strings with labels": lambda: ((text, 1) for text in TEXTS),
    "lists": pieces,
    "arrays": lambda: iter(pieces(np.array)),
    "arrays with labels": lambda: ((x, np.zeros(len(x))) for x in pieces(np.array)),
    "an empty piece": lambda: iter([*pieces(np.array), np.array([], str)]),
    "PyDataset of lists": lambda: Dataset(pieces()),
    "PyDataset of bytes": lambda: Dataset(pieces(encoded)),
    "PyDataset of arrays": lambda: Dataset([(x, np.zeros(len(x))) for x in pieces(np.array)]),
    "PyDataset of strings": lambda: Dataset(TEXTS),
    "PyDataset with an empty list": lambda: Dataset([*pieces(), []]),
    "tf.data": lambda: tensorflow().data.Dataset.from_tensor_slices(TEXTS).batch(2),
    "tf.data without batches": lambda: tensorflow().data.Dataset.from_tensor_slices(TEXTS),
}


@pytest.mark.parametrize("kind", TEXT)
def test_text_of_any_kind_comes_to_the_preprocessor_as_lists_of_strings(kind):
    found = [inputs["token_ids"] for inputs in batches(Length(), TEXT[kind](), 2)]
    assert [len(x) for x in found] == [2, 2, 1]
    assert np.concatenate(found)[:, 0].tolist() == [3, 12, 6, 4, 4]


@pytest.mark.parametrize("text", ["one", b"one", np.array("one")], ids=repr)
def test_one_string_is_no_data(text):
    with pytest.raises(ValueError, match="one string"):
        next(batches(Length(), text))


def test_batches_without_rows_are_left_out():
    rows = np.ones((4, 3))
    found = list(batches(Length(), [rows[:2], rows[:0], (rows[:1], rows[:1]), (rows[:0], 0)]))
    assert [x.shape for x in found] == [(2, 3), (1, 3)]
    for nothing in ([], [rows[:0]], rows[:0], np.array([], str), Dataset([[]])):
        with pytest.raises(ValueError, match="no batches"):
            list(batches(Length(), nothing))


def test_arrays_are_cut_and_others_pass_as_they_are():
    arrays = {"a": np.arange(10).reshape(5, 2), "b": np.arange(5)}
    found = list(batches(Length(), (arrays, np.zeros(5)), 2))
    assert [x["a"].tolist() for x in found] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]
    assert [x["b"].tolist() for x in found] == [[0, 1], [2, 3], [4]]
