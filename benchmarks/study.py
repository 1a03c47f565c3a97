"""The paper's experiments: does a learned covariance close the gap to exact attention?

    KERAS_BACKEND=jax python benchmarks/study.py --text book.txt --other another.txt

A small Gemma is trained on the one text (`teacher.py`). Then every arm (`study_arms.py`) is trained
in three ways on the other: from scratch, in all its weights from the trained model's, and in its
projections of queries, keys and values alone. Every arm gets the same steps, batches, seeds and
rates; its rate is the one of the least mean loss on the validation part, and figures are of the
test part. All rates and seeds of an arm train side by side (`study_training.py`), so what each rate
does to training is seen too.

Runs are written to WORK one by one, those of SmolLM2 rate by rate, and not made again; all that are
there go into results/study.json, in place of what it held of the same ones. On a GPU a run takes a
minute; on a CPU one rate with one seed takes a few, so name what is wanted: `--list` shows the
names of all runs, `--runs`, `--rates` and `--seeds` choose. Runs that finetune a small Gemma belong
to the one trained in WORK: keep it, or make all of its shape anew.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import time
from typing import NamedTuple

import common

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RATES_OF_SMOLLM2 = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
RATES_OF_CURVE = (1e-3, 3e-3, 1e-2)  # the middle one was the best of these arms for m up to 128
# Numbers of features, beside that of the shape, and those that start from another exact model.
COUNTS = {"DARKFormer": (16, 32, 128), "Performer": (16, 32, 128), "calibrated": (16, 32)}
MORE_COUNTS = (128, 256)
PARTS = ("validation", "test")


class Run(NamedTuple):
    """What is trained: one arm at all rates and seeds; `teacher` is the seed of the exact model."""

    regime: str
    arm: str
    shape: str = "h64"
    num_features: int = 64
    guarded: bool = True
    teacher: int = 0

    @property
    def name(self):
        words = [self.shape, str(self.num_features), self.regime, self.arm]
        words += [] if self.guarded else ["bare"]
        words += [f"teacher {self.teacher}"] if self.teacher else []
        return "-".join(words).replace(", ", "_").replace(" ", "_")


def plan():
    """Every run, the most wanted first."""
    from study_arms import ARMS, REGIMES, SMOLLM2

    few = ("exact", "DARKFormer", "Performer", "learned features", "calibrated")
    found = [Run(regime, arm) for regime in reversed(REGIMES) for arm in ARMS]
    found += [Run(regime, arm, guarded=False) for regime in REGIMES[:2] for arm in few]
    found += [Run("q, k, v", arm, "h64", m) for arm, counts in COUNTS.items() for m in counts]
    found += [Run(regime, arm, "h256", 256) for regime in reversed(REGIMES) for arm in few]
    found += [Run(regime, arm, SMOLLM2, 128) for regime in reversed(REGIMES[1:]) for arm in few]
    found.append(Run("q, k, v", "exact", teacher=1))
    found += [Run("q, k, v", arm, "h64", m, teacher=1) for m in MORE_COUNTS for arm in COUNTS]
    return found


def spikes(losses):
    """How many of a training's losses jump, as `LossSpikeCounter` counts them."""
    from keras_darkformer import LossSpikeCounter

    counter = LossSpikeCounter()
    for loss in losses:
        counter.on_epoch_begin(0)  # or losses would be means since one began
        counter.on_train_batch_end(0, {"loss": loss})
    return len(counter.spikes)


def of_frequencies(tokens, windows):
    """The loss of a model that knows how frequent tokens are, and nothing else."""
    import numpy as np
    from teacher import VOCABULARY

    counts = 1 + np.bincount(tokens, minlength=VOCABULARY)
    return float(-np.log(counts / counts.sum())[windows[:, 1:]].mean())


def rounded(array):
    import numpy as np

    return np.where(np.isfinite(array), np.round(array.astype("float64"), 4), None).tolist()


