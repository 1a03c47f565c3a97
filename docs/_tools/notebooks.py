"""Makes a notebook of every example, on the command line or as a hook of MkDocs.

    python docs/_tools/notebooks.py notebooks    # writes notebooks/NAME.ipynb

Examples have the form of those of keras.io. A script begins with a header, a string with a line for
each of `FIELDS`. Every other string that is a statement of the module is a cell of Markdown, and
what stands between two of them is a cell of code.
"""

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = "examples.md"  # where the site offers them
FIELDS = ("Title", "Author", "Date created", "Last modified", "Description", "Accelerator")


def cells(source: str) -> list[tuple[str, str]]:
    """The kind of each cell, "markdown" or "code", and what is in it; the header comes first."""
    lines, found, end = source.splitlines(), [], 0
    for node in ast.parse(source).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.append(("code", "\n".join(lines[end : node.lineno - 1])))
            found.append(("markdown", str(node.value.value)))
            end = node.end_lineno or node.lineno
    found.append(("code", "\n".join(lines[end:])))
    return [(kind, text.strip("\n")) for kind, text in found if text.strip()]


def header(text: str) -> dict[str, str]:
    """The fields of a header.

    Raises:
        ValueError: if they are others than `FIELDS`, or in another order.
    """
    fields = dict(line.split(": ", 1) for line in text.splitlines())
    if tuple(fields) != FIELDS:
        raise ValueError(f"A header has the lines {', '.join(FIELDS)}. Received: {text!r}")
    return fields


def notebook(source: str) -> dict[str, Any]:
    """An example as a notebook of format 4.5, without outputs."""
    (_, first), *rest = cells(source)
    fields = header(first)
    told = [f"**{name}:** {fields[name]}" for name in FIELDS[1:]]
    made: list[dict[str, Any]] = []
    for kind, text in [("markdown", f"# {fields['Title']}\n\n" + "<br>\n".join(told)), *rest]:
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{len(made)}", "metadata": {}}
        cell["source"] = text.splitlines(keepends=True)
        made.append(cell | ({"outputs": [], "execution_count": None} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def as_json(path: Path) -> str:
    """The notebook of a script, as it stands in a file."""
    return json.dumps(notebook(path.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)


def on_files(files, config):
    """Adds the notebooks to the site."""
    from mkdocs.structure.files import File

    for path in EXAMPLES:
        name = f"examples/{path.stem}.ipynb"
        files.append(File.generated(config, name, content=as_json(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Puts a link to its notebook beside that to a script; runs after links.py."""
    if page.file.src_uri != PAGE:
        return markdown
    return re.sub(r"(\]\((examples/\w+)\.py\))", r"\1 ([notebook](\2.ipynb))", markdown)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for path in EXAMPLES:
        (folder / f"{path.stem}.ipynb").write_text(as_json(path) + "\n", encoding="utf-8")
