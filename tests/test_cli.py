"""The command line, with models so small that a conversion takes seconds."""

import importlib.metadata
import json
import os
import signal
import string
import subprocess
import sys
import time

import keras_hub
import numpy as np
import pytest
from backends import BACKEND, on_one_backend, to_numpy
from fresh_process import ROOT
from hub.conftest import sentencepiece_proto, texts  # noqa: F401  fixtures
from hub.models import dark as dark_of
from hub.models import gemma, row
from hub.saved import Saved

from keras_darkformer.cli import arguments
from keras_darkformer.cli.comparison import compare
from keras_darkformer.cli.main import main
from keras_darkformer.linearizing.budget import DEFAULT_TOKENS
from keras_darkformer.options import LINEARIZED, ConversionOptions

pytestmark = on_one_backend
COMMANDS = ("linearize", "report", "generate", "compare")
LENGTH = ["--length", "24"]
QUICK = [*LENGTH, "--tokens", "96", "--num-features", "8", "--sliding-window", "4"]
ENCODER = [*LENGTH, "--tokens", "96", "--num-features", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def saved(folder, sentencepiece_proto):  # noqa: F811
    return Saved(folder, sentencepiece_proto)


@pytest.fixture(scope="module")
def stock(saved):
    return saved.stock("Gemma")[1]


@pytest.fixture(scope="module")
def book(folder, texts):  # noqa: F811
    path = folder / "book.txt"
    path.write_text(" ".join(texts[:12]), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def dark(folder, stock, book):
    """A preset that `linearize` made."""
    output = folder / "dark"
    assert main(["linearize", stock, "--text", book, "--output", str(output), *QUICK]) == 0
    return output


@pytest.fixture(scope="module")
def encoder(folder):
    """A preset of a backbone and a tokenizer, no more."""
    preset, letters = folder / "encoder", string.ascii_lowercase
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    row("Bert", num_layers=2).save_to_preset(preset)
    words = [*special, *letters, *(f"##{letter}" for letter in letters)]
    keras_hub.models.BertTokenizer(vocabulary=words).save_to_preset(preset)
    return str(preset)


def weights_of(preset):
    backbone = keras_hub.models.Backbone.from_preset(str(preset))
    return {weight.path: to_numpy(weight.value) for weight in backbone.weights}


def error_of(capsys, *argv):
    """The one line that a call ends with."""
    try:
        status = main([*map(str, argv)])
    except SystemExit as error:  # of argparse
        status = error.code
    printed = capsys.readouterr()
    assert status == 1
    assert printed.err.endswith("\n")
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


# === Each subcommand ===


def test_linearize_saves_a_model_that_loads_and_writes(dark, stock, book, capsys):
    """The smoke test of all backends."""
    assert {x.name for x in dark.parent.glob("dark*")} == {"dark"}  # its work folder is gone
    record = json.loads((dark / "linearization.json").read_text())
    assert [stage["name"] for stage in record["stages"]][:2] == ["converted", "calibrated"]
    assert record["data"]["description"] == "book.txt"
    assert record["options"] == {"num_features": 8, "sliding_window": 4}
    assert (dark / "linearization.png").stat().st_size > 1000
    assert main(["generate", str(dark), "--prompt", "the", "--max-length", "8"]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_report_tells_both_reports(dark, book, capsys):
    assert main(["report", str(dark), "--text", book, *LENGTH, "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "DarkGemmaCausalLM: 2 of 2 layers converted" in out
    assert "48 queries a head" in out


def test_generate_repeats_itself_with_a_seed_for_stock_and_dark(stock, dark, capsys):
    def written(preset, seed):
        given = ["--prompt", "the", "--max-length", "10", "--sampler", "random", "--seed", seed]
        assert main(["generate", str(preset), *given]) == 0
        return capsys.readouterr().out

    for preset in (stock, dark):
        assert written(preset, "1") == written(preset, "1") != written(preset, "2")


def test_compare_measures_both(stock, dark, book, folder, capsys):
    path = folder / "compared.json"
    given = ["--text", book, *LENGTH, "--write", "4", "--json", str(path)]
    assert main(["compare", stock, str(dark), *given]) == 0
    out = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert f"{found['dark']['text']:.3f}" in out
    assert found["exact"]["divergence"] == pytest.approx(0.0, abs=1e-5)
    assert found["dark"]["divergence"] > 1e-3
    record = json.loads((dark / "linearization.json").read_text())
    # Another text than the held-out tenth, and the same model: near each other.
    assert found["exact"]["text"] == pytest.approx(record["exact"]["text"], rel=0.3)
    # 2 layers, keys and values, 2 heads of 8 in float32.
    assert found["exact"]["bytes"] == 2 * 2 * 2 * 8 * 4 * (24 + 4)
    for model in ("exact", "dark"):
        assert found[model]["reading"] > 0
        assert found[model]["writing"] > 0


@pytest.mark.parametrize("build", [lambda: gemma(vocabulary_size=32), lambda: row("Llama")])
def test_models_that_are_not_of_one_another_are_not_compared(build):
    with pytest.raises(ValueError, match="does not come from a"):
        compare(build(), dark_of(gemma()), None, 24, 4)


def test_the_state_does_not_grow_and_the_cache_does(dark):
    model = keras_hub.models.CausalLM.from_preset(str(dark))
    assert model.cache_bytes(100) == model.cache_bytes(1000)
    assert model.cache_bytes(1000, exact=True) == 10 * model.cache_bytes(100, exact=True)


def test_encoders_are_linearized_and_reported_on(encoder, book, folder, capsys):
    output = folder / "dark_encoder"
    assert main(["linearize", encoder, "--text", book, "--output", str(output), *ENCODER]) == 0
    assert "cosine" in capsys.readouterr().out
    model = keras_hub.models.TextClassifier.from_preset(str(output), num_classes=2)
    assert type(model.backbone).__name__ == "DarkBertBackbone"
    assert model.preprocessor.sequence_length == 24
    assert main(["report", str(output), "--text", book, *LENGTH, "--rows", "1"]) == 0
    assert "24 queries a head" in capsys.readouterr().out  # rows are full but for a word
    assert "writes no text" in error_of(capsys, "generate", output, "--prompt", "the")
    told = error_of(capsys, "compare", encoder, output, "--text", book, *LENGTH)
    assert "no causal LM" in told


def test_an_encoders_task_keeps_its_head(encoder, book, folder):
    classifier = keras_hub.models.TextClassifier.from_preset(encoder, num_classes=3)
    preset, output = str(folder / "classifier"), str(folder / "dark_classifier")
    classifier.save_to_preset(preset)
    assert main(["linearize", preset, "--text", book, "--output", output, *ENCODER]) == 0
    loaded = keras_hub.models.TextClassifier.from_preset(output)
    head, was = loaded.get_layer("logits").kernel, classifier.get_layer("logits").kernel
    np.testing.assert_array_equal(head.numpy(), was.numpy())


# === Errors ===


def test_errors_are_one_line(stock, dark, book, folder, tmp_path, capsys, monkeypatch):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    latin.write_bytes(b"\xe9t\xe9")
    new = tmp_path / "new"
    linearize = ("linearize", stock, "--output", new, "--text")
    calls = {
        "No such file": [*linearize, tmp_path / "missing.txt"],
        "has no text": [*linearize, empty],
        "not UTF-8": [*linearize, latin],
        "at least `length=800` tokens": [*linearize, book, "--length", "800"],
        "at least two rows": [*linearize, book, "--length", "400"],
        "can't be loaded: Unknown preset": ["generate", "no_such_model", "--prompt", "a"],
        "has no config.json": ["generate", tmp_path, "--prompt", "a"],
        "is dark already": ["linearize", dark, "--output", new, "--text", book],
        "is not dark": ["report", stock, "--text", book],
        "is there already": ["linearize", stock, "--output", dark, "--text", book],
        "1 or more. Received: 0": [*linearize, book, "--tokens", "0"],
        "0 or more. Received: -1": [*linearize, book, "--keep-exact=-1"],
        "positive number. Received: soon": [*linearize, book, "--minutes", "soon"],
        "not allowed with": [*linearize, book, "--minutes", "1", "--tokens", "5"],
        "`num_features` must be": [*linearize, book, "--num-features", "many"],
        "`keep_exact` chooses": [*linearize, book, *LENGTH, "--keep-exact", "1", "--layers", "0"],
        "invalid choice": ["generate", stock, "--prompt", "a", "--sampler", "best"],
        "COMMAND": [],
        "--text": ["report", dark],
    }
    for message, argv in calls.items():
        assert message in error_of(capsys, *argv), message
    assert not new.exists()


def test_a_model_that_cannot_be_converted_is_refused_before_its_weights_are_loaded(
    tmp_path, book, capsys
):
    backbone = keras_hub.models.AlbertBackbone(
        vocabulary_size=9,
        num_layers=1,
        num_heads=1,
        embedding_dim=4,
        hidden_dim=4,
        intermediate_dim=4,
    )
    backbone.save_to_preset(tmp_path / "albert")
    (tmp_path / "albert" / "model.weights.h5").unlink()
    argv = ["linearize", tmp_path / "albert", "--text", book, "--output", tmp_path / "new"]
    assert "can't be converted" in error_of(capsys, *argv)


def test_folders_of_others_are_left_alone(stock, book, tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    (work / "poem.txt").write_text("mine")
    argv = ["linearize", stock, "--text", book, "--output", tmp_path / "new", "--work-dir", work]
    assert "holds something other" in error_of(capsys, *argv)
    assert [x.name for x in tmp_path.rglob("*")] == ["work", "poem.txt"]


def test_a_work_folder_of_another_run_is_refused_and_one_that_was_named_stays(
    stock, book, tmp_path, capsys
):
    def argv(output, features):
        given = ["--text", book, "--work-dir", tmp_path / "work", *LENGTH, "--tokens", "24"]
        return [
            "linearize",
            stock,
            "--output",
            tmp_path / output,
            *given,
            "--num-features",
            features,
        ]

    assert main([*map(str, argv("one", 8))]) == 0
    assert (tmp_path / "work" / "run.json").exists()
    assert "holds another run. options" in error_of(capsys, *argv("two", 4))
    model = keras_hub.models.CausalLM.from_preset(stock)
    model.backbone.layer_norm.scale.assign(model.backbone.layer_norm.scale + 1.0)
    stock = str(tmp_path / "other")
    model.save_to_preset(stock)
    assert "holds another run. weights" in error_of(capsys, *argv("two", 8))


def test_debug_shows_where_an_error_came_from(stock, tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["report", stock, "--text", str(tmp_path / "missing.txt"), "--debug"])


# === Help, and how options are spelled ===


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_sentence_for_each_option_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"example: keras-darkformer {command} " in out
    if command == "linearize":
        assert f"{DEFAULT_TOKENS:,}" in out
        assert all(f"{name.replace('_', '-')} {x}" in out for name, x in LINEARIZED.items())


def test_options_are_explained_by_their_class():
    found = arguments.meanings(ConversionOptions)
    assert set(found) == set(ConversionOptions.names())
    assert set(arguments.OPTIONS) <= set(found)
    assert found["num_features"] == "Features m per key/value head"
    assert found["geometry_scale"].startswith("Each geometry starts")  # not of the class above
    assert found["seed"] == "Seed of the projections; every layer has one of its own"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0,4", [0, 4]),
        ("3,", [3]),
        ("none", "none"),
        ("dark,none", ["dark", "none"]),
        ("0.5", 0.5),
        ("False", False),
        ("a b", "a b"),
    ],
)
def test_values_are_read(text, value):
    assert arguments.value(text) == value


# === In a process of its own ===


def python(*argv, env=None):
    env = os.environ | {"KERAS_BACKEND": BACKEND} | (env or {})
    return subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_help_reads_well_as_a_module_and_as_a_script(tmp_path):
    done = python("-m", "keras_darkformer", "--help")
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)
    # As the script that pip writes.
    (entry,) = importlib.metadata.EntryPoints(
        importlib.metadata.EntryPoint(name, value, "console_scripts")
        for name, value in scripts().items()
    )
    script = tmp_path / entry.name
    script.write_text(
        f"import sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
    )
    done = python(script, "linearize", "--help")
    assert done.returncode == 0, done.stderr
    assert "--keep-exact" in done.stdout


def scripts():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["scripts"]


def kill_when(path, argv):
    """Starts the command, and kills it as soon as a file is there."""
    env = os.environ | {"KERAS_BACKEND": BACKEND, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "keras_darkformer", *argv]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    while not path.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_what_it_would_have_come_to(stock, book, tmp_path):
    def argv(output):
        given = ["--length", "24", "--tokens", "1200", "--num-features", "8"]
        return ["linearize", stock, "--text", book, "--output", str(tmp_path / output), *given]

    assert main(argv("whole")) == 0
    work = tmp_path / "killed.work"
    # Before the stage has learned anything, when earlier ones are needed, and in the midst of it.
    for begun in ("targets-0.npz", "distil.backup.npz"):
        kill_when(work / begun, argv("killed"))
        assert not (tmp_path / "killed").exists()
        stages = json.loads((work / "run.json").read_text())["stages"]
        assert [stage["name"] for stage in stages] == ["converted", "calibrated", "transferred"]
    assert main(argv("killed")) == 0
    whole, killed = (weights_of(tmp_path / name) for name in ("whole", "killed"))
    records = [
        json.loads((tmp_path / name / "linearization.json").read_text())["stages"]
        for name in ("whole", "killed")
    ]
    for one, other in zip(*records, strict=True):
        assert other == pytest.approx(one | {"seconds": other["seconds"]}, abs=1e-5)
    for name, weight in whole.items():
        np.testing.assert_allclose(killed[name], weight, atol=1e-6, err_msg=name)
