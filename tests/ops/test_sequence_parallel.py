"""A sequence split over eight devices: outputs, state and gradients are those of one."""

import dataclasses
import functools
import pickle

import numpy as np
import pytest
from backends import BACKEND, to_numpy
from fresh_process import EIGHT_DEVICES, run_python

from keras_darkformer.ops import dark_attention, sequence_parallel_dark_attention
from keras_darkformer.ops.reference import dark_attention_reference

from .cases import Case, assert_close
from .states import assert_same_state

ODD = {"heads": (4, 2), "batch": 2, "rank": 5, "value_dim": 6}
CASES = {
    "causal": (Case(length=104, causal=True, masked=True, **ODD), {"return_state": True}),
    "bidirectional": (Case(length=104, masked=True, **ODD), {"return_state": True}),
    "cross": (Case(length=16, key_length=40, **ODD), {}),
    "all arguments": (
        Case(length=64, causal=True, weighted=True, untied=True, shifted=True),
        {"check_vma": False},
    ),
    "several blocks": (Case(length=4800, causal=True), {"return_state": True}),
    "one token each": (Case(length=8, causal=True, masked=True), {"return_state": True}),
    "two axes": (
        Case(length=64, causal=True, masked=True, **ODD),
        {"batch_axis": "batch", "return_state": True},
    ),
    "window": (Case(length=104, causal=True, masked=True, window=5, **ODD), {}),
    "window of a whole part": (Case(length=64, causal=True, window=8), {}),
    "sinks": (Case(length=32, causal=True, masked=True, window=3, num_sinks=4, **ODD), {}),
    "sinks alone": (Case(length=64, causal=True, masked=True, num_sinks=4), {}),
    "window on two axes": (
        Case(length=64, causal=True, masked=True, window=7, **ODD),
        {"batch_axis": "batch"},
    ),
}
WITH_STATE = [name for name, (_, options) in CASES.items() if "return_state" in options]
# Where float32 loses what is far off, or tokens came before.
FURTHER = ("hostile", "hostile both ways", "hostile window", "goes on", "no features")


def job(case, options):
    arguments = dict(zip(("query", "key", "value", "geometry"), case.arrays, strict=True))
    arguments |= {name: x for name, x in case.options.items() if hasattr(x, "shape")}
    options = {"causal": case.causal, "sliding_window": case.window} | options
    options["num_sinks"] = case.num_sinks
    return arguments, case.upstream, options


MIXED = (0.3, 12.0, 1.0, 5.0, 0.1, 30.0, 2.0, 0.01)
LARGE = (35.0, 30.0, 40.0, 32.0, 45.0, 30.0, 50.0, 35.0)  # sums below what counts as none


