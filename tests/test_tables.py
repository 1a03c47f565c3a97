"""The pages' tables come from benchmarks/results, by benchmarks/tables.py."""

import subprocess
import sys

import pytest
from backends import numpy_only
from fresh_process import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import tables

numpy_only()


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)

    def write(text):
        path = tmp_path / "page.md"
        path.write_text(text)
        return path

    return write


def test_no_page_is_out_of_date():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_place_is_filled_and_filled_again_with_the_same(page):
    path = page("Before.\n\n<!-- table: attention torch causal -->\nold\n<!-- end -->\n\nAfter.\n")
    once = tables.filled(path)
    assert "| h64 m128 | 512 | forward |" in once
    assert "old" not in once
    assert once.startswith("Before.\n")
    assert once.endswith("\nAfter.\n")
    path.write_text(once)
    assert tables.filled(path) == once


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- table: speeed torch -->\n<!-- end -->", "no table 'speeed'"),
        ("<!-- table: attention torch sideways -->\n<!-- end -->", "'sideways'"),
        ("<!-- table: attention torch -->\n<!-- end -->", "can't be filled"),
        ("<!-- table: decode abacus -->\n<!-- end -->", "no results/decode_abacus.json"),
        ("<!-- tabel: decode torch -->\n<!-- end -->", "table, figure"),
        ("<!--table: decode torch-->\n<!-- end -->", "no mark"),
        ("<!-- figure: none.png What -->\n<!-- end -->", "no results/none.png"),
        ("<!-- table: decode torch -->\ntext", "has no `<!-- end -->`"),
        ("<!-- table: decode torch -->\n<!-- table: decode jax -->\n<!-- end -->", "before"),
        ("text\n<!-- end -->", "ends nothing"),
    ],
)
def test_a_mark_that_can_not_be_filled_says_where_and_why(page, text, error):
    with pytest.raises(tables.MarkError, match=error) as caught:
        tables.filled(page(text))
    assert "page.md, line" in str(caught.value)
