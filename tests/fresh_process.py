"""Python in an interpreter of its own, as a user's next session would start it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import keras

ROOT = Path(__file__).resolve().parents[1]


def run_python(code, *args):
    """What `code` prints, run from the repository root with this backend.

    `args` are its `sys.argv[1:]`. Fails with what it wrote to stderr.
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"exit status {result.returncode}\n{result.stderr}")
    return result.stdout
