"""Records what a pipeline has done so far, in a folder or in memory."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_darkformer.training.distil import TeacherTargets
from keras_darkformer.training.loop import value_of
from keras_darkformer.training.saved_arrays import load_arrays, save_arrays, written_whole
from keras_darkformer.types import Config

RUN = "run.json"


class Notebook:
    """Facts and weights of the finished stages.

    Args:
        folder: where they are written, or `None` to keep facts in memory only.
        plan: facts that identify the run.

    Attributes:
        facts: a dict of what was found so far. Call `write` after each change.

    Raises:
        ValueError: if the folder holds another run, or a damaged one.
    """

    def __init__(self, folder: str | Path | None, plan: Config) -> None:
        self.folder = None if folder is None else Path(folder)
        self.facts: Config = {"plan": plan, "stages": []}
        if self.folder is None or not (self.folder / RUN).exists():
            return
        try:
            self.facts = json.loads((self.folder / RUN).read_text())
            before = self.facts["plan"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(self.folder / RUN)!r} is damaged: {error}") from error
        plan = json.loads(json.dumps(plan))
        if before != plan:
            names = [name for name in plan if before.get(name) != plan[name]]
            told = "; ".join(f"{x}: {before.get(x)!r} there, {plan[x]!r} here" for x in names)
            raise ValueError(f"`work_dir` {str(self.folder)!r} holds another run. {told}")

    def write(self) -> None:
        """Writes the facts."""
        if self.folder is not None:
            with written_whole(self.folder / RUN) as file:
                file.write(json.dumps(self.facts, indent=1).encode())

    def path(self, name: str) -> Path | None:
        """The path of a file in the folder; `None` without a folder."""
        return None if self.folder is None else self.folder / name

    def save(self, name: str, variables: list[Any]) -> None:
        """Writes the values of variables."""
        if (path := self.path(f"{name}.npz")) is not None:
            save_arrays(path, {str(i): x for i, x in enumerate(values_of(variables))}, {})

    def load(self, name: str, variables: list[Any]) -> None:
        """Restores the values of variables.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.path(f"{name}.npz")
        assert path is not None
        arrays, _ = load_arrays(path)
        for index, variable in enumerate(variables):
            variable.assign(arrays[str(index)])

    def targets(self, name: str, note: Callable[[], list[TeacherTargets]]) -> list[TeacherTargets]:
        """A teacher's targets, from the file if there is one; otherwise `note` gives them to write.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.path(f"{name}.npz")
        if path is not None and path.exists():
            arrays, facts = load_arrays(path)
            return [
                TeacherTargets(arrays[f"token_ids_{i}"], arrays[f"log_probs_{i}"])
                for i in range(facts["batches"])
            ]
        found = note()
        if path is not None:
            named = {f"{k}_{i}": x for i, y in enumerate(found) for k, x in y._asdict().items()}
            save_arrays(path, named, {"batches": len(found)})
        return found

    def drop(self, pattern: str) -> None:
        """Deletes files that are no longer needed, by a pattern of their names."""
        for path in self.folder.glob(pattern) if self.folder is not None else ():
            path.unlink()


def values_of(variables: list[Any]) -> list[np.ndarray]:
    """Copies of values, in dtypes that are NumPy's own."""
    return [value_of(v) for v in variables]


def fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """A short hash of what is in arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()[:16]
