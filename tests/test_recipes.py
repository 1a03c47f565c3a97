"""The recipes for training in several processes: two of them learn what one does."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from backends import BACKEND
from fresh_process import ROOT

pytestmark = pytest.mark.slow
LIMIT = 120  # seconds until processes that wait for each other are given up


def start(script, weights, **environment):
    known = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "QUICK": "1"}
    environment = os.environ | known | {"WEIGHTS": str(weights)} | environment
    return subprocess.Popen(
        [sys.executable, script],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    """What the first printed; fails if it did.

    It can't come to its end without the others. How those end is not asked:
    with many processes on few cores PyTorch's threads have aborted one that
    was done.
    """
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 0, "\n".join(text[-2000:] for text in printed)
    return printed[0]


def weights(path):
    h5py = pytest.importorskip("h5py")
    found = {}

    def add(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = np.array(item)

    with h5py.File(path) as file:
        file.visititems(add)
    return found


def assert_same_weights(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    assert len(one) > 20
    for name, value in one.items():  # of three steps of 0.002
        np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-4, err_msg=name)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@pytest.mark.skipif(BACKEND != "torch", reason="DDP is PyTorch's")
def test_two_processes_of_ddp_learn_what_one_does(tmp_path):
    one, two = tmp_path / "one.weights.h5", tmp_path / "two.weights.h5"
    finish(start("examples/train_ddp.py", one))
    # What torchrun tells them.
    port = str(free_ports(1)[0])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    both = [start("examples/train_ddp.py", two, RANK=str(rank), **together) for rank in range(2)]
    printed = finish(*both)
    assert "in this process of 2" in printed
    assert_same_weights(one, two)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute is TensorFlow's")
def test_two_workers_of_tf_distribute_learn_what_one_does(tmp_path):
    recipe, one, two = (
        "examples/train_tf_distribute.py",
        *(tmp_path / f"{name}.weights.h5" for name in ("one", "two")),
    )
    alone = finish(start(recipe, one))
    workers = ",".join(f"localhost:{port}" for port in free_ports(2))
    both = [start(recipe, two, WORKERS=workers, WORKER=str(worker)) for worker in range(2)]
    printed = finish(*both)
    losses = [
        [line for line in x.splitlines() if line.startswith("step")] for x in (alone, printed)
    ]
    assert losses[0] == losses[1] != []
    assert_same_weights(one, two)
