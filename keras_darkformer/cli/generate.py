"""`keras-darkformer generate`."""

import argparse

from keras_darkformer.cli.arguments import add_dtype, not_negative, positive

SUMMARY = "write text"
DESCRIPTION = "Writes text that follows a prompt, with a stock or a dark causal LM."
EXAMPLE = 'dark --prompt "Call me Ishmael." --max-length 200 --sampler top_p --seed 1'
SAMPLERS = ("greedy", "top_k", "top_p", "random", "beam", "contrastive")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    add = parser.add_argument
    add("preset", metavar="PRESET", help="The model: a folder or any other preset.")
    add("--prompt", required=True, metavar="TEXT", help="What the text begins with.")
    help = "Tokens of the text, including the prompt (default: %(default)s)."
    add("--max-length", type=positive, default=256, metavar="N", help=help)
    help = "How the next token is picked (default: %(default)s)."
    add("--sampler", choices=SAMPLERS, default="greedy", help=help)
    help = "Seed of the samplers that draw (default: a new one each time)."
    add("--seed", type=not_negative, metavar="N", help=help)
    add_dtype(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    import keras

    from keras_darkformer.hub.loading import load_causal_lm

    model = load_causal_lm(arguments.preset, arguments.dtype)
    if arguments.seed is not None:
        keras.utils.set_random_seed(arguments.seed)
    model.compile(sampler=arguments.sampler)
    print(model.generate(arguments.prompt, max_length=arguments.max_length))