def hostile(case, norms):
    """Keys whose norms differ much between devices, some without any, and short rows."""
    arguments, upstream, options = job(case, {})
    norms = np.repeat(norms, case.length // 8)
    arguments["key"] = arguments["key"] * norms[:, None, None].astype("float32")
    mask = np.ones((case.batch, case.length), "bool")
    mask[0, case.length // 8 * 3 - 2 :] = False  # a short row: five devices hold padding only
    mask[1, : case.length // 8 + 3] = False  # nothing for the first queries to see
    arguments["key_mask"] = mask
    arguments["value"] = np.where(mask[:, :, None, None], arguments["value"], np.nan)
    return arguments, upstream, options


def without_features():
    """Sinks and a window alone."""
    arguments, upstream, options = job(
        Case(length=64, causal=True, masked=True, window=5, num_sinks=4, **ODD), {}
    )
    kept = ("query", "key", "value", "key_mask")
    return {name: arguments[name] for name in kept}, upstream, options


def going_on():
    """With the state of 30 tokens before."""
    case = Case(length=64, causal=True, **ODD)
    earlier = Case(length=30, causal=True, **ODD)
    arguments, upstream, options = job(case, {"return_state": True})
    parameters = arguments["geometry"], arguments["projection"]
    _, state = dark_attention(*earlier.arrays[:3], *parameters, causal=True, return_state=True)
    arguments["initial_state"] = to_numpy(state)
    return arguments, upstream, options


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if BACKEND != "jax":
        pytest.skip(f"the sequence is split by jax.shard_map; this is {BACKEND}")
    jobs = {name: job(*case) for name, case in CASES.items()}
    causal = Case(length=64, causal=True, **ODD)
    jobs["hostile"] = hostile(causal, MIXED)
    jobs["hostile both ways"] = hostile(Case(length=64, **ODD), LARGE)
    jobs["hostile window"] = hostile(dataclasses.replace(causal, window=4), LARGE)
    jobs["goes on"] = going_on()
    jobs["no features"] = without_features()
    jobs = {
        name: (*x, name in WITH_STATE or name in FURTHER)  # then one device is asked, too
        for name, x in jobs.items()
    }
    path = tmp_path_factory.mktemp("sequence_parallel")
    (path / "jobs").write_bytes(pickle.dumps(jobs))
    code = "import runpy, sys; runpy.run_path('tests/ops/eight_devices.py', run_name='__main__')"
    run_python(code, path / "jobs", path / "results", env=EIGHT_DEVICES)
    return pickle.loads((path / "results").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WITH_STATE, *FURTHER])
def test_eight_devices_compute_what_one_does(name, results):
    output, state, gradients = results[name]["many"]
    expected, expected_state, expected_gradients = results[name]["one"]
    assert_close(output, expected, 2e-5)
    assert type(state) is type(expected_state)
    if state is not None:
        assert_same_state(state, expected_state, 2e-5)
    for argument, gradient in expected_gradients.items():
        assert np.abs(gradient).max() > 1e-3
        assert_close(gradients[argument], gradient, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in WITH_STATE])
def test_eight_devices_compute_what_the_reference_does(name, results):
    case, _ = CASES[name]
    output, _, gradients = results[name]["many"]
    expected = dark_attention_reference(*case.arrays, **case.options, upstream=case.upstream)
    assert_close(output, expected[0])
    for argument, gradient in zip(("query", "key", "value", "geometry"), expected[1], strict=True):
        assert_close(gradients[argument], gradient)


def attend_split(case, axis_name="sequence", **options):
    """On a mesh of one device, for what is checked before anything is computed."""
    arguments, _, given = job(case, options)
    call = functools.partial(sequence_parallel_dark_attention, axis_name=axis_name, **given)
    if BACKEND != "jax":
        return call(**arguments)
    import jax
    from jax.sharding import Mesh, PartitionSpec

    mesh, whole = Mesh(np.array(jax.devices()[:1]), ("sequence",)), PartitionSpec()
    split = jax.shard_map(lambda x: call(**x), mesh=mesh, in_specs=(whole,), out_specs=whole)
    return jax.jit(split)(arguments)  # which traces all before it computes anything


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has shard_map")
def test_other_backends_are_told_that_it_needs_jax():
    with pytest.raises(RuntimeError, match=f"needs the JAX backend. Received: backend '{BACKEND}'"):
        attend_split(Case(length=8, causal=True))


@pytest.mark.skipif(BACKEND != "jax", reason="the backend is refused first")
@pytest.mark.parametrize(
    ("message", "case", "options"),
    [
        ("axis_name='model'", Case(length=8, causal=True), {"axis_name": "model"}),
        ("8 tokens per device", Case(length=8, causal=True, window=9), {}),
        ("`return_state`", Case(length=8, causal=True, window=4), {"return_state": True}),
        ("`initial_state`", Case(length=8, causal=True, window=4), {"initial_state": (0, 0, 0)}),
        ("`initial_state`", Case(length=8, causal=True), {"initial_state": (np.zeros(3),)}),
        ("`chunk_size`", Case(length=8, causal=True), {"chunk_size": 0}),
        ("same length", Case(length=8, key_length=4), {"causal": True}),
        ("need `causal=True`", Case(length=8), {"sliding_window": 3}),
    ],
)
def test_what_cannot_be_is_refused(message, case, options):
    with pytest.raises(ValueError, match=message):
        attend_split(case, **options)
