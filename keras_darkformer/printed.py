"""Results that are a dict for code and a table when printed."""

from rich.console import Console


class PrintedDict(dict):
    """A dict that prints as what its `__rich__` returns.

    Attributes:
        width: columns of the page.
    """

    width = 100

    def __str__(self) -> str:
        # In a notebook it would display an empty box, besides.
        console = Console(width=self.width, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()
