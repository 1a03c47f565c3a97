"""Python in an interpreter of its own, as a user's next session would start it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import keras

ROOT = Path(__file__).resolve().parents[1]


_OF_TESTS = os.environ.get("XLA_FLAGS", "")
EIGHT_DEVICES = {"XLA_FLAGS": f"{_OF_TESTS} --xla_force_host_platform_device_count=8"}


def run_python(code, *args, env=None):
    """What `code` prints, run from the repository root with this backend.

    `args` are its `sys.argv[1:]`, `env` is added to the environment: of
    `EIGHT_DEVICES` JAX makes eight of the CPU. Fails with what it wrote to
    stderr.
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"KERAS_BACKEND": keras.backend.backend()} | (env or {}),
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"exit status {result.returncode}\n{result.stderr}")
    return result.stdout
