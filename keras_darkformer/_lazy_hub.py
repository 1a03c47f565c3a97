"""Makes dark models loadable without importing KerasHub before it is needed.

Keras finds custom classes in a registry that importing their module fills;
ours live in `keras_darkformer.hub`, which imports keras_hub: seconds, and
TensorFlow. Yet `import keras_darkformer` has to be enough for
`keras_hub.models.CausalLM.from_preset` and `keras.saving.load_model` to find
them. So they are registered as soon as keras_hub is imported, by whomever, and
until then stand-ins under their names import them when a saved model asks.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import keras

CAUSAL = (
    "Gemma",
    "Gemma3",
    "Llama",
    "Llama3",
    "Mistral",
    "Mixtral",
    "Qwen",
    "QwenMoe",
    "Qwen3",
    "Qwen3Moe",
    "Phi3",
    "GPT2",
    "OPT",
)
ENCODERS = ("Bert", "Roberta", "DistilBert")
HUB_CLASSES = (
    *(f"Dark{name}{kind}" for name in CAUSAL for kind in ("Attention", "Backbone", "CausalLM")),
    *(
        f"Dark{name}{kind}"
        for name in ENCODERS
        for kind in ("Attention", "Backbone", "MaskedLM", "TextClassifier")
    ),
)


def register_hub_lazily() -> None:
    """Registers the classes of `keras_darkformer.hub` now or when keras_hub is imported."""
    if "keras_hub" in sys.modules:
        _import_hub()
        return
    for name in HUB_CLASSES:
        keras.saving.get_custom_objects()[f"keras_darkformer>{name}"] = _StandIn(name)
    sys.meta_path.insert(0, _AfterKerasHub())


def _import_hub() -> None:
    try:
        importlib.import_module("keras_darkformer.hub")
    except ImportError as error:  # a KerasHub this version does not know must stay usable
        warnings.warn(f"Dark KerasHub models can't be loaded or converted: {error}", stacklevel=2)


class _StandIn:
    """Found by Keras under a class's registered name; importing the hub replaces it."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def from_config(self, config: dict[str, Any]) -> Any:
        hub = importlib.import_module("keras_darkformer.hub")
        return getattr(hub, self.__name__).from_config(config)


class _AfterKerasHub(importlib.abc.MetaPathFinder):
    """Imports `keras_darkformer.hub` right after keras_hub."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "keras_hub" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                # Not earlier: `find_spec` is also called by those who only ask.
                sys.meta_path.remove(self)
                run(module)
                _import_hub()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
