"""The tables of docs/compatibility.md, from results/compatibility_*.json."""

import json

from common import RESULTS

SHORT = {"tensorflow": "TF", "jax": "JAX", "torch": "PT"}
NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}


def results():
    """What was found, by backend."""
    paths = {name: RESULTS / f"compatibility_{name}.json" for name in SHORT}
    return {name: json.loads(x.read_text("utf-8")) for name, x in paths.items() if x.exists()}


def cell(by_backend, backends):
    """`{"jax": "passed", ...}` in short: once where all backends agree."""
    by_backend = {b: "✓" if status == "passed" else status for b, status in by_backend.items()}
    if len(set(by_backend.values())) == 1 and len(by_backend) == backends:
        return next(iter(by_backend.values()))
    return ", ".join(f"{SHORT[b]} {status}" for b, status in by_backend.items())


def compatibility(kind):
    """A row for each check, a column for each family of a kind, and the versions."""
    found = results()
    outcomes = {backend: result["outcomes"].get(kind, {}) for backend, result in found.items()}
    families = list(dict.fromkeys(name for of in outcomes.values() for name in of))
    checks = list(
        dict.fromkeys(name for of in outcomes.values() for row in of.values() for name in row)
    )
    lines = ["| | " + " | ".join(families) + " |", "| --- |" + " --- |" * len(families)]
    for check in checks:
        cells = [
            cell(
                {b: of[family][check][0] for b, of in outcomes.items() if check in of[family]},
                len(outcomes),
            )
            for family in families
        ]
        lines.append(f"| {check} | " + " | ".join(cells) + " |")
    versions = {b: result["environment"]["versions"] for b, result in found.items()}
    used = [f"{NAMES[b]} {of[b]} with Keras {of['keras']}" for b, of in versions.items()]
    return "\n".join([*lines, "", f"{', '.join(used)}."])
