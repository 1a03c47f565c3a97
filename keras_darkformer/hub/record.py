"""The record of how a dark model was fitted, which is saved and loaded with it."""

import importlib
import importlib.metadata
import json
import platform
from typing import Any

import keras
import keras_hub

from keras_darkformer.surgery.become import Mixin
from keras_darkformer.types import Config

NAME = "linearization"
# Keys of a stage in a record that are not figures.
FACTS = ("name", "seconds", "tokens", "kept")


class Recorded(Mixin):
    """A dark model with a record of how it was fitted."""

    @property
    def linearization(self) -> Config | None:
        """How the model was fitted: a dict that JSON can hold, or `None` if unknown.

        A task and its backbone share it: it can be set on either. As part of the backbone's config
        it is saved and loaded with the model in every format.

        Raises:
            ValueError: if it is set to something that JSON can't hold.
        """
        return vars(getattr(self, "backbone", self)).get(f"_{NAME}")

    @linearization.setter
    def linearization(self, record: Config | None) -> None:
        if record is not None:
            as_json(record)
        vars(getattr(self, "backbone", self))[f"_{NAME}"] = record

    def __setattr__(self, name: str, value: Any) -> None:
        if name == NAME:
            # Bypasses Keras, which on TensorFlow and JAX would wrap the dict and track its
            # contents.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


def as_json(record: Config) -> Config:
    """A record as JSON gives it back: with lists for tuples and Python's numbers for NumPy's."""
    try:
        found = json.loads(json.dumps(record, default=lambda x: x.tolist()))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"`{NAME}` must be a dict that JSON can hold: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"`{NAME}` must be a dict or `None`. Received: {record!r}")
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that a model is fitted or saved with."""
    try:
        own = importlib.metadata.version("keras-darkformer")
    except importlib.metadata.PackageNotFoundError:
        own = "from source"
    backend = keras.backend.backend()
    return {
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "keras_darkformer": own,
        "python": platform.python_version(),
        backend: importlib.import_module(backend).__version__,
    }
