"""The dark classes: every stock class that `families.py` lists, turned dark."""

from typing import Any

import keras

from keras_darkformer.hub.attention import DarkHubAttention
from keras_darkformer.hub.backbone import DarkBackbone
from keras_darkformer.hub.causal_lm import DarkCausalLM, DarkTask
from keras_darkformer.hub.families import FAMILIES, Family
from keras_darkformer.hub.sharding import ShardedBackbone

ATTENTION_DOC = """`{stock}` with the dark kernel.

Args:
    feature_form: the form of the feature map, see `DarkFeatureMap`.
    *args, **kwargs: as for the stock layer, and the options of
        `convert_to_dark` but for `layers`; with `dark_` before the name where
        the stock layer has an argument of that name.
"""
BACKBONE_DOC = """`keras_hub.models.{stock}` whose layers attend in linear time.

Args:
    feature_forms: forms of the converted layers' feature maps, what
        calibration made of them.
    *args, **kwargs: as for the stock backbone, and the options of
        `convert_to_dark`; with `dark_` before the name where the stock
        backbone has an argument of that name.

Example:

    backbone = keras_darkformer.hub.{name}.from_preset(preset, num_features=256)
"""
TASK_DOC = """`keras_hub.models.{stock}` with linear attention, used as the stock model.

Args:
    backbone: a `{backbone}`.
    preprocessor: as for the stock model, or `None`.
    **kwargs: as for the stock model.

Example:

    model = keras_darkformer.hub.{name}.from_preset(preset, num_features=256)
    model.save_to_preset("dark")
"""


def _dark_class(name: str, base: type, stock: type, doc: str, **attributes: Any) -> type:
    attributes |= {"stock_cls": stock, "__module__": "keras_darkformer.hub"}
    attributes["__doc__"] = doc.format(stock=stock.__name__, name=name, **attributes)
    dark_class = type(name, (base, stock), attributes)
    return keras.saving.register_keras_serializable(package="keras_darkformer")(dark_class)


def _classes_of(family: Family) -> dict[type, type]:
    """The dark class of each of a family's stock classes."""
    attention = _dark_class(
        f"Dark{family.name}Attention",
        family.dark_attention,
        family.attention,
        ATTENTION_DOC,
        family=family,
    )
    backbone = _dark_class(
        f"Dark{family.name}Backbone",
        ShardedBackbone if hasattr(family.backbone, "get_layout_map") else DarkBackbone,
        family.backbone,
        BACKBONE_DOC,
        family=family,
        attention_cls=attention,
    )
    classes = {family.attention: attention, family.backbone: backbone}
    for kind, stock in family.tasks.items():
        base = DarkCausalLM if kind == "CausalLM" else DarkTask
        doc = TASK_DOC.replace("{backbone}", backbone.__name__)
        name = f"Dark{family.name}{kind}"
        classes[stock] = _dark_class(name, base, stock, doc, backbone_cls=backbone)
    return classes


_OF_FAMILIES = [_classes_of(family) for family in FAMILIES]
# By their names, and (but for attention layers, which some families share) by their stock classes.
DARK_CLASSES = {dark.__name__: dark for classes in _OF_FAMILIES for dark in classes.values()}
BY_STOCK_CLASS: dict[type, Any] = {
    stock: dark
    for classes in _OF_FAMILIES
    for stock, dark in classes.items()
    if not issubclass(dark, DarkHubAttention)
}
