"""Files, of arrays or anything else, that are written as a whole or not at all."""

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from keras_darkformer.types import Config

FACTS = "facts"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing, which replaces the previous one once all of it is on the disk.

    If the process is killed before that, or the disk is full, the previous file stays.

    Raises:
        OSError: if it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], facts: Config) -> None:
    """Writes arrays, and facts that JSON can hold, as a whole.

    Raises:
        OSError: if it can't be written.
    """
    text = np.frombuffer(json.dumps(facts).encode(), "uint8")
    with written_whole(path) as file:
        np.savez(file, **{FACTS: text, **arrays})  # type: ignore[arg-type]


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], Config]:
    """Loads what `save_arrays` wrote: arrays and facts.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with np.load(path) as file:  # compares checksums
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(arrays.pop(FACTS).tobytes())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged and nothing of it is used: {error}. Delete it to continue "
            "without it."
        ) from error
