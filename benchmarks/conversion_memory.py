"""Peak memory of converting a model of 200 million parameters, in place and from a preset.

    KERAS_BACKEND=torch python benchmarks/conversion_memory.py

A process for each figure: it notes its resident memory, makes or loads a Gemma
in float32, and converts it. Writes results/conversion_memory_BACKEND.json:
what the model takes, the peak until it is converted, and their ratio; from a
preset, the peaks of loading it dark and of loading it stock.
"""

import statistics
import tempfile

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
from models import gemma

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


def measure(part, folder, sizes):
    """Bytes: of the weights, and peaks above what the process had before the model."""
    import keras_hub

    from keras_darkformer import convert_to_dark, hub

    if part == "save":
        return gemma(**sizes).save_to_preset(folder)
    convert_to_dark(gemma(**TINY))
    reset_peak()
    before = peak()
    if part == "convert":
        model = gemma(**sizes)
        reset_peak()
        taken = peak() - before  # building had its own peak; what stays is the model
        reset_peak()
        convert_to_dark(model)
        return {
            "parameters": model.count_params(),
            "model": taken,
            "peak": peak() - before,
        }
    if part == "stock":
        keras_hub.models.GemmaCausalLM.from_preset(folder, preprocessor=None)
    else:
        hub.DarkGemmaCausalLM.from_preset(folder, preprocessor=None)
    return {"peak": peak() - before}


def main():
    args = parser(__doc__).parse_args()
    sizes = TINY if args.quick else SIZES
    if args.measure:
        answer(measure(*args.measure, sizes))
        return
    rows = {"convert": [], "stock": [], "dark": []}
    with tempfile.TemporaryDirectory() as folder:
        in_process("save", folder)
        for _ in range(1 if args.quick else REPEATS):
            for part, found in rows.items():
                found.append(in_process(part, folder))
    median = {
        part: {name: statistics.median(row[name] for row in found) for name in found[0]}
        for part, found in rows.items()
    }
    in_place = median["convert"]["peak"] / max(1, median["convert"]["model"])
    from_preset = median["dark"]["peak"] / max(1, median["stock"]["peak"])
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
    if not args.quick:
        payload = {
            "sizes": SIZES,
            "rows": rows,
            "in_place_over_model": round(in_place, 3),
            "from_preset_over_stock": round(from_preset, 3),
            **environment("keras-hub"),
        }
        write("conversion_memory", payload)


if __name__ == "__main__":
    main()
