"""The examples in docstrings run and print what they say."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import on_one_backend

import keras_darkformer

PACKAGE = Path(keras_darkformer.__file__).parent
MODULES = sorted(
    ".".join(["keras_darkformer", *path.relative_to(PACKAGE).with_suffix("").parts])
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


class AnyBackend(doctest.OutputChecker):
    """Takes `torch.Size([1, 2])` and `TensorShape([1, 2])` for `(1, 2)`."""

    def check_output(self, want, got, optionflags):
        got = re.sub(r"(?:torch\.Size|TensorShape)\((\[.*?\])\)", self._as_tuple, got)
        return super().check_output(want, got, optionflags)

    @staticmethod
    def _as_tuple(match):
        return repr(tuple(ast.literal_eval(match[1])))


def names_at_hand(module):
    """What a reader has imported, besides the names of the module itself."""
    names = {name: getattr(keras_darkformer.ops, name) for name in keras_darkformer.ops.__all__}
    names |= {"np": np, "keras": keras, "ops": keras.ops, "keras_darkformer": keras_darkformer}
    if module.split(".")[1] in ("hub", "training"):
        names["keras_hub"] = importlib.import_module("keras_hub")
    return names


@on_one_backend
@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    names = names_at_hand(module)
    runner = doctest.DocTestRunner(AnyBackend(), optionflags=doctest.ELLIPSIS)
    report = []
    for example in doctest.DocTestFinder().find(importlib.import_module(module), extraglobs=names):
        runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)
    assert runner.tries


@pytest.mark.parametrize("spelling", ["torch.Size([1, 2])", "TensorShape([1, 2])", "(1, 2)"])
def test_shapes_are_read_as_any_backend_spells_them(spelling):
    assert AnyBackend().check_output("(1, 2)\n", spelling + "\n", 0)
    assert not AnyBackend().check_output("(1, 3)\n", spelling + "\n", 0)
