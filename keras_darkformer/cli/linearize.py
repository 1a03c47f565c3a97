"""`keras-darkformer linearize`."""

import argparse
import importlib.util
import shutil
from pathlib import Path
from typing import Any

from keras_darkformer.cli.arguments import (
    add_dtype,
    add_length,
    add_options,
    add_text,
    minutes,
    not_negative,
    options_given,
    positive,
    read_texts,
)
from keras_darkformer.options import LINEARIZED

SUMMARY = "convert a model, fit it to text, and save it"
DESCRIPTION = """Converts a model to linear-time attention, trains it on text to do what it did
before, and saves it as a preset. The last tenth of the text is held out to judge by.
If the command is killed at any point, the same command continues from there."""
EXAMPLE = "qwen2.5_0.5b_en --text book.txt --output dark --keep-exact 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add = parser.add_argument
    add("preset", metavar="PRESET", help="The stock model.")
    add_text(parser, "to learn from and to judge by")
    add("--output", required=True, metavar="DIR", help="Folder of the new preset; new or empty.")
    help = "Layers of a causal LM to leave exact; a probe finds which (default: %(default)s)."
    add("--keep-exact", type=not_negative, default=0, metavar="N", help=help)
    spent = parser.add_mutually_exclusive_group()
    help = "About how long it may take."
    spent.add_argument("--minutes", type=minutes, metavar="M", help=help)
    help = "How many tokens it may read (default: 150,000, unless minutes are given)."
    spent.add_argument("--tokens", type=positive, metavar="N", help=help)
    add_length(parser, "Tokens of a row of text")
    help = "Rows of a training step (default: %(default)s)."
    add("--batch-size", type=positive, default=1, metavar="N", help=help)
    help = "Folder for its progress (default: OUTPUT.work, deleted at the end)."
    add("--work-dir", metavar="DIR", help=help)
    add_dtype(parser)
    add_options(parser)
    given = ", ".join(f"{name.replace('_', '-')} {x}" for name, x in LINEARIZED.items())
    parser.epilog = f"Without any such option a causal LM gets\n{given}.\n\n{parser.epilog}"


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    output = Path(arguments.output)
    work = Path(arguments.work_dir or f"{output}.work")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{str(output)!r} is there already; name a new or empty folder.")
    if work.exists() and not (work.is_dir() and (_is_run(work) or not any(work.iterdir()))):
        raise ValueError(f"{str(work)!r} holds something other than a run of this command.")
    options, texts = options_given(arguments), read_texts(arguments.text)

    from keras_darkformer.cli.rows import rows_of
    from keras_darkformer.hub.loading import load_stock
    from keras_darkformer.linearizing import linearize

    model = load_stock(arguments.preset, arguments.dtype)
    model, report = linearize(
        model,
        rows_of(model, arguments.preset, texts, arguments.length),
        keep_exact=arguments.keep_exact,
        tokens=arguments.tokens,
        minutes=arguments.minutes,
        length=arguments.length,
        batch_size=arguments.batch_size,
        work_dir=work,
        description=", ".join(Path(path).name for path in arguments.text),
        **options,
    )
    print(report)
    preset = _save(model, arguments, report, work / "preset")
    # Moved in one step, so that OUTPUT is complete or not there.
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        output.rmdir()
    shutil.move(preset, output)
    if arguments.work_dir is None:
        shutil.rmtree(work)
    print(f"saved as {str(output)!r}")


def _is_run(work: Path) -> bool:
    return any(work.glob("run.json*"))


def _save(model: Any, arguments: argparse.Namespace, report: Any, preset: Path) -> Path:
    """Saves the model, its preprocessor and a plot of the report."""
    from keras_darkformer.hub.loading import load_text_preprocessor

    shutil.rmtree(preset, ignore_errors=True)  # of a run that was killed here
    model.save_to_preset(preset)
    if not hasattr(model, "preprocessor"):  # a backbone
        preprocessor = load_text_preprocessor(arguments.preset, arguments.length)
        preprocessor.save_to_preset(preset)
    if importlib.util.find_spec("matplotlib"):
        report.plot(preset / "linearization.png")
    return preset
