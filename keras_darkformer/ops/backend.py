"""The one place where the backends differ."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
from keras import ops, tree

_BACKEND = keras.config.backend()

# The base of the logarithms in `ops`. torch's exp takes 4 times as long on CPU as its exp2, and 10
# to 80 times where the result underflows; TensorFlow's exp2 is a general power.
BASE = math.e if _BACKEND == "tensorflow" else 2.0

# Tokens per block of a long causal sequence. Measured on CPU: fewer keep a block's tensors in the
# cache, more spread the cost of starting operations, which is largest in torch. On an accelerator,
# where it is not measured, a block must be large enough to fill it.
BLOCK_LENGTH = 256 if _BACKEND == "jax" else 512
ACCELERATOR_BLOCK_LENGTH = 4096
MOST_BLOCKS = 16


def block_length(length: int | None) -> int:
    """Tokens per block of a causal sequence on the device that Keras computes on.

    `None` stands for a length that is known only to the run.
    """
    usual = ACCELERATOR_BLOCK_LENGTH if accelerated() else BLOCK_LENGTH
    if length is None or _BACKEND != "tensorflow":
        return usual
    # TensorFlow unrolls the blocks: more of them take minutes to compile.
    return max(-(-length // MOST_BLOCKS), usual)


def backend() -> str:
    """The name of the backend, for figures measured on each."""
    return _BACKEND


def accelerated() -> bool:
    """Whether Keras computes on an accelerator."""
    if _BACKEND == "torch":
        import torch

        return torch.cuda.is_available()  # quick, and `torch.compile` warns of what is cached
    return _has_accelerator()


@functools.cache
def _has_accelerator() -> bool:
    if _BACKEND == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU"))


def tensors(*arrays: Any) -> tuple[Any, ...]:
    """Arrays as tensors; `None` stays."""
    return tuple(None if x is None else _tensor(x) for x in arrays)


def numbers(*arrays: Any) -> tuple[Any, ...]:
    """As `tensors`, integers and booleans in the default float type: results are no integers."""
    return tuple(x if x is None else _number(x) for x in tensors(*arrays))


def _number(x: Any) -> Any:
    dtype = keras.backend.standardize_dtype(x.dtype)
    return x if "float" in dtype else ops.cast(x, keras.config.floatx())


def _tensor(x: Any) -> Any:
    x = ops.convert_to_tensor(x)
    if _BACKEND != "tensorflow":
        return x
    import tensorflow as tf

    return tf.convert_to_tensor(x)  # a variable is none, and lacks some attributes of one


def power(exponent: Any) -> Any:
    """`BASE ** exponent`."""
    return ops.exp(exponent) if _BACKEND == "tensorflow" else ops.exp2(exponent)


def reshape(x: Any, shape: tuple[Any, ...]) -> Any:
    """`ops.reshape`, which on torch takes 15 microseconds to look for symbolic tensors."""
    return x.reshape(shape) if _BACKEND == "torch" else ops.reshape(x, shape)


def largest(x: Any, axis: int, keepdims: bool = False) -> Any:
    """`ops.max` over an axis that is not empty, whatever the others are.

    On torch and TensorFlow Keras' refuses every tensor without elements, and so a batch without
    rows.
    """
    if _BACKEND == "torch":
        return x.amax(dim=axis, keepdim=keepdims)
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.reduce_max(x, axis=axis, keepdims=keepdims)
    return ops.max(x, axis=axis, keepdims=keepdims)


def affine(inputs: Any, kernel: Any, bias: Any) -> Any:
    """`inputs @ kernel + bias`, `(b, k, x, h)` by `(k, h, m)` or `(x, h)` by `(h, m)`.

    A sum of its own is a pass over all features; torch has one that is part of the product, as XLA
    makes it by itself. The gradient by a kernel without the rows' axis is one product over rows and
    tokens, for which JAX transposes both: one product a row, added up, is twice as fast. For a few
    tokens a row a copy of the kernel would be more than all the rest.
    """
    tokens = inputs.shape[-2]
    is_long = isinstance(tokens, int) and tokens >= kernel.shape[-2]
    if _BACKEND == "jax" and len(kernel.shape) == 3 and is_long:
        kernel = ops.broadcast_to(kernel, (inputs.shape[0], *kernel.shape))
    if bias is None or _BACKEND != "torch":
        return inputs @ kernel if bias is None else inputs @ kernel + bias
    import torch

    if len(kernel.shape) == 2:
        return torch.addmm(bias, inputs, kernel)
    shape = inputs.shape
    heads = (shape[0] * shape[1], *kernel.shape[1:])
    kernel = kernel.expand(shape[0], *kernel.shape).reshape(heads)
    bias = bias.expand(shape[0], *bias.shape).reshape(heads[0], 1, kernel.shape[-1])
    outputs = torch.baddbmm(bias, inputs.reshape(heads[0], *shape[2:]), kernel)
    return outputs.reshape(*shape[:-1], kernel.shape[-1])


def softmax_attention(
    query: Any, key: Any, value: Any, *, scale: float, causal: bool = False, mask: Any = None
) -> Any:
    """`ops.dot_product_attention` of tensors `(b, t, heads, h)` of one dtype.

    On torch Keras' has each of them copied, so that heads come first in memory, and makes a float
    of every bit of a mask. `scaled_dot_product_attention` needs neither: on a CPU that is a fifth
    of the time at 128 tokens.
    """
    if _BACKEND != "torch":
        return ops.dot_product_attention(
            query, key, value, mask=mask, scale=scale, is_causal=causal
        )
    import torch

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


def inner(x: Any, y: Any) -> Any:
    """`x @ y'`: of the rows of one with those of the other.

    Of a transposed `y` JAX hands the gradient on transposed, and turns all of it around.
    """
    if _BACKEND == "jax":
        return ops.einsum("...xh,...yh->...xy", x, y)
    return x @ ops.swapaxes(y, -1, -2)


def columns(x: Any, number: int) -> Any:
    """`(..., 1)` as so many equal columns, for a product with each of that many.

    Its gradient is a sum over them. XLA's on CPU takes as long as a product with a square matrix,
    so there JAX has a product with ones. Elsewhere broadcasting will do, and on accelerators
    products round what they multiply.
    """
    if _BACKEND == "jax" and not accelerated():
        return x @ ops.ones((1, number), dtype=x.dtype)
    return x


def compiled(
    function: Callable[..., Any], variables: Sequence[Any], updated: Sequence[Any] = ()
) -> Callable[..., Any]:
    """A function of tensors, compiled where the backend compiles, for inference.

    JAX compiles what it closes over into the program: the weights of a model have to go in as
    arguments, and what it draws random numbers from out again.

    Args:
        function: function of positional tensors and Python values that a trace may take as tensors.
        variables: the variables it reads.
        updated: those of other variables it also assigns.
    """
    if _BACKEND == "torch":
        import torch

        return torch.no_grad()(function)
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    import jax

    everything = [*variables, *updated]

    @jax.jit
    def stateless(values: Any, *arguments: Any) -> Any:
        mapping = list(zip(everything, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            result = function(*arguments)
        return result, [scope.get_current_value(v) for v in updated]

    def run(*arguments: Any) -> Any:
        result, values = stateless([v.value for v in everything], *arguments)
        for variable, value in zip(updated, values, strict=True):
            variable.assign(value)
        return result

    return run


def no_gradients() -> contextlib.AbstractContextManager[Any]:
    """A block in which nothing is noted down for gradients.

    PyTorch does so for every call of a model that is not told otherwise, and keeps each tensor on
    the way: gigabytes for a text of a real model.
    """
    if _BACKEND == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def track_variables(layers: Iterable[Any]) -> None:
    """Has layers whose sublayers have got new variables know of them in the backend's own way.

    A Keras layer is a torch module, which notes its parameters down once, when it is built: an
    optimizer of torch over `model.parameters()` would silently leave the new ones as they are.
    KerasHub's models note none at all, and stay so.
    """
    for layer in layers if _BACKEND == "torch" else ():
        if hasattr(layer, "_torch_params") and next(layer.named_parameters(), None) is not None:
            layer._track_variables()


def pad(x: Any, widths: Sequence[tuple[int, int]]) -> Any:
    """`ops.pad` with zeros.

    On torch Keras' makes an operation with a name of its own at every call, and `torch.compile`
    then a new program.
    """
    if _BACKEND != "torch":
        return ops.pad(x, widths)
    import torch

    return torch.nn.functional.pad(x, [size for both in reversed(widths) for size in both])


def split_at(x: Any, index: Any, axis: int) -> Any:
    """`x` before `index` and from there on. On TensorFlow `index` may be a tensor.

    On torch `ops.split` makes a tensor of the index and reads it back: it waits for the device, and
    `torch.export` then knows no sizes. Slices would do, but their gradient fills tensors with
    zeros.
    """
    if _BACKEND == "torch":
        return x.split((index, x.shape[axis] - index), dim=axis)
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.split(x, [index, tf.shape(x)[axis] - index], axis=axis)
    return ops.split(x, [index], axis=axis)


def scan(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any,
    constants: Any,
    *,
    shapes: Sequence[tuple[Any, ...]] = (),
    remat: bool | None = None,
) -> tuple[Any, Any]:
    """Runs `carry, output = step(carry, input, constants)` over the second axis of `inputs`.

    JAX compiles one step and loops over it: unrolled, its compile time grows with the length. The
    others run a Python loop: TensorFlow's `ops.scan` has no gradient under `jit_compile`, and
    torch's indexes its inputs step by step, which makes the backward pass quadratic (`unstack` does
    not). A length that TensorFlow knows only in the run needs a loop of its own.

    Args:
        step: function of `(carry, input, constants)` to `(carry, output)`; it must reach tensors
            that have gradients through its arguments.
        carry: nested structure of tensors.
        inputs: nested structure of tensors whose second axes have the same length.
        constants: nested structure of tensors.
        shapes: of the tensors of an output, in the order of `keras.tree`, all of them float32.
            They are asked for where the length is known only to the run.
        remat: whether the backward pass computes a step anew instead of keeping what it made on the
            way. `None`: where that is faster. On JAX it is, as soon as there are two steps, since a
            loop there writes all that it keeps into arrays of its own.

    Returns:
        The last carry, and the outputs stacked along a new second axis.
    """
    leaves = tree.flatten(inputs)
    length = leaves[0].shape[1]
    # A length that stands for any, where Keras asks JAX for shapes alone, is no number.
    loop = _BACKEND == "jax" and (not isinstance(length, int) or length > 1)
    if loop if remat is None else remat:
        step = _rematerialized(step)
    if loop:
        swapped = tree.map_structure(_swap, inputs)
        carry, outputs = ops.scan(lambda c, x: step(c, x, constants), carry, swapped)
        return carry, tree.map_structure(_swap, outputs)
    if length is None:
        return _loop(step, carry, inputs, constants, shapes)
    unstacked = [ops.unstack(leaf, length, axis=1) for leaf in leaves]
    steps = []
    for block in zip(*unstacked, strict=True):
        carry, output = step(carry, tree.pack_sequence_as(inputs, list(block)), constants)
        steps.append(output)
    return carry, tree.map_structure(lambda *blocks: ops.stack(blocks, axis=1), *steps)


def _loop(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any,
    constants: Any,
    shapes: Sequence[tuple[Any, ...]],
) -> tuple[Any, Any]:
    """`scan` on TensorFlow over a length that is known only to the run, and at least 1.

    XLA has a gradient of loops that say how often they turn at most.
    """
    import tensorflow as tf

    def steps(dtype: Any, shape: Any) -> Any:
        return tf.TensorArray(dtype, size=count, element_shape=shape)

    by_step = [_swap(x) for x in tree.flatten(inputs)]
    count = tf.shape(by_step[0])[0]
    given = [steps(x.dtype, x.shape[1:]).unstack(x) for x in by_step]
    made = [steps("float32", [x if isinstance(x, int) else None for x in s]) for s in shapes]
    carried, structure = tree.flatten(carry), None

    def body(index: Any, carried: list[Any], made: list[Any]) -> tuple[Any, list[Any], list[Any]]:
        nonlocal structure
        given_now = tree.pack_sequence_as(inputs, [array.read(index) for array in given])
        after, structure = step(tree.pack_sequence_as(carry, carried), given_now, constants)
        pairs = zip(tree.flatten(after), carried, strict=True)
        outputs = zip(made, tree.flatten(structure), strict=True)
        return (
            index + 1,
            [tf.ensure_shape(x, before.shape) for x, before in pairs],
            [array.write(index, x) for array, x in outputs],
        )

    _, carried, made = tf.while_loop(
        lambda index, *_: index < count,
        body,
        (0, carried, made),
        maximum_iterations=count,
        parallel_iterations=1,
    )
    outputs = [_swap(array.stack()) for array in made]
    return tree.pack_sequence_as(carry, carried), tree.pack_sequence_as(structure, outputs)


def search(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, output: Any, inputs: Any
) -> tuple[Any, Any]:
    """As `scan`, for what has no gradient: also over a length that is known only to the run.

    Args:
        step: function of `(carry, input)` to `(carry, output)`.
        carry: nested structure of tensors.
        output: tensors of the structure, shapes and dtypes of an output.
        inputs: nested structure of tensors.
    """
    if _BACKEND != "tensorflow":
        return scan(lambda c, x, _: step(c, x), carry, inputs, (), remat=False)

    import tensorflow as tf

    # `ops.scan` there asks for a length that is known before the run.
    carries, outputs = tf.scan(
        lambda last, x: step(last[0], x), tree.map_structure(_swap, inputs), (carry, output)
    )
    return tree.map_structure(lambda x: x[-1], carries), tree.map_structure(_swap, outputs)


def _swap(x: Any) -> Any:
    return ops.swapaxes(x, 0, 1)


def _rematerialized(step: Callable[..., Any]) -> Callable[..., Any]:
    """`keras.remat(step)` for what TensorFlow's does not take: nesting, and booleans in XLA."""

    def rematerialized(*arguments: Any) -> Any:
        result: Any = None
        everything = tree.flatten(arguments)
        dtypes = [
            None if x is None else keras.backend.standardize_dtype(x.dtype) for x in everything
        ]

        def flat(*leaves: Any) -> Any:
            nonlocal result
            rest = iter(leaves)
            restored = [None if dtype is None else ops.cast(next(rest), dtype) for dtype in dtypes]
            result = step(*tree.pack_sequence_as(arguments, restored))
            return tuple(tree.flatten(result))

        leaves = [
            ops.cast(x, "int8") if dtype == "bool" else x
            for x, dtype in zip(everything, dtypes, strict=True)
            if x is not None
        ]
        leaves = _recomputed(flat)(*leaves)  # which sets `result`
        return tree.pack_sequence_as(result, list(leaves))

    return rematerialized


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`keras.remat` of a function of tensors; on TensorFlow with derivatives of every order.

    TensorFlow's own, which Keras takes, refuses the second.
    """
    if _BACKEND != "tensorflow":
        return keras.remat(function)
    import tensorflow as tf

    @tf.custom_gradient
    def recomputed(*inputs: Any) -> Any:
        def gradient(*upstream: Any, variables: Any = ()) -> Any:
            with tf.GradientTape() as tape, tf.control_dependencies(upstream):
                again = [tf.identity(x) for x in inputs]  # not before it is asked for
                tape.watch([x for x in again if x.dtype.is_floating])
                outputs = function(*again)
            found = tape.gradient(outputs, [*again, *variables], output_gradients=upstream)
            # Of variables that the function uses they are handed over apart.
            return (found[: len(again)], found[len(again) :]) if variables else found

        return function(*map(tf.stop_gradient, inputs)), gradient  # nothing is noted down

    return recomputed


class SequenceAxis:
    """A sequence split over devices along a mesh axis, seen inside `jax.shard_map`.

    Args:
        name: the mesh axis.

    Raises:
        RuntimeError: on another backend than JAX, which alone has `shard_map`.
    """

    def __init__(self, name: str) -> None:
        if _BACKEND != "jax":
            raise RuntimeError(
                "Sequence parallel attention is written for `jax.shard_map` and needs the JAX "
                f"backend. Received: backend {_BACKEND!r}"
            )
        import jax

        self.name = name
        self._jax = jax
        try:
            self.index = jax.lax.axis_index(name)
        except NameError as error:
            raise ValueError(
                f"`axis_name` must be an axis of the mesh that `jax.shard_map` runs over. "
                f"Received: axis_name={name!r} ({error})"
            ) from error

    def gather(self, x: Any) -> Any:
        """`x` of all devices, along a new first axis."""
        return self._jax.lax.all_gather(x, self.name)

    def sum(self, x: Any) -> Any:
        """The sum of all devices' `x`."""
        return self._jax.lax.psum(x, self.name)

    def max(self, x: Any) -> Any:
        """The maximum of all devices' `x`, a constant to the gradient."""
        return self._jax.lax.pmax(ops.stop_gradient(x), self.name)

    def from_previous(self, x: Any) -> Any:
        """`x` of the device before; zeros on the first."""
        size = self._jax.lax.psum(1, self.name)
        steps = [(device, device + 1) for device in range(size - 1)]
        return self._jax.lax.ppermute(x, self.name, steps)
