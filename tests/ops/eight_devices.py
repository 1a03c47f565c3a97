"""Attention on eight devices, each with its part of the sequence. Run by `test_sequence_parallel`.

In a process of its own: JAX settles how many devices it has when it starts.
"""

import functools
import pickle
import sys

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from keras_darkformer.ops import State, dark_attention, sequence_parallel_dark_attention

PART = PartitionSpec(None, "sequence")
WHOLE = PartitionSpec()
NO_FEATURES = {"geometry": None, "projection": None}  # unless there are some


def split_attention(arguments, upstream, *, mesh, batch_axis=None, check_vma=True, **options):
    """Output, state and gradients by query, key, value and geometry, as NumPy arrays.

    `arguments` are `dark_attention`'s arrays by name.
    """
    return_state = options.get("return_state", False)
    part = PartitionSpec(batch_axis, "sequence")
    split = {"query": part, "key": part, "value": part, "key_mask": part}
    if len(arguments.get("key_mask", ())) == 1:
        split["key_mask"] = PART
    specs = {name: split.get(name, WHOLE) for name in arguments}
    of_state = State(*(PartitionSpec(batch_axis),) * 3)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(part, of_state) if return_state else part,
        check_vma=check_vma,
    )
    def attend(arguments):
        return sequence_parallel_dark_attention(
            **NO_FEATURES | arguments, axis_name="sequence", **options
        )

    return with_gradients(attend, arguments, upstream, return_state)


def one_device(arguments, upstream, **options):
    """The same on one."""

    def attend(arguments):
        return dark_attention(**NO_FEATURES | arguments, **options)

    return with_gradients(attend, arguments, upstream, options.get("return_state", False))


def with_gradients(attend, arguments, upstream, return_state):
    names = [name for name in ("query", "key", "value", "geometry") if name in arguments]

    def scalar(inputs, others):
        result = attend(inputs | others)
        output, state = result if return_state else (result, None)
        loss = (output * upstream).sum()
        if return_state:  # of its sums too, whose scale is a constant
            loss = loss + state.kv_state.sum() + state.key_state.sum()
        return loss, (output, state)

    inputs = {name: arguments[name] for name in names}
    others = {name: x for name, x in arguments.items() if name not in names}
    run = jax.jit(jax.value_and_grad(scalar, has_aux=True))
    (_, (output, state)), gradients = run(inputs, others)
    return jax.tree.map(np.asarray, (output, state, gradients))


def main(jobs, results):
    with open(jobs, "rb") as file:
        jobs = pickle.load(file)
    devices = np.array(jax.devices())
    assert len(devices) == 8
    found = {}
    for name, (arguments, upstream, options, compare) in jobs.items():
        how = {"mesh": Mesh(devices, ("sequence",))}
        if options.get("batch_axis"):
            how["mesh"] = Mesh(devices.reshape(2, 4), (options["batch_axis"], "sequence"))
        found[name] = {"many": split_attention(arguments, upstream, **how, **options)}
        if compare:
            here = {x: y for x, y in options.items() if x not in ("batch_axis", "check_vma")}
            found[name]["one"] = one_device(arguments, upstream, **here)
    with open(results, "wb") as file:
        pickle.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
