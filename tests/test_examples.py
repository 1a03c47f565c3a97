"""The examples run from beginning to end, with as few steps as they can."""

import os
import subprocess
import sys

import pytest
from backends import BACKEND
from fresh_process import ROOT

pytestmark = pytest.mark.slow


def only(backend):
    return pytest.mark.skipif(backend != BACKEND, reason="what it calls is tested on all backends")


def run_example(name, *args):
    result = subprocess.run(
        [sys.executable, f"examples/{name}", *map(str, args)],
        cwd=ROOT,
        env=os.environ
        | {
            "KERAS_BACKEND": BACKEND,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@only("jax")
def test_a_decoder_trains_on_text_and_writes():
    options = ("--steps", 2, "--length", 16, "--generate-length", 16)
    printed = run_example("train_decoder.py", *options)
    assert "bits per byte" in printed
    assert "The statement " in printed


@only("torch")
def test_projections_learn_another_text(tmp_path):
    printed = run_example(
        *("finetune_projections.py", "--model", tmp_path / "exact.keras", "--train-steps", 2),
        *("--steps", 2, "--rates", 1e-3, "--sequence-length", 32, "--num-features", 16),
    )
    assert all(f"\n{name} " in printed for name in ("exact attention", "Performer", "DARKFormer"))


@only("torch")
def test_learning_rates_are_compared(tmp_path):
    figure = tmp_path / "rates.png"
    options = ("--steps", 3, "--length", 16, "--rates", 1e-3, "--output", figure)
    printed = run_example("learning_rates.py", *options)
    assert "Performer, rate 0.001: " in printed
    assert figure.exists()


@only("torch")
def test_a_vision_transformer_is_converted_and_timed(tmp_path):
    figure = tmp_path / "vision.png"
    printed = run_example(
        *("vision_transformer.py", "--size", 16, "--images", 32, "--epochs", 1),
        *("--timed-sizes", 16, "--output", figure),
    )
    for stage in ("exact", "converted", "calibrated", "transferred", "dark, one epoch more"):
        assert f"accuracy on held-out images, {stage}: " in printed
    for what in ("forward", "training step"):
        assert f"64 tokens, {what} of a batch of 8: exact " in printed
    assert figure.exists()


@only("torch")
def test_a_forecast_is_the_same_hour_by_hour():
    printed = run_example("forecasting.py", "--epochs", 1, "--series", 16, "--weeks", 1)
    for name in ("the same hour last week", "exact attention", "linear attention"):
        assert f"\n{name} " in printed
    for name in ("day by day", "hour by hour"):
        assert f"\n{name}: differs from the whole by " in printed
    assert "\nstate: 34,848 bytes at any hour" in printed


@only("tensorflow")
def test_a_gemma_is_converted_finetuned_saved_and_loaded(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} says {i * 7 % 13} times nothing." for i in range(3000)))
    printed = run_example(
        *("gemma_to_dark.py", "--text", text, "--output", tmp_path / "dark"),
        *("--train-steps", 2, "--transfer-steps", 2, "--steps", 2),
        *("--num-layers", 1, "--sequence-length", 16, "--num-features", 16),
        *("--generate-length", 16, "--prompt", "Line 5"),
    )
    for stage in ("exact", "converted", "calibrated", "transferred", "distilled", "finetuned"):
        assert f"perplexity of held-out text, {stage}: " in printed
    assert "A fresh process loaded a DarkGemmaCausalLM" in printed
    assert (tmp_path / "dark" / "config.json").exists()
