# Source me: `source tests/environment.sh EXTRA,EXTRA` makes and enters .venv
# with keras-darkformer and these extras installed. PYTHON names the
# interpreter to start from, TORCH the build of PyTorch to take.
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; set PYTHON to one." >&2
        exit 1
    }
    echo "Setting up .venv"
    "${PYTHON:-python3}" -m venv .venv
fi
source .venv/bin/activate
case ",$1," in
    *,torch,*) python -c "import torch" 2>/dev/null || pip install --quiet "${TORCH:-torch==2.13.0}" ;;
esac
pip install --quiet --editable ".[$1]"
