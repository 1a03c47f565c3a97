"""What a pipeline won, stage by stage."""

from typing import Any

from rich.table import Table

from keras_darkformer.printed import PrintedDict


class LinearizationReport(PrintedDict):
    """How a model was linearized: a dict for code, a table when printed.

    Keys:
        model: the class of the source.
        layers: int, its number of layers.
        exact_layers: list of int, those left exact.
        options: dict, of the conversion.
        data: dict of `training_tokens`, `held_out_tokens`, `length` and `description`.
        exact: dict, the figures of the source on held-out text: `text` and `lookups`, losses in
            nats a token, and `divergence`, from what the source predicts; for encoders `cosine`, of
            embeddings with the source's.
        stages: list of dicts, one a stage: `name`, `seconds`, `tokens`, the figures after it, and
            `kept`, whether it is part of the model: what makes the figures worse is undone.
        versions: dict, of packages.
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
            "losses in nats a token",
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
        """The figures by stage, as a matplotlib figure, saved to `path` where one is given."""
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
