#!/usr/bin/env bash
# Sets up .venv, runs the benchmarks, fills the tables of the pages with what they found.
#
#   bash benchmarks/run.sh          # TensorFlow, JAX and PyTorch, one after another
#   bash benchmarks/run.sh torch    # one of them; the pages keep the others' results
set -euo pipefail
cd "$(dirname "$0")/.."

backends=("$@")
[ ${#backends[@]} -gt 0 ] || backends=(tensorflow jax torch)

# All three, since KerasHub needs TensorFlow and the peers need PyTorch.
source tests/environment.sh tensorflow,jax,torch,benchmarks

export TF_CPP_MIN_LOG_LEVEL=3
failed=()
for backend in "${backends[@]}"; do
    for benchmark in attention decode model; do
        echo "=== $benchmark, $backend"
        KERAS_BACKEND="$backend" python "benchmarks/$benchmark.py" || failed+=("$benchmark/$backend")
    done
done
python benchmarks/plots.py
python benchmarks/tables.py
[ ${#failed[@]} -eq 0 ] || {
    echo "Failed: ${failed[*]}; the pages show these as they were before." >&2
    exit 1
}
