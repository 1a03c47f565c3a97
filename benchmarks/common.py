"""What the benchmarks share: running on three backends, timing, memory, results.

Import this before Keras: it settles the backend. Linux only.

Times on the CPU are of one thread pinned to one core (`one_thread`), and are
the processor time this process used, so that whatever else the machine does
counts less. Times on a GPU are wall-clock, with the device waited for.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

BENCHMARKS = pathlib.Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results"
PASSES = ("forward", "forward + backward")  # without gradients, and with
XLA_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def backend():
    return os.environ["KERAS_BACKEND"]


@functools.cache
def accelerator():
    """The name of the GPU the backend computes on, or `None`. Starts the backend."""
    if backend() == "jax":
        import jax

        device = jax.devices()[0]
        return None if device.platform == "cpu" else device.device_kind
    if backend() == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        return tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else None

    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


# === One thread ===


def one_thread():
    """Keeps this process to one thread on one core; on a GPU it may use all cores.

    Call it first: libraries read these settings when they are loaded.
    """
    loaded = {"numpy", "keras", "jax", "tensorflow", "torch"} & sys.modules.keys()
    if loaded:
        raise RuntimeError(f"`one_thread` comes too late, after the import of {sorted(loaded)}")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = "1"
    flags = os.environ.get("XLA_FLAGS", "")
    if XLA_ONE_THREAD not in flags:  # set already in a process of `in_process`
        os.environ["XLA_FLAGS"] = f"{flags} {XLA_ONE_THREAD}".strip()
    if backend() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    if backend() == "torch":
        import torch

        torch.set_num_threads(1)
    if accelerator():  # known only now; its compilers may use what cores there are
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread), cores)


# === Running ===


def compiled(function, *, compile=False, donate=()):
    """The function as this backend runs it fast.

    Args:
        function: takes and returns tensors.
        compile: on torch, use `torch.compile`; otherwise it stays eager, as
            Keras runs it.
        donate: on JAX, positions of arguments whose memory the result may take.
    """
    if backend() == "jax":
        import jax

        return jax.jit(function, donate_argnums=donate)
    if backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if compile:
        import torch

        return torch.compile(function)
    return function


def finish(results):
    """Waits until the device has computed `results`."""
    if backend() == "jax":
        import jax

        jax.block_until_ready(results)
    elif backend() == "tensorflow":
        import tensorflow as tf

        tf.test.experimental.sync_devices()
    elif accelerator():
        import torch

        torch.cuda.synchronize()


# === Time ===


def default_clock():
    return time.perf_counter if accelerator() else time.process_time


def interleaved(functions, repeats, clock=None, warmups=2, settle=False):
    """Times functions without arguments in turn, so that a slow minute hits all alike.

    Args:
        functions: dict of functions.
        repeats: int. Rounds.
        clock: function that returns seconds, or `None` for `default_clock()`.
        warmups: int. Calls of each before, not timed; they compile.
        settle: bool. Before every call that is timed make one that is not, so
            that a short function does not pay for what the one before it, a
            long one maybe, left in the processor's caches.

    Returns:
        A dict of lists of seconds.
    """
    clock = clock or default_clock()
    for function in functions.values():
        for _ in range(warmups):
            finish(function())
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if settle:
                finish(function())
            started = clock()
            finish(function())
            seconds[name].append(clock() - started)
    return seconds


def summary(seconds):
    """Median, and as spread the interquartile range, of seconds, in milliseconds."""
    low = median = high = seconds[0]
    if len(seconds) > 1:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": round(1000 * median, 4), "spread": round(1000 * (high - low), 4)}


# === Memory ===


def peak():
    """Peak memory in bytes: of the GPU, or resident memory on the CPU.

    It is the peak since `reset_peak`; JAX on a GPU knows only the one since
    the process began.
    """
    if not accelerator():
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    if backend() == "jax":
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    if backend() == "tensorflow":
        import tensorflow as tf

        return tf.config.experimental.get_memory_info("GPU:0")["peak"]

    import torch

    return torch.cuda.max_memory_allocated()


def reset_peak():
    """Lets `peak` begin at what is in use now."""
    if not accelerator():
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    elif backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.reset_memory_stats("GPU:0")
    elif backend() == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()


# === Arguments, and processes of their own ===


def parser(docstring):
    """A parser with what all benchmarks take: `--quick`, and `--measure` for `in_process`."""
    made = argparse.ArgumentParser(description=docstring.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="small, and writes no results")
    made.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    return made


def in_process(*what, **environment):
    """Has this script, with its arguments, measure one thing in a process of its own.

    There `args.measure` is `what`, as strings, and `environment` is added to its own; the script
    hands its result to `answer`. Processes share a GPU badly: let the one that calls this not
    start its backend before the last of them is done.
    """
    command = [sys.executable, *sys.argv, "--measure", *(str(word) for word in what)]
    variables = os.environ | environment
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if run.returncode:
        raise RuntimeError(f"{command[1:]} ended with {run.returncode}:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def answer(result):
    """What `in_process` returns: JSON, on the last line that is printed."""
    print(json.dumps(result))


# === Results ===


def environment(*packages):
    """Versions and machine, for the results.

    Args:
        *packages: distributions whose versions are listed too if they are
            installed.
    """
    import keras
    import numpy as np

    versions = {
        "python": platform.python_version(),
        "keras": keras.__version__,
        "numpy": np.__version__,
        backend(): importlib.import_module(backend()).__version__,
    }
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": len(os.sched_getaffinity(0)),
    }
    if accelerator():
        machine["accelerator"] = accelerator()
    return {"versions": versions, "machine": machine}


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()  # Arm names no model there


def bytes_of(shapes_and_dtypes):
    """What tensors of these shapes and dtypes take."""
    from keras_darkformer.ops.state import nbytes

    return sum(nbytes(shape, dtype) for shape, dtype in shapes_and_dtypes)


def result_path(name, variant=""):
    """results/NAME_BACKEND.json, on a GPU results/NAME_BACKEND_gpu.json.

    `variant`, such as "compile", keeps apart what is measured in several ways.
    """
    parts = [name, backend(), "gpu" if accelerator() else "", variant]
    return RESULTS / f"{'_'.join(part for part in parts if part)}.json"


def read(name, variant=""):
    """What `write` wrote before, or `None`."""
    path = result_path(name, variant)
    return json.loads(path.read_text()) if path.exists() else None


def write(name, payload, variant=""):
    """Writes a result to its path."""
    path = result_path(name, variant)
    write_json(path, payload)
    print(f"wrote {path.relative_to(BENCHMARKS.parent)}")


def write_json(path, payload):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(payload), indent=1, allow_nan=False) + "\n")


def finite(payload):
    """With `None` for numbers that JSON doesn't know."""
    if isinstance(payload, dict):
        return {key: finite(value) for key, value in payload.items()}
    if isinstance(payload, list | tuple):
        return [finite(value) for value in payload]
    return None if isinstance(payload, float) and not math.isfinite(payload) else payload


def print_table(columns, rows):
    """Prints rows of cells under column names, aligned."""
    rows = [[str(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
