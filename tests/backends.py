"""What tests need to know about the backends; everything else is `keras.ops`."""

import contextlib

import keras
import pytest
from keras import ops, tree

BACKEND = keras.backend.backend()

_EAGER, _JIT = pytest.param(False, id="eager"), pytest.param(True, id="jit")

# Values for a parameter `jit`: how a backend's users run a function.
MODES = {"tensorflow": [_EAGER, _JIT], "jax": [_JIT], "torch": [_EAGER]}[BACKEND]

# Where a test does not care: the way that is quickest for a single call.
DEFAULT_JIT = BACKEND == "jax"


# For a test of Python that is the same on all backends.
on_one_backend = pytest.mark.skipif(BACKEND != "torch", reason="the same Python on all backends")


def further(*values):
    """More values of a parameter, where they cost little: on PyTorch nothing is compiled."""
    return list(values) if BACKEND == "torch" else []


def numpy_only():
    """Skips the module that calls it on all backends but one: it computes with none of them."""
    if BACKEND != "torch":
        pytest.skip("needs NumPy only, and runs with torch", allow_module_level=True)


def to_numpy(structure):
    return tree.map_structure(ops.convert_to_numpy, structure)


def compiled(fn):
    """`fn` through XLA where the backend has it."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(fn, jit_compile=True)
    if BACKEND == "jax":
        import jax

        return jax.jit(fn)
    return fn


def graph(fn):
    """`fn` traced once for each shape, where the backend can: quicker to call again and again."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(fn)
    return compiled(fn)


@contextlib.contextmanager
def untraced():
    """Without functions that are traced, where that is quicker for a few steps of training.

    TensorFlow takes seconds to trace a step, and computes it in a tenth of that.
    """
    if BACKEND != "tensorflow":
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def run(fn, *arrays, jit=DEFAULT_JIT):
    """`fn` of backend tensors, called with and answering NumPy arrays."""
    tensors = [ops.convert_to_tensor(x) for x in arrays]
    return to_numpy((compiled(fn) if jit else fn)(*tensors))


def differentiated(fn, has_aux=False):
    """`fn`, a scalar function of backend tensors, as a function to `(value, gradients)`.

    With `has_aux`, `fn` returns `(scalar, anything)` and so does `value`. The
    gradient by an argument that is not used is zeros.
    """
    if BACKEND == "jax":
        import jax

        def both(*tensors):
            by_all = tuple(range(len(tensors)))
            return jax.value_and_grad(fn, argnums=by_all, has_aux=has_aux)(*tensors)

    elif BACKEND == "tensorflow":
        import tensorflow as tf

        def both(*tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value = fn(*tensors)
            scalar = value[0] if has_aux else value
            zero = tf.UnconnectedGradients.ZERO
            return value, tape.gradient(scalar, tensors, unconnected_gradients=zero)

    else:
        import torch

        def both(*tensors):
            tensors = [x.detach().clone().requires_grad_() for x in tensors]
            value = fn(*tensors)
            scalar = value[0] if has_aux else value
            gradients = torch.autograd.grad(scalar, tensors, allow_unused=True)
            zeros = map(torch.zeros_like, tensors)
            return value, [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]

    return both


def hessian_product(fn, array, direction):
    """The Hessian of `fn`, a scalar function of one tensor, times a direction, in NumPy."""
    if BACKEND == "torch":
        import torch

        x = torch.from_numpy(array).requires_grad_()
        (gradient,) = torch.autograd.grad(fn(x), x, create_graph=True)
        return torch.autograd.grad(torch.sum(gradient * torch.from_numpy(direction)), x)[0].numpy()

    def along(x):
        (gradient,) = differentiated(fn)(x)[1]
        return ops.sum(gradient * direction)

    return value_and_gradients(along, array)[1][0]


def value_and_gradients(fn, *arrays, jit=DEFAULT_JIT, has_aux=False):
    """The value of a scalar function and its gradients by all arguments, as NumPy arrays."""
    value, gradients = run(differentiated(fn, has_aux), *arrays, jit=jit)
    return value, list(gradients)


def largest_intermediate(fn, *arrays):
    """Elements of the largest tensor that `fn` makes on its way, results included."""
    return max(_intermediate_sizes(fn, [ops.convert_to_tensor(x) for x in arrays]))


def _intermediate_sizes(fn, tensors):
    if BACKEND == "jax":
        import jax

        return _jaxpr_sizes(jax.make_jaxpr(fn)(*tensors).jaxpr)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        specs = [tf.TensorSpec(x.shape, x.dtype) for x in tensors]
        graph = tf.function(fn).get_concrete_function(*specs).graph
        return _graph_sizes(graph.as_graph_def(add_shapes=True))
    import torch
    from torch.utils._pytree import tree_leaves

    leaves = [x for _, results in torch_operations(fn, *tensors) for x in tree_leaves(results)]
    return [x.numel() for x in leaves if isinstance(x, torch.Tensor)]


def torch_operations(fn, *tensors):
    """What PyTorch runs for `fn`: the name of every operation, and its results."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            found.append((str(func), results))
            return results

    with Recorder():
        fn(*tensors)
    return found


def _jaxpr_sizes(jaxpr):
    sizes = [x.aval.size for equation in jaxpr.eqns for x in equation.outvars]
    for equation in jaxpr.eqns:
        for parameter in tree.flatten(list(equation.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                sizes += _jaxpr_sizes(inner)
    return sizes


def _graph_sizes(graph):
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    sizes = []
    for node in nodes:
        for shape in node.attr["_output_shapes"].list.shape:
            size = 1
            for dimension in shape.dim:
                assert dimension.size >= 0, f"unknown shape: {node.name} {shape}"
                size *= dimension.size
            sizes.append(size)
    return sizes
