"""What a conversion changed."""

from typing import Any

from rich.table import Table

from keras_darkformer.hub.backbone import DarkBackbone
from keras_darkformer.layers.core import FeatureAttention
from keras_darkformer.memory import Memory
from keras_darkformer.printed import PrintedDict


class ConversionReport(PrintedDict):
    """A conversion's facts: a dict for code, a table when printed.

    Keys:
        model: class name of the model.
        num_features, attention_mode, projection, geometry_scale: as converted; `num_features` is a
            list where layers differ.
        sliding_window, num_sinks, cache_size: of the exact memory.
        layers: list of dicts, one a layer: index, name, kind ("global" or "local"), converted,
            feature_map and num_features (`None` if left; 0 for `"none"`) and new_parameters.
        converted, left: lists of layer indices.
        dropped: list of dicts of what the converted layers no longer do: what, why, layers.
        new_parameters: dict of trainable and non_trainable counts.
        parameters: count of all parameters.
    """

    def __rich__(self) -> Table:
        table = Table(
            title=f"{self['model']}: {len(self['converted'])} of {len(self['layers'])} layers "
            f"converted, {self['attention_mode']} attention"
        )
        for column in ("layer", "kind", "attention", "features", "new parameters"):
            table.add_column(column, justify="left" if column in ("kind", "attention") else "right")
        for layer in self["layers"]:
            done = layer["converted"]
            table.add_row(
                str(layer["index"]),
                layer["kind"],
                f"dark ({self['attention_mode']})" if done else "left as it was",
                str(layer["num_features"]) if done else "-",
                f"{layer['new_parameters']:,}" if done else "-",
            )
        new, lines = self["new_parameters"], []
        if any(layer["num_features"] for layer in self["layers"]):
            start, drawn = self["geometry_scale"], self["projection"]
            lines.append(f"geometry starts at {start:.3g} I, {drawn} projection")
        memory = Memory(*(self[name] for name in Memory._fields))
        if memory and self["attention_mode"] == "linear":
            lines.append(f"kept exactly: {memory}")
        lines += [
            f"new parameters: {new['trainable']:,} trainable, {new['non_trainable']:,} not, "
            f"of {self['parameters']:,} in all",
        ]
        for drop in self["dropped"]:
            lines.append(f"dropped in layers {drop['layers']}: {drop['what']}. {drop['why']}")
        table.caption = "\n".join(lines)
        table.caption_justify = "left"
        return table


def conversion_report(model: Any) -> ConversionReport:
    """Says what `convert_to_dark` changed in a model, also after saving and loading it.

    Args:
        model: a dark causal LM or backbone.

    Returns:
        A `ConversionReport`: print it, or read it as a dict.

    Raises:
        ValueError: if the model is not dark.

    Example:

        print(conversion_report(model))
        conversion_report(model)["dropped"]
    """
    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, DarkBackbone):
        raise ValueError(
            "`model` must be a causal LM or backbone converted by `convert_to_dark`. "
            f"Received: {type(model).__name__}"
        )
    options = backbone.options
    layers = []
    named = zip(backbone.family.names(backbone), backbone.attention_layers, strict=True)
    for index, (name, attention) in enumerate(named):
        converted = isinstance(attention, FeatureAttention)
        window = backbone.family.window(attention)
        layers.append(
            {
                "index": index,
                "name": name,
                "kind": "global" if window is None else "local",
                "converted": converted,
                "feature_map": attention.feature_map.kind if converted else None,
                "num_features": attention.feature_map.num_features if converted else None,
                "new_parameters": attention.feature_map.count_params() if converted else 0,
            }
        )
    maps = [layer.feature_map for layer in backbone.dark_layers.values()]
    counts = [feature_map.num_features for feature_map in maps]
    return ConversionReport(
        model=type(model).__name__,
        num_features=counts[0] if len(set(counts)) == 1 else counts,
        attention_mode=options.attention_mode,
        projection=options.projection,
        geometry_scale=options.geometry_scale,
        **options.memory._asdict(),
        layers=layers,
        converted=list(backbone.dark_layers),
        left=[layer["index"] for layer in layers if not layer["converted"]],
        dropped=backbone.dropped(),
        new_parameters={
            "trainable": _count(w for m in maps for w in m.trainable_weights),
            "non_trainable": _count(w for m in maps for w in m.non_trainable_weights),
        },
        parameters=model.count_params(),
    )


def _count(weights: Any) -> int:
    total = 0
    for weight in weights:
        size = 1
        for dim in weight.shape:
            size *= dim
        total += size
    return total
