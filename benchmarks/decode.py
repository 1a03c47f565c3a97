"""Time of one step of generation: from a state and from a key/value cache.

    KERAS_BACKEND=torch python benchmarks/decode.py

One token attends to all before it, at two shapes, by three ways that take
turns in one process:

- state: `dark_attention` with the state of the tokens before;
- cache: `keras.ops.dot_product_attention` over the cache, `(b, s, k, h)`;
- best: the fastest exact attention we know of on this backend over a cache
  that lies as suits it, `(b, k, s, h)`: on torch `scaled_dot_product_attention`
  of what is filled, elsewhere two matrix products. Found on a CPU in float32;
  elsewhere "cache" may be faster.

Both caches are written in place, so a step does not pay for a copy of them,
and queries of a group stand as rows of one matrix. What is timed is attention
alone, a run of consecutive steps at a time; the figures are of one step. The
step from a state folds geometry and projection every time, as the layers do.
Writes benchmarks/results/decode_BACKEND.json.
"""

from common import (
    backend,
    compiled,
    environment,
    interleaved,
    one_thread,
    parser,
    print_table,
    summary,
    write,
)

SHAPES = (
    {"query_heads": 8, "key_value_heads": 8, "head_dim": 64, "num_features": 128},
    {"query_heads": 8, "key_value_heads": 1, "head_dim": 256, "num_features": 256},
)
STATE_TOKENS = (16, 2048, 8192, 32768)
CACHE_TOKENS = STATE_TOKENS[1:]  # of 16 tokens there is nothing to learn


# === From a state ===


def state_run(step, steps, start, parameters):
    """Consecutive steps, always from the same state, which no step changes."""

    def run():
        state = start
        for query, key, value in steps:
            output, state = step(query, key, value, state, *parameters)
        return output, state

    return run


def state_step(query, key, value, state, geometry, projection):
    from keras_darkformer.ops import dark_attention

    return dark_attention(
        query,
        key,
        value,
        geometry,
        projection,
        causal=True,
        initial_state=state,
        return_state=True,
    )


def state_after(key, value, geometry, projection):
    """The state of these tokens, which does not depend on queries."""
    return state_step(key, key, value, None, geometry, projection)[1]


# === From a cache ===


def cache_run(step, steps, caches):
    """Consecutive steps, which write the last positions of the caches; again at each run."""
    first = caches[0].shape[step.axis] - len(steps)
    positions = [position(first + i) for i in range(len(steps))]
    caches = list(caches)

    def run():
        for where, inputs in zip(positions, steps, strict=True):
            output, *caches[:] = step(*inputs, *caches, where)
        return output

    return run


def position(index):
    """As this backend takes it without compiling anew for every position."""
    if backend() == "torch":
        return index
    from keras import ops

    return ops.convert_to_tensor(index, dtype="int32")


def cache(tensor):
    """A cache that steps can change in place."""
    if backend() == "tensorflow":
        import tensorflow as tf

        return tf.Variable(tensor)
    return tensor


def cache_step(attend, axis, compile=False):
    """A step that writes a key and a value into the caches, in place, and attends to them.

    Args:
        attend: function of query, both caches and the position written last.
        axis: int. The caches' axis of positions.
        compile: as for `compiled`.

    Returns:
        A function of query, key, value, both caches and the position that
        returns the output and both caches.
    """
    attend = compiled(attend, compile=compile)
    before = (slice(None),) * axis

    if backend() == "torch":

        def step(query, key, value, keys, values, where):
            keys[(*before, slice(where, where + 1))] = key
            values[(*before, slice(where, where + 1))] = value
            return attend(query, keys, values, where), keys, values

    elif backend() == "tensorflow":
        import tensorflow as tf

        @tf.function  # XLA would copy the variables; what `attend` does it compiles
        def write_and_attend(query, key, value, keys, values, where):
            keys[(*before, slice(where, where + 1))].assign(key)
            values[(*before, slice(where, where + 1))].assign(value)
            return attend(query, keys, values, where)

        def step(query, key, value, keys, values, where):
            return write_and_attend(query, key, value, keys, values, where), keys, values

    else:
        from keras import ops

        def update(keys, values, key, value, where):
            start = [0] * 4
            start[axis] = where
            return ops.slice_update(keys, start, key), ops.slice_update(values, start, value)

        # Compiled together with the attention, XLA's CPU copies the caches
        # whole, though their memory is donated.
        update = compiled(update, donate=(0, 1))

        def step(query, key, value, keys, values, where):
            keys, values = update(keys, values, key, value, where)
            return attend(query, keys, values, where), keys, values

    step.axis = axis
    return step


def keras_attention(query, keys, values, where):
    """Queries `(b, g, k, h)`: those of a group as if they stood one behind another."""
    from keras import ops

    seen = ops.arange(keys.shape[1], dtype="int32") <= where
    return ops.dot_product_attention(query, keys, values, mask=seen[None, None, None, :])


def torch_attention(query, keys, values, where):
    """Queries and caches `(b, k, ., h)`."""
    from torch.nn import functional

    seen = slice(where + 1)
    return functional.scaled_dot_product_attention(query, keys[:, :, seen], values[:, :, seen])


