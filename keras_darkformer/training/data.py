"""Models and data as the routines of this package take them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_darkformer.layers.core import FeatureAttention
from keras_darkformer.layers.tree import every_layer
from keras_darkformer.ops.backend import no_gradients
from keras_darkformer.types import Data, Model, Tensor


def without_head(model: Model) -> Model:
    """The backbone of a KerasHub task; any other model as a whole.

    A task's head may have inputs of its own, such as a masked LM's positions. Other models may call
    their parts in any way.
    """
    is_task = hasattr(model, "backbone") and hasattr(model, "preprocessor")
    return model.backbone if is_task else model


def dark_layers(model: Model) -> dict[str, FeatureAttention]:
    """All dark attention layers in a model by name, in the order in which they run.

    Raises:
        ValueError: if there are none.
    """
    found = [layer for layer in every_layer(model) if isinstance(layer, FeatureAttention)]
    if not found:
        raise ValueError(
            "`model` must have dark attention layers: a model made by `convert_to_dark`, or one "
            f"with `DarkAttention` in it. Received: {type(model).__name__}, which has none."
        )
    of_backbone = getattr(without_head(model), "dark_layers", {})
    names = {id(layer): f"layer_{index}" for index, layer in of_backbone.items()}
    named: dict[str, FeatureAttention] = {}
    for layer in found:
        name = names.get(id(layer), layer.path or layer.name)
        # Converted models of one kind have layers with the same paths.
        same = sum(x == name or x.startswith(f"{name}#") for x in named)
        named[f"{name}#{same + 1}" if same else name] = layer
    return named


def layers_with_features(layers: dict[str, FeatureAttention]) -> dict[str, FeatureAttention]:
    """The dark layers whose feature maps can be fitted.

    Raises:
        ValueError: if there are none.
    """
    found = {name: layer for name, layer in layers.items() if layer.feature_map.num_features}
    if not found:
        raise ValueError(
            "`model` must have a dark layer with features to fit. Received: a model whose layers "
            'all have `feature_map="none"`'
        )
    return found


def run(model: Model, inputs: Data) -> Any:
    """Runs a model; a KerasHub task without its head."""
    body = without_head(model)
    if body is not model and isinstance(body.input, dict):
        inputs = {name: inputs[name] for name in body.input}
    return body(inputs, training=False)


def look(model: Model, inputs: Data) -> Any:
    """Like `run`, but without gradients."""
    with no_gradients():
        return run(model, inputs)


def batches(model: Model, data: Data, batch_size: int = 8) -> Iterator[Any]:
    """Yields inputs for `model`, batch by batch, from data as `fit` takes it.

    Batches without rows, such as the last one of a filtered data set, are skipped.

    Args:
        model: a Keras model, or a KerasHub task with a preprocessor for text.
        data: a list or array of strings or bytes, arrays or dicts of arrays (cut into batches), or
            an iterable of batches or of single strings, such as a `tf.data.Dataset`, a
            `keras.utils.PyDataset` or a `DataLoader`; of tuples, only the first element is used.
        batch_size: rows per batch of data that has none.
    """
    count = 0
    for inputs in _raw_batches(data, batch_size):
        if (texts := texts_of(inputs)) is not None:
            inputs = _preprocess(model, texts) if texts else ()
        inputs = keras.tree.map_structure(_array, inputs)
        if any(len(leaf) for leaf in keras.tree.flatten(inputs)):
            count += 1
            yield inputs
    if not count:
        raise ValueError("`data` has no batches.")


class Kept:
    """Makes an iterator repeatable, by keeping what came out of it."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.batches: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches
        for batch in self.source:
            self.batches.append(batch)
            yield batch


