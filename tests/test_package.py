import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import keras
import pytest
from backends import on_one_backend
from fresh_process import ROOT

import keras_darkformer
from keras_darkformer import layers
from keras_darkformer.options import AttentionOptions, ConversionOptions

PACKAGE = Path(keras_darkformer.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PARTS = ("ops", "layers", "hub", "training")  # that list their names

# What each part may import of the package besides itself, directly.
BASE = {"types", "checks", "memory", "options"}
MAY_IMPORT = {
    "types": set(),
    "checks": {"types"},
    "memory": {"checks"},
    "options": {"types", "checks", "memory"},
    "compiling": {"types", "ops"},
    "printed": set(),
    "progress": {"types"},
    "ops": BASE,
    "fitting": BASE | {"ops"},
    "layers": BASE | {"ops", "fitting"},
    "training": BASE | {"ops", "fitting", "layers", "compiling", "printed", "progress"},
    "surgery": BASE | {"layers", "printed"},
    "anymodel": BASE | {"ops", "layers", "compiling", "surgery"},
    "hub": BASE | {"ops", "fitting", "layers", "compiling", "printed", "surgery", "anymodel"},
    "conversion": BASE | {"surgery", "anymodel", "hub"},
    "choosing": BASE | {"ops", "layers", "training", "hub", "printed", "progress"},
    "linearizing": BASE | {"layers", "training", "hub", "printed", "progress", "choosing"},
    "cli": BASE | {"training", "hub", "printed", "linearizing"},
    "__main__": {"cli"},
}
# Names that belong to a design that is gone.
GONE = r"""
    \bforms?\s*[!=]=|\.form\b|feature_forms?|set_form|rope_geometry\s*[!=]=
    |window_only|\bbudget\s*=\s*"|_lazy_hub
"""


def part_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source, package=("keras_darkformer",)):
    """Full names of everything a file of the package imports, wherever it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from (x.value for x in node.args if isinstance(x, ast.Constant))


@functools.cache
def imports_of(path):
    package = ("keras_darkformer", *path.relative_to(PACKAGE).parent.parts)
    return set(imports(path.read_text(encoding="utf-8"), package))


def imported_parts(path):
    names = (name.split(".") for name in imports_of(path))
    return {name[1] for name in names if name[0] == "keras_darkformer" and len(name) > 1}


def test_imports_are_found_wherever_they_are():
    source = """
        if True:
            import one.two
        def f():
            from three import four, five as six
            class C:
                from . import seven
                from ..eight import nine
        importlib.import_module("ten")
        __import__("eleven")
    """
    source = "\n".join(line[8:] for line in source.splitlines())
    assert sorted(imports(source, ("k", "layers"))) == sorted(
        ["one.two", "three.four", "three.five", "k.layers.seven", "k.eight.nine", "ten", "eleven"]
    )


def test_every_module_imports_what_comes_before_it_only():
    assert {part_of(path) for path in FILES} == {*MAY_IMPORT, "__init__"}
    wrong = {}
    for path in FILES:
        part = part_of(path)
        if part != "__init__":
            found = imported_parts(path) - {part} - MAY_IMPORT[part]
            wrong |= {str(path.relative_to(PACKAGE)): sorted(found)} if found else {}
    assert wrong == {}
    # The order has no cycles, and gives what is asked of it.
    assert all(later not in MAY_IMPORT[part] for later in MAY_IMPORT for part in MAY_IMPORT[later])


def test_fitting_knows_numpy_and_no_keras():
    for path in FILES:
        if part_of(path) == "fitting":
            roots = {name.split(".")[0] for name in imports_of(path)}
            assert roots - sys.stdlib_module_names <= {"numpy", "keras_darkformer"}, path


def test_parts_do_not_import_the_package_as_a_whole():
    """Which would get around the order above."""
    for path in FILES:
        if path.parent != PACKAGE:
            whole = {"keras_darkformer"} | {
                f"keras_darkformer.{name}" for name in keras_darkformer.__all__ if name[0].isupper()
            }
            assert not whole & imports_of(path), path


def test_keras_hub_is_imported_by_the_hub_only_and_its_insides_by_one_module():
    files = {path.relative_to(PACKAGE).as_posix(): path for path in FILES}
    importers = {
        part_of(path)
        for path in FILES
        if any(name.split(".")[0] == "keras_hub" for name in imports_of(path))
    }
    assert importers == {"hub"}
    inside = [name for name, path in files.items() if "keras_hub.src" in path.read_text("utf-8")]
    assert inside == ["hub/private.py"]


def test_nothing_speaks_of_what_is_gone():
    gone = re.compile(GONE, re.VERBOSE)
    found = {
        f"{path.relative_to(PACKAGE)}:{number}": line.strip()
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if gone.search(line)
    }
    assert found == {}
    for line in ("if self.form == 'x':", "form != y", "x.window_only", "a.rope_geometry == b"):
        assert gone.search(line)
    assert not gone.search("one chunked and one recurrent form; the forms of performers")


def declarations(source):
    """Names that classes declare: fields, constructor arguments, own attributes, config keys."""
    for cls in (x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.ClassDef)):
        for node in cls.body:
            if isinstance(node, ast.AnnAssign):
                yield node.target.id
            if not isinstance(node, ast.FunctionDef):
                continue
            if node.name == "__init__":
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                yield from (argument.arg for argument in arguments)
            for inner in ast.walk(node):
                targets = inner.targets if isinstance(inner, ast.Assign) else []
                yield from (ast.unparse(x)[5:] for x in targets if ast.unparse(x)[:5] == "self.")
                if isinstance(inner, ast.Dict) and node.name == "get_config":
                    yield from (x.value for x in inner.keys if isinstance(x, ast.Constant))


def test_options_are_declared_in_one_place():
    """Once, and again where a conversion takes more of one: no layer repeats them."""
    options = set(AttentionOptions.names())
    narrowed = options & set(ConversionOptions.__annotations__)
    source = (PACKAGE / "options.py").read_text(encoding="utf-8")
    assert sorted(x for x in declarations(source) if x in options) == sorted([*options, *narrowed])
    options -= {"feature_map"}  # the layer's map itself goes by this name
    for path in FILES:
        if part_of(path) in ("layers", "hub"):
            found = options & set(declarations(path.read_text(encoding="utf-8")))
            assert not found, path
    source = """if True:
    class Layer:
        rank: int
        def __init__(self, seed, *, remat): self.chunk_size = 3
        def get_config(self): return {**x, "projection": 3}
    """
    found = {"rank", "seed", "remat", "chunk_size", "projection"}
    assert options & set(declarations(source)) == found


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


@pytest.mark.parametrize("name", sorted({*layers.__all__} - {"FeatureMap"}))  # a base class
def test_layers_are_registered_under_the_name_of_the_package(name):
    layer = getattr(layers, name)
    assert keras.saving.get_registered_name(layer) == f"keras_darkformer>{name}"
    assert keras.saving.get_registered_object(f"keras_darkformer>{name}") is layer


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


@on_one_backend
def test_the_version_stands_in_one_place():
    """Of the project's own files; the build reads it there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "keras_darkformer/__init__.py"
    version = re.escape(keras_darkformer.__version__)
    says = re.compile(rf"version\w*\W+{version}\b", re.IGNORECASE)
    files = [*ROOT.glob("*.*"), *FILES]
    assert [x.name for x in files if x.is_file() and says.search(x.read_text("utf-8"))] == [
        "__init__.py"
    ]


@on_one_backend
def test_what_is_imported_is_declared():
    """KerasHub's own and what is asked for before it is imported are extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w-]+", x)[0].replace("-", "_") for x in project["dependencies"]}
    roots = {x.split(".")[0].replace("-", "_") for path in FILES for x in imports_of(path)}
    others = roots - sys.stdlib_module_names - {"keras_darkformer"}
    optional = {"keras_hub", "huggingface_hub", "matplotlib", "tensorboard", "sentencepiece"}
    backends = {"jax", "tensorflow", "torch"}
    assert others - optional - backends == declared
