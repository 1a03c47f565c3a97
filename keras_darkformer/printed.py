"""Results that are dicts and print as tables."""

from rich.console import Console


class PrintedDict(dict):
    """A dict that prints the table that its `__rich__` returns.

    Attributes:
        width: width of the printed text, in columns.
    """

    width = 100

    def __str__(self) -> str:
        # Otherwise a notebook would also display an empty box.
        console = Console(width=self.width, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()
