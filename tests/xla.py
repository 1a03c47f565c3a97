"""Settings with which XLA compiles quickly; to be made before anything imports it."""

import importlib.metadata
import os

# A flag that XLA does not know ends the process.
KNOWS_FUSION_EMITTERS = {"jaxlib": "0.10.", "tensorflow": "2.21.", "tensorflow-cpu": "2.21."}


def quick_flags():
    """`XLA_FLAGS` for tests, behind those of the environment.

    Nearly all of the time is XLA's, on TensorFlow and JAX alike, for programs that run once: half
    of it goes without LLVM's optimizations, half of the rest without its newer way to compile
    fusions.
    """
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0"]
    if all(_is_of(package, version) for package, version in KNOWS_FUSION_EMITTERS.items()):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


def _is_of(package, version):
    """Whether a package is of a version, or is not there."""
    try:
        return importlib.metadata.version(package).startswith(version)
    except importlib.metadata.PackageNotFoundError:
        return True
