"""Prints the lowest version of everything that the project names, as constraints for pip.

python tests/lowest.py > lowest.txt && pip install --constraint lowest.txt ".[jax]"
"""

import itertools
import re
import tomllib
from pathlib import Path

BOUND = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)")


def main():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    named = [*project["dependencies"], *extras]
    for line in sorted({f"{m[1]}=={m[2]}" for m in map(BOUND.match, named) if m}):
        print(line)


if __name__ == "__main__":
    main()
