import ast
import tomllib
from pathlib import Path

import keras
import pytest
from fresh_process import ROOT, run_python

import keras_darkformer
from keras_darkformer import layers

PACKAGE = Path(keras_darkformer.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PARTS = ("ops", "layers", "hub", "training")  # data flows this way


def imports(path):
    """Full names of everything a file imports, wherever it does so."""
    package = ("keras_darkformer", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_parts(path):
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == "keras_darkformer" and name[1] in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_parts_import_what_comes_before_them_only(part):
    later = set(PARTS[PARTS.index(part) + 1 :])
    assert {
        str(path): sorted(imported_parts(path) & later)
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] == part and imported_parts(path) & later
    } == {}


def test_parts_do_not_import_the_package_as_a_whole():
    """Which would get around the order above."""
    for path in FILES:
        if path.parent != PACKAGE:
            whole = {"keras_darkformer"} | {
                f"keras_darkformer.{name}" for name in keras_darkformer.__all__ if name[0].isupper()
            }
            assert not whole & set(imports(path)), path


def test_keras_hub_is_imported_by_hub_and_training_only():
    importers = {
        path.relative_to(PACKAGE).parts[0]
        for path in FILES
        if any(name.split(".")[0] == "keras_hub" for name in imports(path))
    }
    assert importers <= {"hub", "training"}


@pytest.mark.slow
def test_the_package_works_without_keras_hub():
    code = """
        import sys

        import keras_darkformer

        assert "keras_hub" not in sys.modules
        sys.modules["keras_hub"] = None  # as if it were not installed
        assert keras_darkformer.DarkTransformerBlock(8, 2)
        try:
            keras_darkformer.hub
        except ImportError:
            print("no hub")
    """
    assert run_python(code).split() == ["no", "hub"]


def test_every_name_the_package_lists_exists():
    for name in keras_darkformer.__all__:
        assert getattr(keras_darkformer, name) is not None
    for part in (getattr(keras_darkformer, name) for name in PARTS):
        assert sorted(set(part.__all__)) == sorted(part.__all__)
        assert all(hasattr(part, name) for name in part.__all__)


def test_what_trains_and_judges_is_a_name_of_the_package_itself():
    parts = set(keras_darkformer.training.__all__) - {"ApproximationReport", "DistillationLoss"}
    assert parts <= set(keras_darkformer.__all__)
    for name in parts:
        assert getattr(keras_darkformer, name) is getattr(keras_darkformer.training, name)


def test_a_name_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'DarkMatter'"):
        keras_darkformer.DarkMatter  # noqa: B018


@pytest.mark.parametrize("name", layers.__all__)
def test_layers_are_registered_under_the_name_of_the_package(name):
    layer = getattr(layers, name)
    assert keras.saving.get_registered_name(layer) == f"keras_darkformer>{name}"
    assert keras.saving.get_registered_object(f"keras_darkformer>{name}") is layer


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert keras_darkformer.__version__ == project["version"]
