"""Peak memory of converting a model of 200 million parameters, in place and from a preset.

    KERAS_BACKEND=torch python benchmarks/conversion_memory.py

A process for each figure: it notes its resident memory, makes or loads a Gemma
in float32, and converts it. Writes results/conversion_memory_BACKEND.json:
what the model takes, the peak until it is converted, and their ratio; from a
preset, the peaks of loading it dark and of loading it stock.
"""

import argparse
import json
import statistics
import tempfile

from common import backend, environment, in_process, peak, print_table, reset_peak, write

SIZES = {
    "vocabulary_size": 16_384,
    "num_layers": 12,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "hidden_dim": 1024,
    "intermediate_dim": 8192,
    "head_dim": 128,
}
# Small: imports and first calls are done when the measurement begins.
TINY = SIZES | {"vocabulary_size": 64, "num_layers": 1, "hidden_dim": 16, "intermediate_dim": 32}
REPEATS = 3


def build(sizes):
    from keras_hub.models import GemmaBackbone, GemmaCausalLM

    return GemmaCausalLM(GemmaBackbone(**sizes))


def measure(part, folder):
    """Bytes: of the weights, and peaks above what the process had before the model."""
    import keras_hub

    import keras_darkformer as kd

    kd.convert_to_dark(build(TINY))
    reset_peak()
    before = peak()
    if part == "convert":
        model = build(SIZES)
        reset_peak()
        taken = peak() - before  # building had its own peak; what stays is the model
        reset_peak()
        kd.convert_to_dark(model)
        return {
            "parameters": model.count_params(),
            "model": taken,
            "peak": peak() - before,
        }
    if part == "stock":
        keras_hub.models.GemmaCausalLM.from_preset(folder, preprocessor=None)
    else:
        kd.hub.DarkGemmaCausalLM.from_preset(folder, preprocessor=None)
    return {"peak": peak() - before}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("convert", "stock", "dark", "save"))
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.part == "save":
        build(SIZES).save_to_preset(args.folder)
        print("{}")
        return
    if args.part:
        print(json.dumps(measure(args.part, args.folder)))
        return
    rows = {"convert": [], "stock": [], "dark": []}
    with tempfile.TemporaryDirectory() as folder:
        in_process(["--part", "save", "--folder", folder])
        for _ in range(REPEATS):
            for part, found in rows.items():
                found.append(in_process(["--part", part, "--folder", folder]))
    median = {
        part: {name: statistics.median(row[name] for row in found) for name in found[0]}
        for part, found in rows.items()
    }
    in_place = median["convert"]["peak"] / median["convert"]["model"]
    from_preset = median["dark"]["peak"] / median["stock"]["peak"]
    write(
        "conversion_memory",
        {
            "environment": environment("keras-hub"),
            "sizes": SIZES,
            "rows": rows,
            "in_place_over_model": round(in_place, 3),
            "from_preset_over_stock": round(from_preset, 3),
        },
    )
    print_table(
        ("backend", "parameters", "in place / model", "from preset / stock from preset"),
        [
            (
                backend(),
                f"{median['convert']['parameters']:,}",
                f"{in_place:.3f}",
                f"{from_preset:.3f}",
            )
        ],
    )


if __name__ == "__main__":
    main()
