"""Arguments that subcommands share, and their values."""

import argparse
import ast
import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_darkformer.options import ConversionOptions
from keras_darkformer.types import Config

# The conversion options that the command line has. The others are for code.
OPTIONS = (
    "num_features",
    "feature_map",
    "sliding_window",
    "num_sinks",
    "cache_size",
    "layers",
    "tie_geometry",
    "rope_geometry",
    "seed",
)


def positive(text: str) -> int:
    """An integer, 1 or more."""
    if not re.fullmatch("[0-9]+", text) or not int(text):
        raise argparse.ArgumentTypeError(f"must be an integer, 1 or more. Received: {text}")
    return int(text)


def not_negative(text: str) -> int:
    """An integer, 0 or more."""
    if not re.fullmatch("[0-9]+", text):
        raise argparse.ArgumentTypeError(f"must be an integer, 0 or more. Received: {text}")
    return int(text)


def minutes(text: str) -> float:
    """A positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number. Received: {text}")
    return number


def add_text(parser: argparse.ArgumentParser, used: str) -> None:
    """Adds `--text`, the files of text."""
    help = f"Files of UTF-8 text, {used}."
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help=help)


def add_length(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds `--length`, the tokens of a row."""
    help = f"{help} (default: %(default)s)."
    parser.add_argument("--length", type=positive, default=512, metavar="N", help=help)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype`, that of the model."""
    help = "Dtype of the model, such as bfloat16 (default: what KerasHub loads the preset in)."
    parser.add_argument("--dtype", help=help)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the conversion, explained by their class."""
    group = parser.add_argument_group(
        "options of the conversion",
        "Values are numbers or words, or lists of them separated by commas.",
    )
    told = meanings(ConversionOptions)
    for name in OPTIONS:
        flag, default = f"--{name.replace('_', '-')}", getattr(ConversionOptions, name)
        help = f"{told[name]} (default: {default}).".replace("%", "%%")
        group.add_argument(flag, type=value, metavar="VALUE", help=help)


def options_given(arguments: argparse.Namespace) -> Config:
    """The options of the conversion that were given.

    Raises:
        ValueError: if one is out of range.
    """
    given = {name: getattr(arguments, name) for name in OPTIONS}
    given = {name: found for name, found in given.items() if found is not None}
    if isinstance(layer := given.get("layers"), int):
        given["layers"] = [layer]
    ConversionOptions(**given)
    return given


def value(text: str) -> Any:
    """Parses `3` as a number, `0,4` as a list of numbers, and leaves other words as they are."""
    if "," in text:
        return [value(part) for part in text.split(",") if part]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def meanings(options: type) -> dict[str, str]:
    """The first sentence on each option, from the docstrings of its class and the bases."""
    found = {}
    for cls in reversed(options.__mro__[:-1]):
        lines = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", lines, re.MULTILINE):
            text = re.sub(r"^(bool|float|int)\. ", "", " ".join(text.split()))
            text = text.partition(". ")[0].rstrip(".").replace("`", "")
            found[name] = text[0].upper() + text[1:]
    return found


def read_texts(paths: Sequence[str]) -> list[str]:
    """Reads files of text.

    Raises:
        OSError: if one can't be read.
        ValueError: if one has no text in it.
    """
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path!r} is not UTF-8 text: {error}") from error
        if not texts[-1].strip():
            raise ValueError(f"{path!r} has no text in it.")
    return texts
