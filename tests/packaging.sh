#!/usr/bin/env bash
# Builds the wheel by way of the sdist, checks both, and tries the wheel in a clean environment.
#
#   bash tests/packaging.sh                 # with JAX, all in the newest versions
#   bash tests/packaging.sh lowest torch    # in the lowest that pyproject.toml allows
#   PYTHON=python3.13 bash tests/packaging.sh
#
# KEEP=1 leaves the files in dist/. IMPORT_ONLY=1 installs and imports the wheel, and runs no tests.
set -euo pipefail
cd "$(dirname "$0")/.."
versions="${1:-newest}" backend="${2:-jax}" python="${PYTHON:-python3}"
root="$PWD" place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT

"$python" -m venv "$place/build"
"$place/build/bin/pip" install --quiet build twine "mypy>=1.14"
"$place/build/bin/python" -m build --outdir "$place/dist" . >"$place/log" 2>&1 || {
    cat "$place/log"
    exit 1
}
"$place/build/bin/twine" check --strict "$place"/dist/*
[ -z "${KEEP:-}" ] || { mkdir -p dist && cp "$place"/dist/* dist/; }

"$python" -m venv "$place/clean"
constraints=()
if [ "$versions" = lowest ]; then
    "$python" tests/lowest.py >"$place/lowest.txt"
    constraints=(--constraint "$place/lowest.txt")
fi
wheel="$(echo "$place"/dist/*.whl)"
if [ "$backend" = torch ]; then
    "$place/clean/bin/pip" install --quiet "${constraints[@]}" "${TORCH:-torch}"
fi
"$place/clean/bin/pip" install --quiet "${constraints[@]}" "$wheel[$backend]"
[ -n "${IMPORT_ONLY:-}" ] || "$place/clean/bin/pip" install --quiet "${constraints[@]}" pytest hypothesis
"$place/clean/bin/pip" check

# From elsewhere, so that it is the installed package that is found.
cd "$place"
export KERAS_BACKEND="$backend" TF_CPP_MIN_LOG_LEVEL=3
clean="$place/clean/bin/python"
"$clean" - "$backend" <<'CODE'
import importlib.metadata, importlib.util, sys
import keras, keras_darkformer
assert "site-packages" in keras_darkformer.__file__, keras_darkformer.__file__
assert keras_darkformer.__version__ == importlib.metadata.version("keras-darkformer")
others = {"tensorflow", "jax", "torch"} - {sys.argv[1]}
found = [name for name in others if importlib.util.find_spec(name)]
assert not found, f"{sys.argv[1]} brought {found}"
for name in ("keras", "numpy", "h5py", "rich", "threadpoolctl", sys.argv[1]):
    print(name, importlib.metadata.version(name))
CODE
"$place/clean/bin/keras-darkformer" --help >"$place/log"
"$place/build/bin/mypy" --strict --python-executable "$clean" --cache-dir "$place/mypy" "$root/tests/consumer.py"
[ -z "${IMPORT_ONLY:-}" ] || exit 0
tests="$root/tests"
"$clean" -m pytest -p no:cacheprovider --rootdir "$root" --config-file "$root/pyproject.toml" \
    -m "not slow" --durations=3 "$tests"/ops/test_{reference,dark_attention}.py \
    "$tests"/layers/test_{dark_attention,calibrate}.py "$tests/anymodel/test_conversion.py" \
    --deselect "$tests/anymodel/test_conversion.py::test_a_model_that_was_compiled_is_compiled_again"
