"""Reads the command line, and reports errors in one line."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from keras_darkformer.cli import compare, generate, linearize, report

COMMANDS = (linearize, report, generate, compare)
NAME = "keras-darkformer"
DESCRIPTION = "Gives KerasHub models linear-time attention, and reports what they lose."
EPILOG = f"""PRESET is what `from_preset` of KerasHub takes: a built-in name, kaggle://...,
hf://USER/MODEL, or a folder in KerasHub's or Hugging Face's layout. The environment
variable KERAS_BACKEND chooses tensorflow, jax or torch.

example:
  export KERAS_BACKEND=torch
  {NAME} linearize {linearize.EXAMPLE}
  {NAME} generate dark --prompt "Call me Ishmael."

`{NAME} COMMAND --help` describes each command."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and exit with status 1 like all others."""

    def error(self, message: str) -> NoReturn:
        """Ends the program."""
        self.exit(1, f"{self.prog}: {message}\n")


def parser() -> Parser:
    """The parser of the whole command."""
    formatter = argparse.RawDescriptionHelpFormatter
    whole = Parser(NAME, description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        one = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=f"example:\n  {NAME} {name} {module.EXAMPLE}",
            formatter_class=formatter,
        )
        module.add_arguments(one)
        one.add_argument("--debug", action="store_true", help="Show where an error came from.")
        one.set_defaults(run=module.run)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments after the command's name; `None` for those of this process.

    Returns:
        The exit status: 0; 1 for an error, which is one line on stderr; 130 if interrupted.
    """
    arguments = parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # so TensorFlow says less on stderr
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    # What the package raises for bad input, and the system for files and the network.
    except (ImportError, OSError, ValueError) as error:
        if arguments.debug:
            raise
        print(f"{NAME}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
