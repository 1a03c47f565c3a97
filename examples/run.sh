#!/usr/bin/env bash
# Sets up .venv and runs examples/checkpoint_to_dark.py.
#
#   bash examples/run.sh
#   KERAS_BACKEND=jax CHECKPOINT=gemma_2b_en TEXT_FILE=book.txt bash examples/run.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export KERAS_BACKEND="${KERAS_BACKEND:-torch}" TF_CPP_MIN_LOG_LEVEL=3
source tests/environment.sh "$KERAS_BACKEND,examples"
python examples/checkpoint_to_dark.py
