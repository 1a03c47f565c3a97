"""`keras-darkformer compare`."""

import argparse
import json
from pathlib import Path

from keras_darkformer.cli.arguments import add_dtype, add_length, add_text, positive, read_texts

SUMMARY = "compare a dark model with its source"
DESCRIPTION = """Compares a dark causal LM with the one it was converted from: losses of text and of
lookups in it, the divergence of their predictions, tokens per second of reading and
of writing, and the bytes that writing carries for one text."""
EXAMPLE = "qwen2.5_0.5b_en dark --text held_out.txt --length 2048"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add = parser.add_argument
    add("preset", metavar="PRESET", help="The stock causal LM.")
    add("dark", metavar="DIR", help="The dark model converted from it.")
    add_text(parser, "which the model was not fitted to")
    add_length(parser, "Tokens of a row of text, and of the prompt")
    help = "Tokens to write after the prompt (default: %(default)s)."
    add("--write", type=positive, default=32, metavar="N", help=help)
    add("--json", metavar="FILE", help="File to write the figures to.")
    add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    texts = read_texts(arguments.text)

    from keras_darkformer.cli.comparison import compare
    from keras_darkformer.cli.rows import rows_of
    from keras_darkformer.hub.loading import load_dark, load_stock

    presets = {"exact": (load_stock, arguments.preset), "dark": (load_dark, arguments.dark)}
    models = {name: load(preset, arguments.dtype) for name, (load, preset) in presets.items()}
    for name, (_, preset) in presets.items():
        if not hasattr(models[name], "generate"):
            raise ValueError(f"{preset!r} holds a {type(models[name]).__name__}, no causal LM.")
    rows = rows_of(models["exact"], arguments.preset, texts, arguments.length, arguments.write + 1)
    found = compare(models["exact"], models["dark"], rows, arguments.length, arguments.write)
    print(found)
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(found, indent=4) + "\n")
