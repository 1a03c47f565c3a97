"""The examples run from beginning to end, with as few steps as they can."""

import json
import os
import subprocess
import sys

import keras
import pytest
from fresh_process import ROOT

pytestmark = pytest.mark.slow


def run_example(name, *args):
    result = subprocess.run(
        [sys.executable, f"examples/{name}", *map(str, args)],
        cwd=ROOT,
        env=os.environ
        | {
            "KERAS_BACKEND": keras.backend.backend(),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_a_decoder_trains_on_text_and_writes():
    printed = run_example("train_decoder.py", "--steps", 2, "--length", 64)
    assert "bits per byte" in printed
    assert "The statement " in printed


def test_a_gemma_is_converted_finetuned_saved_and_loaded(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} says {i * 7 % 13} times nothing." for i in range(9000)))
    printed = run_example(
        *("gemma_to_dark.py", "--text", text, "--output", tmp_path / "results"),
        *("--train-steps", 3, "--transfer-steps", 2, "--finetune-steps", 2),
        *("--sequence-length", 32),
        *("--generate-length", 24, "--prompt", "Line 5", "--test-windows", 8),
    )
    assert "A fresh process loaded a DarkGemmaCausalLM and wrote the same text." in printed
    table = json.loads((tmp_path / "results" / "table.json").read_text())
    assert [row["arm"] for row in table["rows"]] == ["exact", "dark", "paper", "performer"]
    assert (tmp_path / "results" / "plot.png").stat().st_size > 10_000
