"""Reading a long prompt into a state, in pieces and at once, beside a plain forward pass.

    KERAS_BACKEND=torch python benchmarks/prefill.py

`hub.Stream.read` reads in pieces of `prefill_size` tokens; the forward pass is that of the same
dark backbone, through `predict_on_batch`. Models have random weights: the small Gemma, and three
layers as SmolLM2-135M has thirty. All ways take turns on one thread; peak memory, above what was in
use before, comes from a process for each. Writes results/prefill_BACKEND.json.
"""

from common import (
    PASSES,
    answer,
    environment,
    in_process,
    interleaved,
    one_thread,
    parser,
    peak,
    print_table,
    reset_peak,
    summary,
    write,
)
from models import gemma

LENGTH = 8192
PIECES = (512, 1024, 2048, 4096, 8192)
FORWARD = PASSES[0]
OF_SMOLLM2 = {
    "vocabulary_size": 1024,  # 49,152 in the real one; logits are those of one token
    "num_layers": 3,
    "num_query_heads": 9,
    "num_key_value_heads": 3,
    "hidden_dim": 576,
    "intermediate_dim": 1536,
}


def llama(**sizes):
    import keras_hub

    backbone = keras_hub.models.LlamaBackbone(**OF_SMOLLM2 | sizes)
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


MODELS = {"small Gemma": gemma, "3 layers of 135M": llama}


def ways_of(name, length, names):
    """Functions without arguments, by the tokens of a piece and `FORWARD`, of one dark model."""
    import numpy as np

    import keras_darkformer as kd

    model = kd.convert_to_dark(MODELS[name](), num_features=64)
    tokens = np.random.default_rng(0).integers(1, 1024, (1, length)).astype("int32")
    batch = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}

    def read(size):
        model.prefill_size = size
        return kd.hub.Stream(model).read(tokens)

    def forward():
        return model.backbone.predict_on_batch(batch)

    keeps = kd.hub.Stream(model)  # what is compiled, from one call to the next
    made = {str(size): lambda size=size: read(size) for size in PIECES}
    ways = {FORWARD: forward} | made
    return keeps, {way: ways[way] for way in names}


def memory_of(name, way, length):
    """Peak bytes of a second call, above what was in use before it."""
    _, ways = ways_of(name, length, [way])
    ways[way]()
    reset_peak()
    before = peak()
    ways[way]()
    return peak() - before


def row_of(name, args):
    names = [FORWARD, *(str(size) for size in PIECES if size <= args.length)]
    _, ways = ways_of(name, args.length, names)
    samples = interleaved(ways, args.repeats, warmups=1)
    times = {way: summary(values) for way, values in samples.items()}
    forward = times[FORWARD]["median"]
    return {
        "model": name,
        "times": times,
        "ratios": {way: round(time["median"] / forward, 3) for way, time in times.items()},
        "mib": {way: round(in_process(name, way, args.length) / 2**20, 1) for way in names},
    }


def main():
    args = parser(__doc__).parse_args()
    args.length, args.repeats = (1024, 2) if args.quick else (LENGTH, 9)
    one_thread()
    if args.measure:
        name, way, length = args.measure
        answer(memory_of(name, way, int(length)))
        return
    rows = [row_of(name, args) for name in MODELS]
    for row in rows:
        lines = [
            [way, row["times"][way], row["ratios"][way], row["mib"][way]] for way in row["mib"]
        ]
        print(row["model"])
        print_table(["piece", "ms", "over a forward pass", "MiB"], lines)
    if not args.quick:
        payload = {"length": LENGTH, "unit": "ms, median and interquartile range", "rows": rows}
        write("prefill", payload | environment("keras-hub"))


if __name__ == "__main__":
    main()
