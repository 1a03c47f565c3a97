"""`import keras_darkformer` is enough for Keras and KerasHub to find dark classes."""

import json

import pytest
from fresh_process import run_python

from keras_darkformer import _lazy_hub, hub

CONFIG = """
    config = {
        "vocabulary_size": 8, "num_layers": 1, "num_query_heads": 1, "num_key_value_heads": 1,
        "hidden_dim": 4, "intermediate_dim": 8, "head_dim": 4, "num_features": 8,
    }
    saved = {
        "module": "keras_darkformer.hub.backbone", "class_name": "DarkGemmaBackbone",
        "config": config, "registered_name": "keras_darkformer>DarkGemmaBackbone",
    }
"""
FOUND = {
    "a saved model": """
    import sys
    import keras, keras_darkformer
    assert "keras_hub" not in sys.modules
    model = keras.saving.deserialize_keras_object(saved)
    """,
    "keras_hub imported later": """
    import keras, keras_darkformer
    import keras_hub
    model = keras.saving.get_registered_object(saved["registered_name"])(**config)
    """,
    "keras_hub imported after a look whether it is there": """
    import importlib.util
    import keras, keras_darkformer
    importlib.util.find_spec("keras_hub")
    import keras_hub
    model = keras.saving.get_registered_object(saved["registered_name"])(**config)
    """,
    "keras_hub imported before": """
    import keras, keras_hub
    import keras_darkformer
    model = keras.saving.get_registered_object(saved["registered_name"])(**config)
    """,
}


def test_the_list_of_dark_classes_is_complete():
    assert set(_lazy_hub.HUB_CLASSES) == {name for name in hub.__all__ if name.startswith("Dark")}


@pytest.mark.slow
@pytest.mark.parametrize("way", FOUND)
def test_dark_classes_are_found_by(way):
    report = "print(keras_darkformer.conversion_report(model)['model'])"
    code = "\n".join(line.strip() for line in f"{CONFIG}{FOUND[way]}{report}".splitlines())
    assert run_python(code).split()[-1] == "DarkGemmaBackbone"


@pytest.mark.slow
def test_a_kerashub_that_does_not_fit_stays_usable():
    code = """
        import json, sys, warnings
        import keras_darkformer
        sys.modules["keras_darkformer.hub"] = None  # importing it raises ImportError
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import keras_hub
        print(json.dumps([hasattr(keras_hub, "models"), [str(w.message) for w in caught]]))
    """
    usable, messages = json.loads(run_python(code).splitlines()[-1])
    assert usable
    assert any("Dark KerasHub models can't be loaded" in message for message in messages)
