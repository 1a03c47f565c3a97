"""The tables made of what study.py and study_variance.py found.

Each function of the tables takes the words behind its name in a page's mark and returns Markdown.
"""

import numpy as np
from formats import load, mean_and_range, table, unique

RESAMPLES = 2_000
REGIMES = {"scratch": "from scratch", "all": "all weights", "qkv": "q, k, v"}
NUM_FEATURES = {"h64": 64, "h256": 256, "SmolLM2": 128}  # of what is told by arm


def runs(**wanted):
    """Those runs, in the order of the plan."""
    wanted = {"guarded": True, "shape": "h64", "teacher": 0} | wanted
    order = ["exact", "DARKFormer", "Performer", "learned features", "uniform", "calibrated"]

    def place(run):
        first = run["arm"].split(",")[0]
        return order.index(first), run["arm"], run["num_features"]

    found = [x for x in load("study")["runs"] if all(x[k] == v for k, v in wanted.items())]
    return sorted(found, key=place)


def run_of(arm, **wanted):
    found = runs(arm=arm, **wanted)
    if len(found) != 1:
        raise ValueError(f"there are {len(found)} runs of {arm!r} with {wanted}")
    return found[0]


# === The share of the gap that an arm closes ===


def share(run, key="losses"):
    """`R = 1 - (arm - exact) / (Performer - exact)`, and the bounds of its 95 % interval.

    Bootstrapped over the windows of the test text, which are the same for all arms, and over the
    seeds of each. `None` where the interval of Performer - exact holds zero.
    """
    same = {name: run[name] for name in ("regime", "shape", "guarded", "teacher")}
    size = {"num_features": run["num_features"]}
    exact = run_of("exact", **same)
    arms = [exact, run_of("Performer", **same | size), run]
    losses = [np.array(arm[key]) for arm in arms]
    rng = np.random.default_rng(0)
    found, gaps = [], []
    for _ in range(RESAMPLES):
        windows = rng.integers(0, losses[0].shape[1], losses[0].shape[1])
        means = []
        for of_arm in losses:
            seeds = rng.integers(0, len(of_arm), len(of_arm))
            means.append(of_arm[seeds][:, windows].mean())
        gaps.append(means[1] - means[0])
        found.append(1 - (means[2] - means[0]) / gaps[-1])
    low, high = np.quantile(gaps, (0.025, 0.975))
    if low <= 0 <= high:
        return None
    means = [of_arm.mean() for of_arm in losses]
    point = 1 - (means[2] - means[0]) / (means[1] - means[0])
    return point, *np.quantile(found, (0.025, 0.975))


def told(found):
    if found is None:
        return "withheld"
    point, low, high = (f"{100 * x:.0f}" for x in found)
    return f"{point} % ({low} to {high})"


def of_seeds(values):
    """Mean and range."""
    return mean_and_range((np.mean(values), np.min(values), np.max(values)), 3)


# === Tables ===


def study(regime, shape="h64"):
    """Every arm of a way of training, at its best rate."""
    lines = []
    for run in runs(regime=REGIMES[regime], shape=shape, num_features=NUM_FEATURES[shape]):
        best, is_arm = run["best"], run["arm"] not in ("exact", "Performer")
        shares = [told(share(run, key)) for key in ("losses", "accuracies")] if is_arm else ["", ""]
        accuracy = f"{100 * np.mean(run['accuracy'][best]):.1f} %"
        rate = f"{run['rates'][best]:g}"
        lines.append([run["arm"], of_seeds(run["loss"][best]), accuracy, *shares, rate])
    columns = ["arm", "loss", "accuracy", "R of the loss", "R of the accuracy", "rate"]
    return table(columns, lines)


def features(regime):
    """R of the loss, by the number of features and the exact model that runs start from."""
    wanted = {"regime": REGIMES[regime]}
    columns = [
        {"teacher": teacher, "num_features": run["num_features"]}
        for teacher in (0, 1)
        for run in runs(arm="DARKFormer", teacher=teacher, **wanted)
    ]
    exact = [run_of("exact", teacher=column["teacher"], **wanted) for column in columns]
    lines = [["exact", *(of_seeds(run["loss"][run["best"]]) for run in exact)]]
    for arm in ("Performer", "DARKFormer", "calibrated"):
        cells = []
        for column in columns:
            found = runs(arm=arm, **wanted, **column)
            loss = of_seeds(found[0]["loss"][found[0]["best"]]) if found else ""
            closes = f"<br>{told(share(found[0]))}" if found and arm != "Performer" else ""
            cells.append(loss + closes)
        lines.append([arm, *cells])
    names = (f"m = {x['num_features']}{', another model' * x['teacher']}" for x in columns)
    return table(["arm", *names], lines)


def stability(guarded, shape="h64"):
    """Runs that failed, spikes, and how many rates do: with warm-up and clipping or without."""
    lines = []
    for regime in REGIMES.values():
        wanted = {"regime": regime, "guarded": guarded == "guarded", "shape": shape}
        wanted["num_features"] = NUM_FEATURES[shape]
        kept = runs(**wanted)
        if not kept:
            continue
        trains = trained_rates(run_of("exact", **wanted))
        for run in kept:
            loss = np.array(run["loss"], "float64").mean(axis=1)
            near = int((loss <= np.nanmin(loss) + 0.2).sum())
            spikes = 1000 * np.array(run["spikes"])[trains].mean() / run["steps"]
            failed = f"{np.sum(has_failed(run))} of {np.size(run['loss'])}"
            above = f"{1000 * np.array(run['spikes']).mean() / run['steps']:.1f}"
            cells = [failed, f"{spikes:.1f}", above, f"{near} of {len(run['rates'])}"]
            lines.append([regime, run["arm"], *cells])
    columns = ["trained", "arm", "failed", "spikes, stable rates", "spikes, all rates"]
    return table([*columns, "rates within 0.2"], lines, words=2)


def has_failed(run):
    """By rate and seed, whether a run ended knowing nothing but how frequent tokens are."""
    loss = np.array(run["loss"], "float64")
    return ~(loss < load("study")["settings"]["loss_of_frequencies"] - 0.05)


def trained_rates(exact):
    """Places of the rates at which no run of exact attention failed."""
    return np.flatnonzero(~has_failed(exact).any(axis=1))


def variance():
    """Medians over heads of the relative variance of one feature, in powers of ten."""
    results = load("study_variance")["heads"]
    ways = unique(way for heads in results.values() for head in heads for way in head)
    ways = ["theorem 3.2" if way == "largest eigenvalue" else way for way in ways]
    lines = []
    for way in unique(["isotropic", "theorem 3.2", *ways]):
        cells = []
        for heads in results.values():
            found = np.array([head[way] for head in heads if way in head])
            cells.append(f"{len(found)} of {len(heads)}")
            formula, drawn = np.median(found, axis=0) if len(found) else ("", "")
            cells.append(f"{formula:.1f}" if len(found) else "")
            # Drawn features that give the kernel none of its mean have missed it.
            cells.append(("missed" if drawn < 0 else f"{drawn:.1f}") if len(found) else "")
        lines.append([way, *cells])
    columns = [
        f"{name}: {what}" for name in results for what in ("heads", "by the formula", "drawn")
    ]
    return table(["w drawn from", *columns], lines)
