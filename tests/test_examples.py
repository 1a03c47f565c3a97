"""The examples run from beginning to end, in their short form, and become notebooks."""

import ast
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from backends import BACKEND, on_one_backend
from fresh_process import ROOT

sys.path.insert(0, str(ROOT / "docs" / "_tools"))
import notebooks

NAMES = [path.stem for path in notebooks.EXAMPLES]


def only(backend):
    return pytest.mark.skipif(backend != BACKEND, reason="what it calls is tested on all backends")


def source(name):
    return (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")


def code_of_notebook(name):
    found = [x for x in notebooks.notebook(source(name))["cells"] if x["cell_type"] == "code"]
    return "\n\n".join("".join(cell["source"]) for cell in found)


def run_example(name, folder, **environment):
    """What the code cells of its notebook print, run in a folder in their short form."""
    script = folder / f"{name}.py"
    script.write_text(code_of_notebook(name), encoding="utf-8")
    known = {"KERAS_BACKEND": BACKEND, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, script.name],
        cwd=folder,
        env=os.environ | known | {"QUICK": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


# === The form ===


@on_one_backend
@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_the_form_of_those_of_keras_io(name):
    lines = source(name).splitlines()
    assert len(lines) < 150
    quotes = [line for line in lines if line.startswith('"""')]
    assert set(quotes) == {'"""'}  # there its text is parted at such lines, and all else is code
    assert len(quotes) % 2 == 0
    (_, first), (kind, introduction), *_ = notebooks.cells(source(name))
    fields = notebooks.header(first)
    assert fields["Description"].endswith(".")
    assert len(fields["Description"]) <= 100
    assert fields["Accelerator"] in ("None", "GPU", "TPU")
    assert kind == "markdown"
    assert introduction.startswith("## Introduction\n")


@on_one_backend
@pytest.mark.parametrize("name", NAMES)
def test_the_code_of_a_notebook_is_that_of_the_example(name):
    script = ast.parse(source(name))
    is_text = [isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant) for x in script.body]
    script.body = [x for x, text in zip(script.body, is_text, strict=True) if not text]
    assert ast.dump(ast.parse(code_of_notebook(name))) == ast.dump(script)
    texts = [x for x in notebooks.notebook(source(name))["cells"] if x["cell_type"] == "markdown"]
    assert len(texts) == sum(is_text)


@on_one_backend
def test_a_header_without_a_field_is_refused():
    with pytest.raises(ValueError, match="A header has the lines Title, Author"):
        notebooks.notebook('"""\nTitle: None\n"""\nprint(1)\n')


@on_one_backend
def test_the_site_offers_the_notebook_beside_the_script():
    page = SimpleNamespace(file=SimpleNamespace(src_uri=notebooks.PAGE))
    shown = notebooks.on_page_markdown("[A title](examples/one.py) and more", page, None, None)
    assert shown == "[A title](examples/one.py) ([notebook](examples/one.ipynb)) and more"


@on_one_backend
def test_the_page_lists_every_example():
    page = (ROOT / "docs" / notebooks.PAGE).read_text(encoding="utf-8")
    assert sorted(NAMES) == sorted(x for x in NAMES if page.count(f"](../examples/{x}.py)") == 1)


# === They run ===


@pytest.mark.slow
@only("jax")
def test_a_decoder_trains_on_text_and_writes(tmp_path):
    printed = run_example("train_decoder", tmp_path)
    assert "bits per byte" in printed
    assert "\nThe statement " in printed


@pytest.mark.slow
@only("torch")
def test_projections_learn_another_text(tmp_path):
    printed = run_example("finetune_projections", tmp_path)
    assert all(f"\n{name} " in printed for name in ("exact attention", "Performer", "DARKFormer"))


@pytest.mark.slow
@only("torch")
def test_learning_rates_are_compared(tmp_path):
    printed = run_example("learning_rates", tmp_path)
    assert "Performer, rate 0.001: " in printed
    assert (tmp_path / "learning_rates.png").exists()


@pytest.mark.slow
@only("torch")
def test_a_vision_transformer_is_converted_and_timed(tmp_path):
    printed = run_example("vision_transformer", tmp_path)
    for stage in ("exact", "converted", "calibrated", "transferred", "dark, one epoch more"):
        assert f"accuracy on held-out images, {stage}: " in printed
    assert "\n16 x 16: exact " in printed
    assert (tmp_path / "vision_transformer.png").exists()


@pytest.mark.slow
@only("torch")
def test_a_forecast_is_the_same_hour_by_hour(tmp_path):
    printed = run_example("forecasting", tmp_path)
    for name in ("same hour last week", "exact attention", "linear attention"):
        assert f"\n{name} " in printed
    for name in ("day by day", "hour by hour"):
        assert f"\n{name}: differs from the whole by " in printed
    assert "\nstate: 34,848 bytes at any hour" in printed


@pytest.mark.slow
@only("torch")
def test_a_text_is_read_in_pieces_and_read_on_from_a_file(tmp_path):
    printed = run_example("stream_long_text", tmp_path)
    read = [line for line in printed.splitlines() if "bytes of text read" in line]
    assert [line.split()[0] for line in read] == ["256", "512", "768", "1,024"]
    assert len({line[line.index("state") : line.index("keys")] for line in read}) == 1


@pytest.mark.slow
@only("torch")
def test_a_checkpoint_is_made_dark_saved_and_loaded(tmp_path):
    printed = run_example("checkpoint_to_dark", tmp_path, OUTPUT=str(tmp_path / "dark"))
    assert "The preset loads and writes the same." in printed
    assert (tmp_path / "dark" / "config.json").exists()