def make(run, args):
    """Trains and judges one run; returns what is written, with the environment of its best rate."""
    import keras
    import numpy as np
    import teacher
    from models import only_trainable
    from study_arms import SMOLLM2, Maker, is_redrawn
    from study_training import Recipe, Replicas

    tokens = args.tokens[vocabulary_of(run)]
    rates = args.rates or rates_of(run)
    maker = Maker(run, args.presets.get((run.shape, run.teacher)), tokens["train"])
    recipe = Recipe(
        steps=args.scratch_steps if run.regime == "from scratch" else args.steps,
        batch_size=2 if run.shape == SMOLLM2 else 8,
        guarded=run.guarded,
    )
    weights = []
    for seed in args.seeds:
        model = maker.model(seed)
        with only_trainable(model, maker.trained(model)):
            weights.append(maker.weights(model))
    with only_trainable(model, maker.trained(model)):
        replicas = Replicas(model, weights, recipe)

        def redraw(steps):
            by_seed = [maker.draws(model, 1000 * steps + seed) for seed in args.seeds]
            for place in by_seed[0]:
                replicas.replace(place, [draws[place] for draws in by_seed])

        count = recipe.steps * recipe.batch_size
        windows = [
            teacher.text_windows(tokens["train"], count, teacher.LENGTH, seed)
            for seed in args.seeds
        ]

        def trained(rates):
            started = time.perf_counter()
            replicas.begin(rates)
            found = {"curves": replicas.train(windows, redraw if is_redrawn(run.arm) else None)}
            for part in PARTS:
                judged = replicas.judge(held_out(tokens[part], args))
                found |= dict(zip((f"{part} losses", f"{part} accuracies"), judged, strict=True))
            made_on = json.dumps(common.environment("keras-hub"))
            return found | {
                "seconds": np.array([time.perf_counter() - started]),
                "environments": np.array([made_on] * len(rates)),  # rates are kept by themselves
            }

        if run.shape == SMOLLM2:  # one rate fits in memory, and takes long
            folder = args.work / run.name
            found = [
                kept(folder / f"{rate}.npz", lambda rate=rate: trained([rate])) for rate in rates
            ]
        else:
            found = [trained(rates)]
    # Of replicas: the second axis of curves, the first of what is judged.
    found = {
        name: np.concatenate([some[name] for some in found], axis=int(name == "curves"))
        for name in found[0]
    }
    shape = (len(rates), len(args.seeds), -1)
    by_rate = found["validation losses"].reshape(shape).mean((1, 2))
    best = int(np.argmin(np.where(np.isfinite(by_rate), by_rate, np.inf)))
    found_spikes = [spikes(curve) for curve in found["curves"].T]
    curves = rounded(found["curves"].T)
    keras.backend.clear_session()
    return {
        **run._asdict(),
        "rates": list(rates),
        "steps": recipe.steps,
        "seconds": round(float(found["seconds"].sum()), 1),
        "environment": json.loads(str(found["environments"][best])),
        "best": best,
        "validation": rounded(found["validation losses"].mean(-1).reshape(shape[:2])),
        "loss": rounded(found["test losses"].mean(-1).reshape(shape[:2])),
        "accuracy": rounded(found["test accuracies"].mean(-1).reshape(shape[:2])),
        "spikes": np.reshape(found_spikes, shape[:2]).tolist(),
        # At the best rate, by seed: losses and accuracies by window, and the curve.
        "losses": rounded(found["test losses"].reshape(shape)[best]),
        "accuracies": rounded(found["test accuracies"].reshape(shape)[best]),
        "curves": [curves[best * shape[1] + seed][::10] for seed in range(shape[1])],
    }


def kept(path, make):
    """Arrays by name, made once: a run that was cut off goes on behind its last rate."""
    import numpy as np

    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez(file, **make())
        part.rename(path)
    return dict(np.load(path))


def held_out(tokens, args):
    import teacher

    return teacher.text_windows(tokens, args.test_windows, teacher.LENGTH, 7)


def rates_of(run):
    from study_arms import SMOLLM2

    if run.shape == SMOLLM2:
        return RATES_OF_SMOLLM2
    return RATES_OF_CURVE if run.teacher else RATES


def vocabulary_of(run):
    """By what its tokens are known: the small models share theirs."""
    from study_arms import SMOLLM2

    return SMOLLM2 if run.shape == SMOLLM2 else "small"


