"""What the conversion of a Keras model changed."""

from typing import Any

from keras_darkformer.anymodel.attention import DarkKerasAttention
from keras_darkformer.anymodel.finding import attention_layers
from keras_darkformer.layers.stock import window_of
from keras_darkformer.surgery.report import WEIGHT_DROPOUT, ConversionReport, Row, report_of
from keras_darkformer.types import Layer, Model


def conversion_report(model: Model) -> ConversionReport:
    """The report of a Keras model.

    Raises:
        ValueError: if none of its attention layers is dark.
    """
    layers = attention_layers(model)
    if waiting := [x.name for x in layers if not x.built]:
        raise ValueError(
            f"`model` must be built: call it on a batch first. Not built are: {waiting}"
        )
    rows = [
        Row(x.path, window_of(x), x if isinstance(x, DarkKerasAttention) else None) for x in layers
    ]
    if all(row.attention is None for row in rows):
        raise ValueError(
            "`model` must be a model converted by `convert_to_dark`. "
            f"Received: {type(model).__name__}"
        )
    return report_of(model, rows, dropped(model))


def dropped(model: Model) -> list[dict[str, Any]]:
    """What the converted layers no longer do: dicts of `what`, `why` and `layers`, indices."""
    layers = [index for index, x in enumerate(attention_layers(model)) if _drops_weights(x)]
    what, why = WEIGHT_DROPOUT
    return [{"what": what, "why": why, "layers": layers}] if layers else []


def _drops_weights(layer: Layer) -> bool:
    """Whether a layer drops whole tokens where the stock layer drops attention weights."""
    if not isinstance(layer, DarkKerasAttention):
        return False
    return layer.made_with.is_linear and layer.dropout > 0
