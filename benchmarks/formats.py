"""Tables and figures as the pages write them."""

import functools
import json
import statistics

from common import RESULTS

PACKAGES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


@functools.cache
def load(name):
    """results/NAME.json."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise ValueError(f"there is no results/{path.name}")
    return json.loads(path.read_text())


def table(columns, rows, words=1):
    """A Markdown table: `words` columns to the left, then figures, to the right."""
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells for {len(columns)} columns: {row}")
    rule = ["---" if i < words else "---:" for i in range(len(columns))]
    lines = [columns, rule, *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def digits(value):
    """Places behind the point with which about three digits count."""
    return 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3


def number(value):
    return f"{value:,.{digits(value)}f}"


def plain_ratio(value):
    if value < 0.995:
        return f"{value:.2f}"
    if value < 1:
        return f"{value:.3f}"  # not "1.00": it is below
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def ratio(value, remark=""):
    """A ratio; bold below 1, where it is lost."""
    text = plain_ratio(value)
    return f"**{text}**{remark}" if value < 1 else text + remark


def milliseconds(time):
    places = digits(time["median"])
    return f"{time['median']:,.{places}f} ± {time['spread']:,.{places}f}"


def rate(result):
    """Tokens per second of a row of model.py."""
    if "tokens_per_second" not in result:
        return "-"
    spread = result["milliseconds"]["spread"] / result["milliseconds"]["median"]
    return f"{result['tokens_per_second']:,.0f} ± {spread:.0%}"


def span(values, form=str):
    """The lowest and the highest of some values."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def mean_and_range(values, places):
    """A mean, and in brackets the lowest and highest."""
    mean, low, high = values
    spread = "" if low == high else f" ({low:.{places}f} to {high:.{places}f})"
    return f"{mean:.{places}f}{spread}"


def median_and_range(values, places):
    """A median, and in brackets the lowest and highest; nothing of no values."""
    if not values:
        return ""
    return mean_and_range((statistics.median(values), min(values), max(values)), places)


def unique(values):
    return list(dict.fromkeys(values))
