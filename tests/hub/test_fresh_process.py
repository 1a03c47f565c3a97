"""What was saved here is the same in a fresh process, whichever way it is loaded there."""

import json

import numpy as np
import pytest
from backends import on_one_backend
from fresh_process import run_python

from keras_darkformer import conversion_report

from .models import outputs
from .saved import (
    BATCH,
    FAMILIES,
    GEMMAS,
    IN_FILES,
    IN_PRESETS,
    KINDS,
    LOADERS,
    PROMPTS,
    TASKS,
)

pytestmark = pytest.mark.slow  # one interpreter for all of them

LOAD_WITHOUT_PACKAGE = """
    import json, sys
    import keras, keras_hub

    errors = {}
    for name, (path, expression) in json.loads(sys.argv[1]).items():
        try:
            errors[name] = f"loaded {type(eval(expression)).__name__}"
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    assert "keras_darkformer" not in sys.modules
    print(json.dumps(errors))
"""


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("family", GEMMAS)
def test_a_dark_model_is_the_same_by_every_loader(saved, family, loader):
    model, _ = saved.dark(family)
    model = model if loader in TASKS else model.backbone
    facts, output = saved.loaded(f"{family} {loader}")
    assert facts["class"] == type(model).__name__
    assert facts["report"] == conversion_report(model)
    np.testing.assert_allclose(output, outputs(model, BATCH), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*IN_PRESETS, *(f"{kind}.keras" for kind in IN_FILES)])
def test_a_fitted_model_is_the_same(saved, name):
    facts, output = saved.loaded(name)
    assert facts["class"] == "DarkGemmaCausalLM"
    assert facts["dtypes"] == ["float32"]
    model, _ = saved.fitted(name.removesuffix(".keras"))
    np.testing.assert_allclose(output, outputs(model, BATCH), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_another_family_is_the_same(saved, family):
    facts, output = saved.loaded(family)
    model, batch = saved.of_family(family)
    assert facts["class"] == type(model).__name__
    expected = outputs(model, batch)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("name", [*GEMMAS, "windowed"])
def test_the_same_text_is_generated(saved, name):
    model, _ = saved.fitted(name) if name in KINDS else saved.dark(name)
    texts = model.generate(PROMPTS, max_length=16)
    found = saved.loaded(name if name in KINDS else f"{name} DarkCausalLM")
    assert found.facts["text"] == texts
    for text, prompt in zip(texts, PROMPTS, strict=True):
        assert text.startswith(prompt)
        assert len(text) > len(prompt)


def test_a_stream_goes_on(saved):
    written = saved.loaded("stream").facts["tokens"]
    np.testing.assert_array_equal(written, saved.stream().write(6))


def test_what_can_not_be_loaded_is_an_error_of_its_own(saved):
    """One that fails neither hides what became of the others, nor passes for loaded."""
    with pytest.raises(RuntimeError, match="NameError: name 'no_such_name'"):
        saved.loaded("broken")


@on_one_backend
def test_without_the_package_loading_fails_and_says_what_is_missing(saved):
    codes = {
        f"{family} {loader}": (saved.dark(family)[1], code.format(family=family))
        for family in GEMMAS
        for loader, code in LOADERS.items()
        if "hub.D" not in code
    }
    errors = json.loads(run_python(LOAD_WITHOUT_PACKAGE, json.dumps(codes)))
    assert errors.keys() == codes.keys()
    for name, error in errors.items():
        assert not error.startswith("loaded"), name
        assert "keras_darkformer" in error, name
