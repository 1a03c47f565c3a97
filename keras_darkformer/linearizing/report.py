"""What a pipeline achieved, stage by stage."""

from typing import Any

from rich.table import Table

from keras_darkformer.printed import PrintedDict


class LinearizationReport(PrintedDict):
    """How a model was linearized: a dict for code, a table when printed.

    Keys:
        model: class name of the source.
        layers: int, its number of layers.
        exact_layers: list of int, the layers left exact.
        options: dict, the options of the conversion.
        data: dict of `training_tokens`, `held_out_tokens`, `length` and `description`.
        exact: dict, the figures of the source on held-out text: `text` and `lookups`, losses in
            nats per token, and `divergence` from the source's predictions; for encoders `cosine`,
            the similarity of embeddings to the source's.
        stages: list of dicts, one per stage: `name`, `seconds`, `tokens`, the figures after it, and
            `kept`: a stage that makes the figures worse is undone.
        versions: dict, the versions of packages.
    """

    def figures(self) -> list[str]:
        """The names of the figures."""
        return list(self["exact"])

    def __rich__(self) -> Table:
        data = self["data"]
        table = Table(
            title=f"{self['model']}, {self['layers'] - len(self['exact_layers'])} of "
            f"{self['layers']} layers linear",
            caption=f"on {data['held_out_tokens']:,} held-out tokens, rows of {data['length']}; "
            "losses in nats per token",
        )
        table.add_column("after")
        undone = any(not stage["kept"] for stage in self["stages"])
        for column in (*self.figures(), "tokens", "seconds", *([""] if undone else [])):
            table.add_column(column, justify="right")
        exact = [f"{self['exact'][name]:z.3f}" for name in self.figures()]
        table.add_row("the source, exact", *exact)
        for stage in self["stages"]:
            values = [f"{stage[name]:z.3f}" for name in self.figures()]
            facts = [f"{stage['tokens']:,}", f"{stage['seconds']:.0f}"]
            facts += [] if stage["kept"] else ["undone"]
            table.add_row(stage["name"], *values, *facts)
        return table

    def plot(self, path: Any = None) -> Any:
        """The figures by stage, as a matplotlib figure, also saved to `path` if one is given."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4 * len(self.figures()), 3), layout="constrained")
        axes = figure.subplots(1, len(self.figures()), squeeze=False)[0]
        names = [stage["name"] for stage in self["stages"]]
        for axis, name in zip(axes, self.figures(), strict=True):
            axis.plot(names, [stage[name] for stage in self["stages"]], "o-")
            axis.axhline(self["exact"][name], color="0.5", linestyle="--")
            axis.set(title=name, xlabel="after (dashed: the source)")
            axis.tick_params("x", rotation=30)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure
