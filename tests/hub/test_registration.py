"""`import keras_darkformer.hub` registers dark classes; without it, errors say what is missing."""

import json

import keras
import pytest
from backends import BACKEND
from fresh_process import run_python

from keras_darkformer import hub

from .models import dark, gemma

# One interpreter for all: the hub is imported at the end, when everything is in its way no more.
SESSION = """
    import json, sys
    import keras, keras_darkformer

    saved, preset = sys.argv[1:]
    seen = {}

    def attempt(name, what):
        try:
            seen[name] = f"loaded {type(what()).__name__}"
        except Exception as error:
            seen[name] = f"{type(error).__name__}: {error}"

    def import_hub():
        import keras_darkformer.hub

        return keras_darkformer.hub

    seen["imported"] = sorted({"keras_hub", "keras_darkformer.hub"} & set(sys.modules))
    sys.modules["keras_hub"] = None  # as if it were not installed
    block = keras_darkformer.DarkTransformerBlock(8, 2, num_features=4)
    seen["block"] = list(block(keras.ops.zeros((1, 2, 4))).shape)
    attempt("hub without keras_hub", import_hub)
    del sys.modules["keras_hub"]

    attempt("load_model", lambda: keras.saving.load_model(saved))
    import keras_hub
    for name in ("Backbone", "GemmaBackbone", "CausalLM"):
        cls = getattr(keras_hub.models, name)
        attempt(name, lambda: cls.from_preset(preset))
    seen["imported with keras_hub"] = "keras_darkformer.hub" in sys.modules

    sys.modules["keras_hub.src.vllm.context"] = None  # as if this KerasHub had no such module
    attempt("hub with another keras_hub", import_hub)
    attempt("a stock model", lambda: keras_hub.models.GemmaBackbone(8, 1, 1, 1, 4, 8, 4))
    del sys.modules["keras_hub.src.vllm.context"]

    attempt("hub", import_hub)
    attempt("load_model with hub", lambda: keras.saving.load_model(saved))
    attempt("Backbone with hub", lambda: keras_hub.models.Backbone.from_preset(preset))
    attempt("CausalLM with hub", lambda: keras_hub.models.CausalLM.from_preset(preset))
    print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """What a fresh interpreter says about a dark model that this one saved."""
    if BACKEND != "torch":
        pytest.skip("what is imported and registered is the same on all backends")
    folder = tmp_path_factory.mktemp("registration")
    model = dark(gemma(1))
    model.backbone.save(folder / "model.keras")
    model.save_to_preset(str(folder / "preset"))
    return json.loads(
        run_python(SESSION, folder / "model.keras", folder / "preset").splitlines()[-1]
    )


def test_every_dark_class_is_registered_under_the_name_of_the_package():
    names = [name for name in hub.__all__ if name.startswith("Dark")]
    assert {f"Dark{family}Backbone" for family in ("Gemma", "Llama3", "Bert")} <= set(names)
    for name in names:
        cls = getattr(hub, name)
        assert cls.__name__ == name
        assert keras.saving.get_registered_name(cls) == f"keras_darkformer>{name}"
        assert keras.saving.get_registered_object(f"keras_darkformer>{name}") is cls


@pytest.mark.slow
def test_the_package_works_without_keras_hub(session):
    assert session["imported"] == []
    assert session["block"] == [1, 2, 4]
    expected = "`keras_darkformer.hub` needs KerasHub: pip install 'keras-darkformer[hub]'"
    assert session["hub without keras_hub"] == f"ImportError: {expected}"


@pytest.mark.slow
def test_without_the_hub_errors_name_the_class_and_where_it_lives(session):
    error = session["load_model"]
    assert "Could not locate class 'DarkGemmaBackbone'" in error
    assert "'module': 'keras_darkformer.hub'" in error
    for name in ("Backbone", "GemmaBackbone", "CausalLM"):
        assert "no class registered with Keras for keras_darkformer>DarkGemma" in session[name]
    assert session["imported with keras_hub"] is False  # nobody imports it unasked


@pytest.mark.slow
def test_a_kerashub_that_does_not_fit_is_named_and_stays_usable(session):
    error = session["hub with another keras_hub"]
    assert error.startswith("ImportError: keras_darkformer.hub is made for keras-hub>=")
    assert "vllm.context" in error
    assert session["a stock model"] == "loaded GemmaBackbone"


@pytest.mark.slow
def test_with_the_hub_they_are_found(session):
    assert session["hub"] == "loaded module"
    assert session["load_model with hub"] == "loaded DarkGemmaBackbone"
    assert session["Backbone with hub"] == "loaded DarkGemmaBackbone"
    assert session["CausalLM with hub"] == "loaded DarkGemmaCausalLM"
