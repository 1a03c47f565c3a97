"""An extension of Griffe: docstrings in Keras' style, read as Google's.

What differs: `Example:` and `References:` are followed by an empty line or by text that is not
indented, doctests stand outside of any section, and `Call arguments:` are arguments.
"""

import re
import textwrap

import griffe

# As parameters, whose lines may begin with several names.
TITLES = {
    f"{title}:": f"Other Parameters: {title}:" for title in ("Call arguments", "Keys", "Attributes")
}
HEADING = re.compile(r"(Example|References):")
DOCTEST = re.compile(r">>> ")
INDENTED = re.compile(r"    (?!\w+:)[\w@#]")  # and no argument


def as_google(text: str, of_class: bool = False) -> str:
    """The docstring with code in fences and headings that Markdown has."""
    lines = [TITLES.get(line, line) for line in text.splitlines()]
    blocks = textwrap.dedent("\n".join(lines)).split("\n\n")
    written, heading = [], ""
    for block in _joined(blocks):
        first, _, rest = block.partition("\n")
        if of_class and first == "Returns:":
            heading, block = "", textwrap.dedent(rest)
            written.append("**Returns**")
        elif match := HEADING.fullmatch(first):
            heading = match[1]
            written.append(f"**{heading}**")
            if not rest:
                continue
            block = rest
        elif re.fullmatch(r"[A-Z][\w ]*:( .*)?", first) and rest.startswith("    "):
            heading = ""
        if DOCTEST.match(block):
            written.append(f"```pycon\n{block}\n```")
        elif heading == "Example" and block.startswith("    "):
            written.append(f"```python\n{textwrap.dedent(block)}\n```")
        elif heading == "References":
            written.append(textwrap.dedent(block))
        else:
            written.append(block)
    return "\n\n".join(written)


def _joined(blocks: list[str]) -> list[str]:
    """Blocks of indented code that empty lines part, as one."""
    joined: list[str] = []
    for block in blocks:
        if joined and all(map(INDENTED.match, (joined[-1], block))):
            joined[-1] += f"\n\n{block}"
        else:
            joined.append(block)
    return joined


class KerasDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called once for each object of the package."""
        if obj.docstring:
            obj.docstring.value = as_google(obj.docstring.value, obj.is_class)
