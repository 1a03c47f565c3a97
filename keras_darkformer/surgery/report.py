"""What a conversion changed: a dict for code, a table when printed."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from keras_darkformer.layers.core import FeatureAttention
from keras_darkformer.memory import Memory
from keras_darkformer.printed import PrintedDict
from keras_darkformer.types import Model


class ConversionReport(PrintedDict):
    """A conversion's facts: a dict for code, a table when printed.

    Keys:
        model: class name of the model.
        num_features, attention_mode, projection, geometry_scale: as converted; if layers differ, a
            list with one entry per converted layer.
        sliding_window, num_sinks, cache_size: sizes of the exact memory, likewise.
        layers: list of dicts, one per layer: index, name, kind ("local" if it had a sliding window,
            else "global"), converted, feature_map and num_features (`None` if left; 0 features for
            `"none"`) and new_parameters.
        converted, left: lists of layer indices.
        dropped: list of dicts of what the converted layers no longer do: what, why, layers.
        new_parameters: dict of the counts `trainable` and `non_trainable`.
        parameters: int, count of all parameters.
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
            told = " I and ".join(f"{scale:.3g}" for (scale,) in self._distinct("geometry_scale"))
            drawn = " and ".join(name for (name,) in self._distinct("projection"))
            lines.append(f"geometry starts at {told} I, {drawn} projection")
        memories = [Memory(*sizes) for sizes in self._distinct(*Memory._fields)]
        if any(memories) and self["attention_mode"] != "exact":
            told = "; or ".join(str(memory) for memory in memories if memory)
            lines.append(f"kept exactly: {told}")
        lines += [
            f"new parameters: {new['trainable']:,} trainable, {new['non_trainable']:,} not, "
            f"of {self['parameters']:,} in all",
        ]
        for drop in self["dropped"]:
            lines.append(f"dropped in layers {drop['layers']}: {drop['what']}. {drop['why']}")
        table.caption = "\n".join(lines)
        table.caption_justify = "left"
        return table

    def _distinct(self, *names: str) -> list[tuple[Any, ...]]:
        """The values of the converted layers under these names, each once, in order."""
        count = len(self["converted"])
        columns = [x if isinstance(x := self[name], list) else [x] * count for name in names]
        return list(dict.fromkeys(zip(*columns, strict=True)))


# What is dropped from a layer with dropout of attention weights, and why.
WEIGHT_DROPOUT = (
    "dropout of single attention weights",
    "Linear attention forms none; whole tokens are dropped at the same rate.",
)


def warn_of_dropped(
    name: str | None, dropped: Iterable[dict[str, Any]], layers: str, stacklevel: int
) -> None:
    """Warns of what the converted layers of a model no longer do.

    Args:
        name: name of the model.
        dropped: as for `report_of`.
        layers: what the indices count, for the message.
        stacklevel: int. As for `warnings.warn`, if that were called instead of this function.
    """
    for drop in dropped:
        warnings.warn(
            f"Converting {name!r} drops from {layers} {drop['layers']}: {drop['what']}. "
            f"{drop['why']}",
            stacklevel=stacklevel + 1,
        )


class Row(NamedTuple):
    """A layer that attends.

    Attributes:
        name: the name to show.
        window: int, size of the stock layer's sliding window, or `None`.
        attention: the dark attention layer, or `None` if it was left.
    """

    name: str
    window: int | None
    attention: FeatureAttention | None


def report_of(
    model: Model, rows: Sequence[Row], dropped: Iterable[dict[str, Any]]
) -> ConversionReport:
    """The report of a model.

    Args:
        model: the dark model.
        rows: its layers that attend; at least one is dark.
        dropped: dicts of `what` its converted layers no longer do, `why`, and which `layers`.
    """
    dark = {index: row.attention for index, row in enumerate(rows) if row.attention is not None}
    maps, options = [x.feature_map for x in dark.values()], [x.options for x in dark.values()]
    return ConversionReport(
        model=type(model).__name__,
        num_features=_common([feature_map.num_features for feature_map in maps]),
        attention_mode=_common([x.attention_mode for x in options]),
        projection=_common([x.projection for x in options]),
        geometry_scale=_common([x.geometry_scale for x in options]),
        **{name: _common([getattr(x, name) for x in options]) for name in Memory._fields},
        layers=[_as_dict(index, row) for index, row in enumerate(rows)],
        converted=list(dark),
        left=[index for index in range(len(rows)) if index not in dark],
        dropped=list(dropped),
        new_parameters={
            "trainable": _count(w for m in maps for w in m.trainable_weights),
            "non_trainable": _count(w for m in maps for w in m.non_trainable_weights),
        },
        parameters=model.count_params(),
    )


def _as_dict(index: int, row: Row) -> dict[str, Any]:
    feature_map = None if row.attention is None else row.attention.feature_map
    return {
        "index": index,
        "name": row.name,
        "kind": "global" if row.window is None else "local",
        "converted": feature_map is not None,
        "feature_map": None if feature_map is None else feature_map.kind,
        "num_features": None if feature_map is None else feature_map.num_features,
        "new_parameters": 0 if feature_map is None else feature_map.count_params(),
    }


def _common(values: list[Any]) -> Any:
    """The value that all share, or the list of their values."""
    return values[0] if len(set(values)) == 1 else values


def _count(weights: Iterable[Any]) -> int:
    return sum(math.prod(weight.shape) for weight in weights)