def settle(args):
    """Reads the texts and makes the trained models, once for all runs."""
    import numpy as np
    import teacher
    from study_arms import SMOLLM2

    parts, other = teacher.parts_of(args.text), teacher.parts_of(args.other)
    encode = teacher.encoder_of(parts)
    args.tokens = {name: encode(part) for name, part in parts.items()}
    args.presets = {
        (shape, seed): teacher.teacher(args, shape, seed=seed)
        for shape, seed in {(run.shape, run.teacher) for run in args.runs}
        if shape != SMOLLM2
    }
    args.tokens = {"small": {name: encode(part) for name, part in other.items()}}
    if any(run.shape == SMOLLM2 for run in args.runs):
        from pretrained import smollm2

        ids = smollm2()[1]
        args.tokens[SMOLLM2] = {
            name: np.concatenate([np.array(ids.encode(x).ids, "int32") for x in part])
            for name, part in other.items()
        }


def run_one(run, args):
    path = args.work / f"{run.name}.json"
    found = make(run, args)
    path.write_text(json.dumps(found))
    best = found["loss"][found["best"]]
    return f"{run.name}: {found['seconds']} s, loss {best}, rate {found['rates'][found['best']]}"


def collect(args):
    """What is there, into one file, beside what that holds of other runs."""
    small = args.tokens["small"]
    settings = {
        "seeds": list(args.seeds),
        "test_windows": args.test_windows,
        "loss_of_frequencies": of_frequencies(small["train"], held_out(small["test"], args)),
        "text": pathlib.Path(args.text).name,
        "other": pathlib.Path(args.other).name,
    }
    runs = {path.stem: json.loads(path.read_text()) for path in args.work.glob("*.json")}
    if args.output.exists():
        before = json.loads(args.output.read_text())
        if before["settings"] != settings:
            raise SystemExit(
                f"{args.output} has other settings, {before['settings']}: move it away"
            )
        for run in before["runs"]:
            run["environment"] = before["environments"][run["environment"]]
            runs.setdefault(Run(*(run[name] for name in Run._fields)).name, run)
    runs = [run for _, run in sorted(runs.items())]
    environments = []
    for run in runs:
        if run["environment"] not in environments:
            environments.append(run["environment"])
        run["environment"] = environments.index(run["environment"])
    payload = {"environments": environments, "settings": settings, "runs": runs}
    common.write_json(args.output, payload)


def parse_arguments():
    made = common.parser(__doc__)
    made.add_argument("--text", required=True, help="a text file, to train the exact model on")
    made.add_argument("--other", required=True, help="another, to finetune on and to judge by")
    made.add_argument("--work", type=pathlib.Path, default=pathlib.Path("results/study"))
    made.add_argument("--output", type=pathlib.Path, default=common.RESULTS / "study.json")
    made.add_argument("--runs", nargs="*", help="by name; default: all")
    made.add_argument("--rates", nargs="*", type=float, help="default: by the model")
    made.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    made.add_argument("--steps", type=int, default=200, help="of finetuning")
    made.add_argument("--scratch-steps", type=int, default=400)
    made.add_argument("--test-windows", type=int, default=64)
    made.add_argument("--workers", type=int, default=1, help="processes")
    made.add_argument("--list", action="store_true", help="the names of the runs")
    args = made.parse_args()
    args.train_steps, args.repeat_steps = 1800, 900
    if args.quick:
        args.rates, args.seeds, args.steps, args.scratch_steps = [1e-3, 1e-2], [0, 1], 4, 4
        args.train_steps = args.repeat_steps = 2
        args.test_windows = 8
        args.work = args.work / "quick"
        args.output = args.work / "out" / "study.json"
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main():
    args = parse_arguments()
    runs = plan()
    if args.list:
        print(*(run.name for run in runs), sep="\n")
        return
    if args.runs:
        runs = [run for run in runs if run.name in args.runs]
    args.runs = [run for run in runs if not (args.work / f"{run.name}.json").exists()]
    settle(args)
    if args.workers == 1:
        for run in args.runs:
            print(run_one(run, args), flush=True)
    else:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.workers, context) as pool:
            done = [pool.submit(run_one, run, args) for run in args.runs]
            for future in concurrent.futures.as_completed(done):
                print(future.exception() or future.result(), flush=True)
    collect(args)


if __name__ == "__main__":
    main()
