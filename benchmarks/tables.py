"""Fills the tables of the pages from results/*.json.

    python benchmarks/tables.py            # fills them
    python benchmarks/tables.py --check    # exits with 1 if a page is not up to date

Pages are written by hand. Where a table belongs they have a mark, on a line of its own,

    <!-- table: attention torch causal -->
    <!-- end -->

and what stands between the two lines is replaced. The first word names a
function in `TABLES`, the others are its arguments: which results, as in
results/attention_torch.json, and which part of them. A mark of the other kind
shows a figure of results/ with a caption:

    <!-- figure: attention.png Time and peak memory against length -->
    <!-- end -->
"""

import argparse
import os
import pathlib
import re

import compatibility_table
import pretrained_tables as pretrained
import quality_tables as quality
import short_tables as short
import speed_tables as speed
import study_tables as study
from common import BENCHMARKS, RESULTS

ROOT = BENCHMARKS.parent
FOLDERS = (".", "docs", "benchmarks", "benchmarks/results")
MARK = re.compile(r"<!-- (\w+)(?:: (.*))? -->")
END = "<!-- end -->"
TABLES = {
    "attention": speed.attention,
    "cache-scores": pretrained.cache_scores,
    "compatibility": compatibility_table.compatibility,
    "conversion-memory": quality.conversion_memory,
    "crossover": speed.crossover,
    "crossovers": short.crossovers,
    "decode": speed.decode,
    "distil-memory": quality.distil_memory,
    "encoder": quality.encoder,
    "flash": short.flash,
    "flash-blocks": short.flash_blocks,
    "floor": speed.floor,
    "forms": short.forms,
    "gemma-to-dark": quality.gemma_to_dark,
    "in-short": speed.in_short,
    "left-out": speed.left_out,
    "losses": speed.losses,
    "matmul-rate": speed.matmul_rate,
    "measured": speed.measured,
    "memory": speed.memory,
    "model": speed.model,
    "model-sizes": speed.model_sizes,
    "offsets": quality.offsets,
    "positions": quality.positions,
    "prefill": short.prefill,
    "pretrained-costs": pretrained.costs,
    "pretrained-generation": pretrained.generation,
    "pretrained-linearized": pretrained.linearized,
    "pretrained-written": pretrained.written,
    "quality": quality.quality,
    "remat": speed.remat,
    "retrieval": pretrained.retrieval,
    "retrieval-short": pretrained.retrieval_short,
    "retrieval-trained": pretrained.retrieval_trained,
    "sequence-parallel": quality.sequence_parallel,
    "shapes": speed.shapes,
    "speed": speed.speed,
    "steps": quality.steps,
    "study": study.study,
    "study-features": study.features,
    "study-stability": study.stability,
    "study-variance": study.variance,
    "torch-compile": speed.torch_compile,
    "use": short.use,
    "use-in-short": short.use_in_short,
}


class MarkError(ValueError):
    """A mark that can't be filled: where it stands, and why."""


def table(words, page):
    name, *arguments = words.split()
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    text = TABLES[name](*arguments)
    if text.count("\n") < 2:
        raise ValueError("the results have no rows for it")
    return text


def figure(words, page):
    name, _, caption = words.partition(" ")
    if not (RESULTS / name).exists():
        raise ValueError(f"there is no results/{name}")
    return f"![{caption}]({pathlib.PurePath(os.path.relpath(RESULTS / name, page.parent))})"


KINDS = {"table": table, "figure": figure}


def filled(page):
    """The page's text with all its places filled."""
    lines, opened = [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{page.relative_to(ROOT)}, line {number}: {line}"
        mark = MARK.fullmatch(line)
        if mark is None and line.lstrip().startswith("<!--"):
            raise MarkError(f"{where}\n  is no mark: they look like <!-- table: ... -->")
        if opened and mark and line != END:
            raise MarkError(f"{opened}\n  has no `{END}` before\n  {where}")
        if opened and line != END:
            continue  # what stood there
        lines.append(line)
        if mark is None:
            continue
        if line == END:
            if opened is None:
                raise MarkError(f"{where}\n  ends nothing")
            opened = None
            continue
        kind, words = mark.groups()
        if kind not in KINDS or not words:
            raise MarkError(f"{where}\n  marks must name one of {', '.join(KINDS)} and which")
        try:
            lines += ["", KINDS[kind](words, page), ""]
        except (KeyError, TypeError, ValueError) as error:
            raise MarkError(f"{where}\n  can't be filled: {error}") from error
        opened = where
    if opened:
        raise MarkError(f"{opened}\n  has no `{END}`")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a page is out of date")
    check = parser.parse_args().check
    pages = [page for folder in FOLDERS for page in sorted((ROOT / folder).glob("*.md"))]
    try:
        texts = {page: filled(page) for page in pages}
    except MarkError as error:
        raise SystemExit(f"error: {error}") from None
    old = [page for page, text in texts.items() if text != page.read_text(encoding="utf-8")]
    for page in old:
        if not check:
            page.write_text(texts[page], encoding="utf-8")
        print(f"{page.relative_to(ROOT)} {'is out of date' if check else 'filled'}")
    raise SystemExit(1 if check and old else 0)


if __name__ == "__main__":
    main()
