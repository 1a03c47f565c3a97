"""What the conversion of a KerasHub model changed."""

from typing import Any

from keras_darkformer.hub.backbone import DarkBackbone
from keras_darkformer.layers.core import FeatureAttention
from keras_darkformer.surgery.report import ConversionReport, Row, report_of


def conversion_report(model: Any) -> ConversionReport:
    """Reports what `convert_to_dark` changed in a model, even one that was saved and loaded.

    Args:
        model: a dark causal LM, another dark task, or a dark backbone.

    Returns:
        A `ConversionReport`: print it, or read it as a dict.

    Raises:
        ValueError: if the model is not dark.
    """
    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, DarkBackbone):
        raise ValueError(
            "`model` must be a model converted by `convert_to_dark`. "
            f"Received: {type(model).__name__}"
        )
    family = backbone.family
    named = zip(family.names(backbone), backbone.attention_layers, strict=True)
    rows = [
        Row(name, family.window(x), x if isinstance(x, FeatureAttention) else None)
        for name, x in named
    ]
    return report_of(model, rows, backbone.dropped())
