"""What the pages show: their code runs, their commands exist, their links lead somewhere."""

import re
import shlex
import sys
import tomllib

import keras
import pages
import pytest
from backends import BACKEND, on_one_backend
from fresh_process import EIGHT_DEVICES, ROOT, run_python

from keras_darkformer.cli.main import main

ELSEWHERE = {"docs/any_model.md": "tests/anymodel/test_docs.py"}  # its code runs there
EIGHT = "docs/distribution.md"  # shows how to use several devices
WITH_CODE = [x for x in pages.PAGES if pages.blocks(x, "python") and x not in ELSEWHERE]
WITH_COMMANDS = [x for x in pages.PAGES if any(pages.commands(x))]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    return pages.StandIns(tmp_path_factory.mktemp("pages"))


@pytest.fixture
def quick(monkeypatch, tmp_path):
    pages.quick(monkeypatch)
    monkeypatch.chdir(tmp_path)
    x = inputs = keras.Input((None, 12))
    x = keras.layers.MultiHeadAttention(2, 8)(x, x)
    x = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(x))
    model = keras.Model(inputs, x)
    model.compile("adam", "mse")
    model.save("vit.keras")
    for name in ("book.txt", "held_out.txt"):
        (tmp_path / name).write_text(" ".join(pages.texts()), encoding="utf-8")
    yield
    keras.distribution.set_distribution(None)


# === Code ===


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Converting")
@pytest.mark.parametrize("page", [x for x in WITH_CODE if x != EIGHT])
def test_the_code_of_a_page_runs(page, stand_ins, quick):
    if not any(block.runs_on(BACKEND) for block in pages.blocks(page, "python")):
        pytest.skip("nothing on it is of this backend alone")
    pages.run(page, stand_ins, BACKEND)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="several devices of a process are JAX's")
def test_the_code_of_the_page_of_several_devices_runs(tmp_path):
    code = """
        import os, pathlib, sys
        sys.path.insert(0, "tests")
        import pages
        os.chdir(sys.argv[1])
        names = pages.run("docs/distribution.md", pages.StandIns(pathlib.Path(".")), "jax")
        print(names["output"].shape)
    """
    assert "(1, 64, 2, 8)" in run_python(code, tmp_path, env=EIGHT_DEVICES)


@on_one_backend
def test_code_that_does_not_run_says_why():
    titles = {b.title for x in pages.PAGES for b in pages.blocks(x, "python")}
    for title in titles - {"", *pages.BACKENDS}:
        assert re.fullmatch(r"Not run: .{10,}", title), title


# === Commands ===


@on_one_backend
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Converting")
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_run_or_name_what_exists(page, stand_ins, quick, capsys):
    for words in pages.commands(page):
        if words[0] == "keras-darkformer":
            words = shlex.split(stand_ins.smaller(shlex.join(words[1:])))
            small = {"generate": ["--max-length", "12"], "linearize": ["--tokens", "96"]}
            length = [] if words[0] == "generate" else ["--length", "24"]
            assert main([*words, *length, *small.get(words[0], [])]) == 0, capsys.readouterr().err
        else:
            assert_known(words)


def assert_known(words):
    """A script that is there and knows its options, an extra of the project, a usual program."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    scripts = [x for x in words if x.endswith((".py", ".sh")) or x == ".ci/run"]
    if words[:2] == ["pip", "install"] and words[2].startswith(".["):
        extras = words[2].strip(".[]").split(",")
        assert set(extras) <= set(project["optional-dependencies"]), words
    elif scripts:
        source = (ROOT / scripts[0]).read_text(encoding="utf-8")
        options = [x for x in words[words.index(scripts[0]) :] if x.startswith("--")]
        common = (ROOT / "benchmarks/common.py").read_text(encoding="utf-8")
        for option in options:
            assert f'"{option}"' in source + common, (words, option)
    else:
        usual = (
            "pip",
            "source",
            "pre-commit",
            "pytest",
            "mkdocs",
            "git",
            "python",
            "keras-darkformer",
        )
        assert words[0] in usual, words


# === Links ===

CODE = re.compile(r"^ *```.*?^ *```|`[^`]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")


def anchors(page):
    """As GitHub and the site make them of headings; of API pages by their objects' names."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(plain.replace(" ", "-"))
    return found


@on_one_backend
@pytest.mark.parametrize("page", pages.PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = CODE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for path, anchor in LINK.findall(text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT)), f"{path}#{anchor}"


# === The site ===


@on_one_backend
def test_the_pictures_are_what_the_script_draws(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--check"])
    monkeypatch.syspath_prepend(ROOT / "docs" / "_tools")
    import pictures

    pictures.main()
    assert {x.stem for x in pictures.PICTURES.glob("*")} == {x.__name__ for x in pictures.DRAWN}


@on_one_backend
def test_every_public_name_is_in_the_reference():
    import keras_darkformer as package

    listed = " ".join(
        (ROOT / x).read_text("utf-8") for x in pages.PAGES if x.startswith("docs/api")
    )
    shown = {x.rsplit(".", 1)[1] for x in re.findall(r"^::: (\S+)", listed, re.MULTILINE)}
    parts = (package, package.ops, package.layers, package.training, package.linearizing)
    public = {name for part in parts for name in part.__all__}
    public |= {x for x in package.hub.__all__ if not x.startswith("Dark")}
    assert public - shown == {"hub", "layers", "ops", "training"}


@on_one_backend
def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
