#!/usr/bin/env bash
# Sets up .venv and runs the tests on TensorFlow, JAX and PyTorch.
#
#   bash tests/run.sh                         # all three backends
#   bash tests/run.sh jax                     # one of them
#   bash tests/run.sh jax -- -m "not slow"    # with arguments for pytest
set -euo pipefail
cd "$(dirname "$0")/.."

backends=()
while [ $# -gt 0 ] && [ "$1" != "--" ]; do
    backends+=("$1")
    shift
done
[ $# -gt 0 ] && shift
[ ${#backends[@]} -gt 0 ] || backends=(tensorflow jax torch)

source tests/environment.sh "$(IFS=,; echo "${backends[*]}"),dev"

export TF_CPP_MIN_LOG_LEVEL=3
# At the same time: each keeps little more than one core busy.
logs="$(mktemp -d)"
# A failing command in here would become the script's own exit status.
tidy() {
    local running
    running="$(jobs -pr)"
    [ -z "$running" ] || kill $running 2>/dev/null || true
    rm -rf "$logs"
}
trap tidy EXIT
pids=()
for backend in "${backends[@]}"; do
    KERAS_BACKEND="$backend" python -m pytest "$@" >"$logs/$backend" 2>&1 &
    pids+=($!)
done
failed=()
for i in "${!backends[@]}"; do
    echo "=== ${backends[$i]}"
    wait "${pids[$i]}" || failed+=("${backends[$i]}")
    cat "$logs/${backends[$i]}"
done
[ ${#failed[@]} -eq 0 ] || {
    echo "Tests failed on: ${failed[*]}" >&2
    exit 1
}
