#!/usr/bin/env bash
# Sets up .venv and runs examples/gemma_to_dark.py; arguments go to it.
#
#   bash examples/run.sh
#   KERAS_BACKEND=jax bash examples/run.sh --text book.txt
set -euo pipefail
cd "$(dirname "$0")/.."
export KERAS_BACKEND="${KERAS_BACKEND:-tensorflow}" TF_CPP_MIN_LOG_LEVEL=3
source tests/environment.sh "$KERAS_BACKEND,examples"
python examples/gemma_to_dark.py "$@"
