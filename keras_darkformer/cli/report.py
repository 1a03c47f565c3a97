"""`keras-darkformer report`."""

import argparse

from keras_darkformer.cli.arguments import add_dtype, add_length, add_text, positive, read_texts

SUMMARY = "show what a conversion changed and lost"
DESCRIPTION = """Shows which layers of a dark model were converted and how, and how far the
attention of each is from softmax on text."""
EXAMPLE = "dark --text held_out.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.add_argument("preset", metavar="DIR", help="The dark model.")
    add_text(parser, "which the model was not fitted to")
    add_length(parser, "Tokens of a row of text")
    help = "Rows to compare (default: %(default)s)."
    parser.add_argument("--rows", type=positive, default=8, metavar="N", help=help)
    add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    texts = read_texts(arguments.text)

    from keras_darkformer.cli.rows import rows_of
    from keras_darkformer.hub.loading import load_dark
    from keras_darkformer.hub.report import conversion_report
    from keras_darkformer.training.report import approximation_report

    model = load_dark(arguments.preset, arguments.dtype)
    rows = rows_of(model, arguments.preset, texts, arguments.length)
    print(conversion_report(model))
    print(approximation_report(model, rows, batch_size=1, max_batches=arguments.rows))
