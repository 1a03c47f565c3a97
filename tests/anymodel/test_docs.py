"""The code of docs/any_model.md runs."""

import re

from backends import on_one_backend
from fresh_process import ROOT

from .models import dark_layers_of

CODE = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "any_model.md").read_text(encoding="utf-8"), re.DOTALL
)


@on_one_backend
def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in CODE:
        exec(code, names)
    assert len(dark_layers_of(names["loaded"])) == 2
    assert len(dark_layers_of(names["Block"]())) == 1
