"""What works with which KerasHub family on which backend: tries it.

    KERAS_BACKEND=torch python benchmarks/compatibility.py
    KERAS_BACKEND=torch python benchmarks/compatibility.py --families Llama --checks beam export

Runs the checks of tests/hub/family_checks.py, of which the tests run a part, on
tiny models of random weights of every family, and of models of a user's own.
Writes results/compatibility_BACKEND.json; `tables.py` fills the tables in
docs/compatibility.md from those of all backends.
"""

import argparse
import json
import sys
import time

import keras
from common import BENCHMARKS, RESULTS, backend, environment, write

sys.path.insert(0, str(BENCHMARKS.parent / "tests"))
from hub.family_checks import CHECKS, Case, outcome
from hub.models import OWN

from keras_darkformer.hub.families import FAMILIES, TOWERS

# By the table that they are in.
KINDS = {"families": FAMILIES, "towers": TOWERS, "layers": OWN.values()}
BY_NAME = {family.name: family for kind in KINDS.values() for family in kind}
# What users have no question about: the tests ask it, and a table would have no news of it.
INNER = {"kernel = reference", "paths and report", "recurrent = parallel", "stock preset"}
CHECKED = [check for check in CHECKS if check not in INNER]


def in_order(found):
    """The outcomes of a family, those of checks that are asked no more at the end."""
    return {name: found[name] for name in [*CHECKS, *found] if name in found}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", default=list(BY_NAME), choices=list(BY_NAME))
    parser.add_argument("--checks", nargs="*", default=CHECKED, choices=CHECKED)
    args = parser.parse_args()
    path = RESULTS / f"compatibility_{backend()}.json"
    before = json.loads(path.read_text("utf-8"))["outcomes"] if path.exists() else {}
    before = {name: found for kind in before.values() for name, found in kind.items()}
    if backend() == "jax":  # compiling takes longer than running models this small
        import jax

        jax.config.update("jax_disable_most_optimizations", True)
    for name in args.families:
        started, case = time.perf_counter(), Case(BY_NAME[name])
        found = before.setdefault(name, {})
        for check in args.checks:
            keras.utils.set_random_seed(0)
            status, reason = found[check] = outcome(case, check)
            if status not in ("passed", "-"):
                print(f"{name}, {check}: {status}. {reason}", flush=True)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        keras.backend.clear_session(free_memory=False)
        outcomes = {
            kind: {x.name: in_order(before[x.name]) for x in families if x.name in before}
            for kind, families in KINDS.items()
        }
        write(
            "compatibility",
            {"environment": environment("keras-hub", "tensorflow"), "outcomes": outcomes},
        )


if __name__ == "__main__":
    main()