def product_attention(query, keys, values, where):
    """Queries and caches `(b, k, ., h)`; the cache is the left factor, as XLA's CPU is fastest."""
    from keras import ops

    keys, values = ops.convert_to_tensor(keys), ops.convert_to_tensor(values)
    logits = keys @ ops.swapaxes(query * query.shape[-1] ** -0.5, 2, 3)  # (b, k, s, g)
    seen = ops.arange(keys.shape[2], dtype="int32") <= where
    logits = ops.where(seen[:, None], ops.cast(logits, "float32"), -1e30)
    weights = ops.cast(ops.softmax(logits, axis=2), values.dtype)
    return ops.swapaxes(weights, 2, 3) @ values


# === The measurement ===


def measure(shape, args, state_tokens, cache_tokens):
    """Samples of seconds per step: a dict by `(way, tokens)`."""
    import numpy as np
    from keras import ops

    from keras_darkformer.ops import draw_projection

    query_heads, kv_heads = shape["query_heads"], shape["key_value_heads"]
    head_dim, num_features = shape["head_dim"], shape["num_features"]
    rng = np.random.default_rng(0)

    def draw(tokens, heads):
        array = rng.standard_normal((1, tokens, heads, head_dim), dtype="float32")
        return ops.convert_to_tensor(array, dtype=args.dtype)

    def head_first(tensor):
        return ops.transpose(tensor, (0, 2, 1, 3))

    # A geometry at which the features estimate well; time does not depend on it.
    geometry = 0.5 * np.stack([np.eye(head_dim)] * kv_heads)
    projection = draw_projection(num_features, head_dim, seed=0)
    parameters = [ops.convert_to_tensor(x, dtype="float32") for x in (geometry, projection)]

    steps = [
        (draw(1, query_heads), draw(1, kv_heads), draw(1, kv_heads)) for _ in range(args.steps)
    ]
    by_group = [
        (ops.swapaxes(ops.reshape(query, (1, kv_heads, -1, head_dim)), 1, 2), key, value)
        for query, key, value in steps
    ]
    by_head = [tuple(head_first(tensor) for tensor in step) for step in by_group]

    runs = {}
    step = compiled(state_step, compile=args.compile)
    for tokens in state_tokens:
        past = draw(tokens, kv_heads), draw(tokens, kv_heads)
        start = state_after(*past, *parameters)
        runs["state", tokens] = state_run(step, steps, start, parameters)
    best = torch_attention if backend() == "torch" else product_attention
    cache_way = cache_step(keras_attention, axis=1, compile=args.compile)
    best_way = cache_step(best, axis=2)
    for tokens in cache_tokens:
        past = draw(tokens, kv_heads), draw(tokens, kv_heads)
        caches = [cache(ops.copy(head_first(tensor))) for tensor in past]
        runs["best", tokens] = cache_run(best_way, by_head, caches)
        runs["cache", tokens] = cache_run(cache_way, by_group, [cache(x) for x in past])
        same(runs["cache", tokens](), head_first(runs["best", tokens]()), args.dtype)
    return {
        name: [sample / args.steps for sample in samples]
        for name, samples in interleaved(runs, args.repeats, settle=True).items()
    }


def same(first, second, dtype):
    """Two ways to the same output must agree, or one of them is timed doing something else."""
    import numpy as np
    from keras import ops

    first, second = (ops.convert_to_numpy(ops.cast(x, "float32")) for x in (first, second))
    np.testing.assert_allclose(first, second, atol=1e-4 if dtype == "float32" else 2e-2)


def rows_of(shape, samples):
    times = {name: summary(values) for name, values in samples.items()}
    rows = []
    for tokens in sorted({tokens for _, tokens in times}):
        row = {**shape, "tokens": tokens}
        for way in ("state", "cache", "best"):
            if (way, tokens) in times:
                row[way] = times[way, tokens]
                if way != "state":
                    ratio = row[way]["median"] / row["state"]["median"]
                    row[f"{way}_over_state"] = round(ratio, 2)
        rows.append(row)
    return rows


def show(rows):
    def time_of(row, way):
        return f"{row[way]['median']:.3f} ± {row[way]['spread']:.3f}" if way in row else "-"

    print_table(
        ["heads", "h", "m", "tokens", "state", "cache", "best", "cache/state", "best/state"],
        [
            [
                f"{row['query_heads']}/{row['key_value_heads']}",
                row["head_dim"],
                row["num_features"],
                f"{row['tokens']:,}",
                *(time_of(row, way) for way in ("state", "cache", "best")),
                *(row.get(f"{way}_over_state", "-") for way in ("cache", "best")),
            ]
            for row in rows
        ],
    )
    print("milliseconds a step: median ± interquartile range")


def main():
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=30)
    made.add_argument("--steps", type=int, default=16, help="consecutive steps timed as one")
    made.add_argument("--dtype", default="float32", help="of queries, keys, values and caches")
    made.add_argument("--compile", action="store_true", help="torch.compile state and cache")
    args = made.parse_args()
    state_tokens, cache_tokens = STATE_TOKENS, CACHE_TOKENS
    if args.quick:
        args.repeats, args.steps = 3, 4
        state_tokens, cache_tokens = (16, 256, 2048), (256, 2048)

    one_thread()
    rows = []
    for shape in SHAPES:
        rows += rows_of(shape, measure(shape, args, state_tokens, cache_tokens))
    show(rows)
    if not args.quick:
        settings = {"repeats": args.repeats, "steps": args.steps, "dtype": args.dtype}
        settings |= {"compiled": args.compile or backend() != "torch"}
        payload = {"rows": rows, "unit": "ms", **settings, **environment()}
        write("decode", payload, "compile" if args.compile else "")


if __name__ == "__main__":
    main()