class KnownBatches(keras.utils.PyDataset):
    """Batches kept in memory, for any number of passes."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Any:
        return self.kept[index]


def _raw_batches(data: Data, batch_size: int) -> Iterator[Any]:
    """Batches from data of any kind; those of text are lists of strings."""
    if _one_text(data) is not None:
        raise ValueError("`data` must be a list of strings or batches. Received: one string")
    if isinstance(data, tuple) and texts_of(data) is None:
        data = data[0]
    if (texts := texts_of(data)) is not None:
        yield from _cut(texts, len(texts), batch_size)
    elif isinstance(data, Mapping) or hasattr(data, "shape"):
        rows = {len(leaf) for leaf in keras.tree.flatten(data)}
        if len(rows) != 1:
            raise ValueError(
                f"Arrays in `data` must have the same number of rows. Received: {sorted(rows)}"
            )
        yield from _cut(data, rows.pop(), batch_size)
    else:
        yield from _with_texts_joined(_items(data), batch_size)


def _items(data: Data) -> Iterator[Any]:
    """The items of an iterable; of tuples, the first element."""
    if isinstance(data, keras.utils.PyDataset):
        data = map(data.__getitem__, range(len(data)))
    if not isinstance(data, Iterable):
        raise ValueError(
            "`data` must be strings, arrays, a dict of arrays or an iterable of batches. "
            f"Received: {type(data).__name__}"
        )
    for item in data:
        is_tuple = isinstance(item, tuple | list) and len(item) and texts_of(item) is None
        yield item[0] if is_tuple else item


def _with_texts_joined(items: Iterator[Any], batch_size: int) -> Iterator[Any]:
    """Batches as they come, and single strings in batches of `batch_size`."""
    texts: list[str] = []
    for item in items:
        if (text := _one_text(item)) is None:
            yield item
            continue
        texts.append(text)
        if len(texts) == batch_size:
            yield texts
            texts = []
    if texts:
        yield texts


def _cut(data: Data, rows: int, batch_size: int) -> Iterator[Any]:
    for start in range(0, rows, batch_size):
        part = slice(start, start + batch_size)
        is_list = isinstance(data, list)
        yield (
            data[part] if is_list else keras.tree.map_structure(lambda x, part=part: x[part], data)
        )


def texts_of(data: Data) -> list[str] | None:
    """A list of the strings in a sequence, an array or a tensor; `None` for other data."""
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        texts = [text for text in map(_one_text, data) if text is not None]
        return texts if texts and len(texts) == len(data) else None
    if not _holds_objects(data) or not len(data.shape):
        return None
    # NumPy turns a TensorFlow tensor into an array of bytes.
    texts = np.asarray(data).reshape(-1).tolist()
    return texts_of(texts) if texts else []


def _one_text(x: Any) -> str | None:
    """A string, also from bytes or a scalar array or tensor; `None` for anything else."""
    if _holds_objects(x) and not len(x.shape):
        x = np.asarray(x).item()
    if isinstance(x, bytes):
        return x.decode()
    return str(x) if isinstance(x, str) else None


def _holds_objects(x: Any) -> bool:
    """Whether `x` is an array or a TensorFlow tensor whose elements may be strings."""
    kind = getattr(x, "dtype", None)
    if kind is None or not hasattr(x, "shape"):
        return False
    return getattr(kind, "kind", "") in ("O", "U", "S", "T") or "string" in str(kind)


def _preprocess(model: Model, texts: list[str]) -> Any:
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is None:
        raise ValueError(
            "`data` holds text, which needs a model with a preprocessor. Received: "
            f"{type(model).__name__} without one"
        )
    inputs = preprocessor(texts)
    return inputs[0] if isinstance(inputs, tuple | list) else inputs


def _array(x: Tensor) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else keras.ops.convert_to_numpy(x)


def position_offsets(
    position_offset: int | tuple[int, int] | None, seed: int
) -> Iterator[int | None]:
    """Yields an offset per batch: `None`, or a random one up to and including the bound.

    `check_position_offset` checks the bounds.
    """
    if position_offset is None:
        while True:
            yield None
    low, high = (0, position_offset) if isinstance(position_offset, int) else position_offset
    rng = np.random.default_rng(seed)
    while True:
        yield int(rng.integers(low, high + 1))


def check_position_offset(position_offset: Any, layers: Iterable[FeatureAttention]) -> None:
    """Raises a ValueError unless it is `None`, an int, or an ordered pair of ints, from 0 up.

    Unless it is `None`, some of the layers must have rotary positions, which it shifts.
    """
    bounds = (0, position_offset) if isinstance(position_offset, int) else position_offset
    if bounds is None:
        return
    if (
        not isinstance(bounds, tuple | list)
        or len(bounds) != 2
        or not all(isinstance(x, int | np.integer) for x in bounds)
        or not 0 <= bounds[0] <= bounds[1]
    ):
        raise ValueError(
            "`position_offset` must be `None`, the largest offset or a (smallest, largest) pair "
            f"of integers, 0 or more. Received: {position_offset!r}"
        )
    if not any(layer.is_rotary for layer in layers):
        raise ValueError(
            "`position_offset` shifts rotary positions, which this model's attention does not "
            f"have. Received: {position_offset!r}"
        )
