"""Finds the layers worth leaving exact by measuring what converting each one costs."""

from typing import Any

import numpy as np
from rich.table import Table

from keras_darkformer.checks import positive_integer
from keras_darkformer.hub.conversion import convert_to_dark, dark_class
from keras_darkformer.layers.core import exactly
from keras_darkformer.memory import Memory
from keras_darkformer.options import ConversionOptions, shows_options
from keras_darkformer.printed import PrintedDict
from keras_darkformer.progress import Progress
from keras_darkformer.training.calibrate import calibrate
from keras_darkformer.training.data import dark_layers
from keras_darkformer.training.held_out import full_rows, inputs_of, token_loss, with_repeats
from keras_darkformer.training.positions import Parts
from keras_darkformer.types import Data, Model


class LayerChoice(PrintedDict):
    """Which layers to convert, as a dict that prints as a table.

    Keys:
        indices: list of int. The layers to convert: the argument `layers` of `convert_to_dark`.
        exact: list of int. The layers that are worth leaving exact.
        before: dict of `text` and `lookups`. The stock model's losses per token, in nats.
        layers: list of dicts, one per layer: its `index`, and as `text` and `lookups` what
            converting this layer alone adds to these losses.
    """

    @property
    def indices(self) -> list[int]:
        """The layers to convert."""
        return self["indices"]

    def __rich__(self) -> Table:
        before = self["before"]
        losses = f"text {before['text']:.2f}, lookups {before['lookups']:.2f} nats a token"
        table = Table(title="Loss that converting one layer adds", caption=f"unconverted: {losses}")
        for column in ("layer", "text", "lookups", ""):
            table.add_column(column, justify="right")
        for layer in self["layers"]:
            costs = (f"{layer[kind]:+.3f}" for kind in ("text", "lookups"))
            kept = "exact" if layer["index"] in self["exact"] else ""
            table.add_row(str(layer["index"]), *costs, kept)
        return table

    def plot(self, path: Any = None) -> Any:
        """The costs by layer as a matplotlib figure, saved to `path` if one is given."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3), layout="constrained")
        axis = figure.subplots()
        index = np.array([layer["index"] for layer in self["layers"]])
        for offset, kind in ((-0.2, "text"), (0.2, "lookups")):
            costs = [layer[kind] for layer in self["layers"]]
            axis.bar(index + offset, costs, width=0.4, label=kind)
        for layer in self["exact"]:
            axis.axvspan(layer - 0.5, layer + 0.5, color="0.9", zorder=0)
        axis.set(xlabel="layer (grey: left exact)", ylabel="nats a token")
        axis.legend()
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def probe_length(memory: Memory) -> int:
    """A row length, in tokens, that is too long for an exact memory to hold everything."""
    return max(256, 2 * memory.size)


def check_length(length: int, memory: Memory) -> None:
    """Raises a ValueError if a row of this length fits into the exact memory as a whole."""
    if length <= memory.size:
        raise ValueError(
            f"`length` must be more than the {memory.size} tokens that the exact memory holds "
            f"({memory}): a shorter row loses nothing, and shows nothing. Received: "
            f"length={length}. Give longer rows or a smaller memory."
        )


@shows_options(ConversionOptions, but=("layers",))
def choose_layers(
    model: Model,
    data: Data,
    *,
    keep_exact: int,
    max_tokens: int = 2048,
    length: int | None = None,
    repeat: int = 32,
    batch_size: int = 4,
    probe_seed: int = 0,
    verbose: bool = True,
    **kwargs: Any,
) -> LayerChoice:
    """Finds the layers of a causal LM that are worth leaving exact.

    In a trained decoder, a few layers look up earlier tokens, and others matter most for plain
    text. They are different layers and not evenly spaced. Each layer is therefore converted by
    itself, while the rest stay exact, and the losses are compared with the stock model's: on the
    given text, and on lookups made from it, in which a segment is repeated. The layers whose
    conversion adds most to the sum of both losses are left exact.

    The probe works on a converted copy whose features are calibrated on the same data in closed
    form. The model itself is not changed.

    Args:
        model: a causal LM of `keras_hub.models` that `convert_to_dark` accepts.
        data: as for `calibrate`, with rows at least `length` tokens long.
        keep_exact: int. Number of layers to leave exact, less than the model has.
        max_tokens: int. Tokens that the probe reads for each layer, half of them lookups.
        length: int. Tokens per row of the probe. It must exceed the exact memory, since tokens held
            there cost nothing. `None` for twice the memory's size, at least 256.
        repeat: int. Tokens in the repeated segment of a lookup, at most a third of `length`.
        batch_size: int. Batch size for data that is not batched.
        probe_seed: int. Seed for choosing the repeated segments.
        verbose: bool. Whether to show progress, as one line that is rewritten in place or, in a
            file, as a new line now and then.
        **kwargs: the options of `ConversionOptions` except `layers`, as you will pass them to
            `convert_to_dark`.

    Returns:
        A `LayerChoice`: print it, read it as a dict, `plot` it, and pass its `indices` to
        `convert_to_dark(model, layers=choice.indices, ...)`.

    Raises:
        TypeError: if an option is unknown.
        ValueError: if an argument is out of range, `data` has no row of `length` tokens, or the
            model can't be converted.

    Example:

        options = {"feature_map": "none", "sliding_window": 64, "num_sinks": 4, "cache_size": 60}
        choice = choose_layers(model, texts, keep_exact=4, **options)
        print(choice)
        convert_to_dark(model, layers=choice.indices, **options)

    References:
        - [Retrieval Heads](https://arxiv.org/abs/2404.15574): few attention heads look up tokens
    """
    options, _ = ConversionOptions.take(choose_layers, kwargs, besides=())
    dark_class(type(model))  # raises an error that says why it can't be converted
    length = probe_length(options.memory) if length is None else length
    for name, value in (("keep_exact", keep_exact), ("max_tokens", max_tokens), ("repeat", repeat)):
        positive_integer(name, value)
    if positive_integer("length", length) < 3 * repeat:
        raise ValueError(
            "`length` must be at least three times `repeat`, to hold a segment, the tokens between "
            f"and the segment again. Received: length={length}, repeat={repeat}"
        )
    check_length(length, options.memory)
    rows = max(1, max_tokens // (2 * length))
    text = full_rows(model, data, batch_size, length, rows)
    lookups = with_repeats(text, repeat, np.random.default_rng(probe_seed))
    dark = convert_to_dark(model, copy=True, layers="all", **kwargs)
    layers = dark_layers(dark)
    if not keep_exact < len(layers):
        raise ValueError(
            f"`keep_exact` must be less than the {len(layers)} layers. "
            f"Received: keep_exact={keep_exact}"
        )
    if any(layer.feature_map.num_features for layer in layers.values()):
        calibrate(dark, [inputs_of(text)], refine=False, verbose=False)
    parts = Parts(dark)

    def losses() -> dict[str, float]:
        return {
            "text": token_loss(parts, text, 1),
            "lookups": token_loss(parts, lookups, length - repeat + 1),
        }

    progress = Progress("choose_layers", "layers", len(layers), verbose=verbose)
    with exactly(layers.values()):
        before = losses()
    found = []
    for index, layer in enumerate(layers.values()):
        with exactly(other for other in layers.values() if other is not layer):
            after = losses()
        found.append({"index": index} | {kind: after[kind] - before[kind] for kind in before})
        progress.update(index + 1)
    progress.finish()
    by_cost = sorted(found, key=lambda layer: -(layer["text"] + layer["lookups"]))
    exact = sorted(layer["index"] for layer in by_cost[:keep_exact])
    indices = [layer["index"] for layer in found if layer["index"] not in exact]
    return LayerChoice(indices=indices, exact=exact, before=before, layers=found)
