"""The dark classes of a family: its backbone and its tasks."""

import inspect
from typing import Any

import keras

from keras_darkformer.hub.backbone import DarkBackbone, option_names
from keras_darkformer.hub.causal_lm import DarkCausalLM, DarkTask
from keras_darkformer.hub.family import Family
from keras_darkformer.hub.presets import Carded
from keras_darkformer.hub.sharding import ShardedBackbone
from keras_darkformer.hub.towers import Tower
from keras_darkformer.options import ConversionOptions

BACKBONE_DOC = """`keras_hub.models.{stock}` whose layers attend in linear time.

Args:
    *args, **kwargs: as for the stock backbone, and the options of
        `ConversionOptions`. An option has the prefix `dark_` where the stock
        backbone has an argument of that name.

Raises:
    ValueError: if an option is out of range or does not fit the backbone, or
        the backbone can't be converted.

Example:

    backbone = keras_darkformer.hub.{name}.from_preset(preset, num_features=256)
"""
TASK_DOC = """`keras_hub.models.{stock}` with linear attention, used like the stock model.

Args:
    backbone: a `{backbone}`.
    preprocessor: as for the stock model, or `None`.
    **kwargs: as for the stock model.

Example:

    model = keras_darkformer.hub.{name}.from_preset(preset, num_features=256)
    model.save_to_preset("dark")
"""


def dark_classes(family: Family | Tower) -> dict[type, Any]:
    """The dark class of each of a family's stock classes."""
    backbone = _dark_class(
        f"Dark{family.backbone.__name__}",
        ShardedBackbone if hasattr(family.backbone, "get_layout_map") else DarkBackbone,
        family.backbone,
        BACKBONE_DOC,
        family=family,
        __init__=_constructor(family.backbone),
    )
    classes = {family.backbone: backbone}
    for kind, stock in family.tasks.items():
        base = DarkCausalLM if kind == "CausalLM" else DarkTask
        doc = TASK_DOC.replace("{backbone}", backbone.__name__)
        name = f"Dark{family.name}{kind}"
        classes[stock] = _dark_class(name, base, stock, doc, backbone_cls=backbone)
    return classes


def _constructor(stock: Any) -> Any:
    """A dark backbone's constructor, whose signature shows the stock arguments and ours.

    Keras takes a class whose constructor accepts any argument for a functional model, and clones it
    as one.
    """

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        DarkBackbone.__init__(self, *args, **kwargs)

    *own, rest = inspect.signature(stock.__init__).parameters.values()
    defaults = {name: getattr(ConversionOptions, of) for name, of in option_names(stock).items()}
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in (defaults | {"linearization": None}).items()
    ]
    construct.__signature__ = inspect.Signature([*own, *more, rest])  # type: ignore[attr-defined]
    return construct


def _dark_class(name: str, base: type, stock: type, doc: str, **attributes: Any) -> type:
    attributes |= {"stock_cls": stock, "__module__": "keras_darkformer.hub"}
    attributes["__doc__"] = doc.format(stock=stock.__name__, name=name, **attributes)
    dark_class = type(name, (base, Carded, stock), attributes)
    return keras.saving.register_keras_serializable(package="keras_darkformer")(dark_class)
