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

# Tokens per block of a long causal sequence. On a CPU a small block keeps its tensors in the cache,
# and a large one spreads the cost of starting operations, which is largest in torch.
BLOCK_LENGTH = 256 if _BACKEND == "jax" else 512
# Tokens of a block in all rows of a batch on an accelerator, where a block must be large enough to
# fill it. Measured on an H200: in PyTorch a block of 16,384 takes as long to start as one of 4,096.
ACCELERATOR_TOKENS = 16384 if _BACKEND == "torch" else 4096
# Tokens of a chunk there. In such blocks of PyTorch, chunks of 64 take up to 9 % longer, and chunks
# of 512 up to 40 %. On the others it is as on a CPU, unmeasured.
ACCELERATOR_CHUNK = 128 if _BACKEND == "torch" else None
LEAST_BLOCK = 1024
MOST_BLOCKS = 16


def block_length(length: int | None, rows: Any = 1) -> int:
    """Tokens per block of a causal sequence on the device that Keras computes on.

    `length` is `None` where only the run knows it. The number of `rows` counts if it is an int.
    """
    usual = BLOCK_LENGTH
    if accelerated():
        rows = rows if isinstance(rows, int) else 1
        usual = max(ACCELERATOR_TOKENS // max(1, rows), LEAST_BLOCK)
    if length is None or _BACKEND != "tensorflow":
        return usual
    # TensorFlow unrolls the blocks: more of them take minutes to compile.
    return max(-(-length // MOST_BLOCKS), usual)


def backend() -> str:
    """The name of the backend, to look up what was measured on it."""
    return _BACKEND


def accelerated() -> bool:
    """Whether Keras computes on an accelerator."""
    if _BACKEND == "torch":
        import torch

        return torch.cuda.is_available()  # quick; `torch.compile` warns of cached functions
    return _has_accelerator()


@functools.cache
def _has_accelerator() -> bool:
    if _BACKEND == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU"))


def tensors(*arrays: Any) -> tuple[Any, ...]:
    """Converts arrays to tensors; `None` stays `None`."""
    return tuple(None if x is None else _tensor(x) for x in arrays)


def numbers(*arrays: Any) -> tuple[Any, ...]:
    """Like `tensors`, but casts integers and booleans to the default float dtype."""
    return tuple(x if x is None else _number(x) for x in tensors(*arrays))


def _number(x: Any) -> Any:
    dtype = keras.backend.standardize_dtype(x.dtype)
    return x if "float" in dtype else ops.cast(x, keras.config.floatx())


def _tensor(x: Any) -> Any:
    x = ops.convert_to_tensor(x)
    if _BACKEND != "tensorflow":
        return x
    import tensorflow as tf

    return tf.convert_to_tensor(x)  # a variable lacks some attributes of a tensor


def power(exponent: Any) -> Any:
    """`BASE ** exponent`."""
    return ops.exp(exponent) if _BACKEND == "tensorflow" else ops.exp2(exponent)


def reshape(x: Any, shape: tuple[Any, ...]) -> Any:
    """`ops.reshape`, without the 15 microseconds it takes on torch to look for symbolic tensors."""
    return x.reshape(shape) if _BACKEND == "torch" else ops.reshape(x, shape)


def largest(x: Any, axis: int, keepdims: bool = False) -> Any:
    """`ops.max` over an axis that is not empty, although others may be.

    On torch and TensorFlow, `ops.max` refuses all tensors without elements, as of a batch without
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

    A separate sum costs a pass over all features. On torch it is made part of the product, as XLA
    does by itself. The gradient with respect to a kernel without a batch axis is one product over
    rows and tokens, for which JAX transposes both operands; the sum of one product per row is twice
    as fast. With only a few tokens per row, the copy of the kernel would cost more than everything
    else.
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


def of_heads(x: Any, kernel: Any) -> Any:
    """`x`, `(b, t, n, h)`, times the transposed kernel of its head, `(k, r, h)`: `(b, t, n, r)`.

    Where attention is computed with heads first (see `softmax_attention`), so is this.
    """
    batch, length, num_heads, head_dim = tuple(ops.shape(x))
    kv_heads, rank, _ = kernel.shape
    groups = num_heads // kv_heads
    if not _heads_first():
        x = reshape(x, (batch, length, kv_heads, groups, head_dim))
        x = ops.einsum("btkgh,krh->btkgr", x, kernel)
        return reshape(x, (batch, length, num_heads, rank))
    x = reshape(ops.swapaxes(x, 1, 2), (batch, kv_heads, groups * length, head_dim))
    x = affine(x, ops.swapaxes(kernel, 1, 2), None)
    return ops.swapaxes(reshape(x, (batch, num_heads, length, rank)), 1, 2)


def _heads_first() -> bool:
    return _BACKEND == "jax" and not accelerated()


def softmax_attention(
    query: Any, key: Any, value: Any, *, scale: float, causal: bool = False, mask: Any = None
) -> Any:
    """`ops.dot_product_attention` of tensors `(b, t, heads, h)` of one dtype.

    On torch, Keras copies each tensor so that heads come first in memory, and turns each bit of a
    mask into a float. `scaled_dot_product_attention` needs neither, which on a CPU makes up a fifth
    of the time at 128 tokens.

    On a CPU, JAX leaves it to XLA to find a layout for the products, which costs a fifth to a third
    of the time. With heads first, they need no other.
    """
    if _BACKEND == "torch":
        return _torch_attention(query, key, value, scale, causal, mask)
    if _heads_first():
        return _heads_first_attention(query, key, value, scale, causal, mask)
    return ops.dot_product_attention(query, key, value, mask=mask, scale=scale, is_causal=causal)


def _torch_attention(
    query: Any, key: Any, value: Any, scale: float, causal: bool, mask: Any
) -> Any:
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


def _heads_first_attention(
    query: Any, key: Any, value: Any, scale: float, causal: bool, mask: Any
) -> Any:
    """In JAX; logits and the softmax are at least in float32, as in its own attention."""
    import jax

    query, key, value = (ops.swapaxes(x, 1, 2) for x in (query, key, value))
    batch, num_heads, length, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    rows = num_heads // kv_heads * length  # of all queries that see the same keys
    query = reshape(query, (batch, kv_heads, rows, head_dim))
    product, dtype = "bkrh,bksh->bkrs", jax.numpy.promote_types(query.dtype, "float32")
    logits = jax.numpy.einsum(product, query, key, preferred_element_type=dtype)
    logits = reshape(scale * logits, (batch, num_heads, length, num_keys))
    if causal:
        mask = ops.arange(num_keys)[None, :] <= ops.arange(length)[:, None]
    if mask is not None:
        logits = ops.where(mask, logits, -1e30)
    weights = reshape(ops.softmax(logits), (batch, kv_heads, rows, num_keys))
    output = ops.cast(weights, value.dtype) @ value
    return ops.swapaxes(reshape(output, (batch, num_heads, length, value.shape[-1])), 1, 2)


def products_dtype(dtype: str) -> str:
    """The dtype in which features and values are multiplied, for inputs of `dtype`.

    On an accelerator, products of bfloat16 run on units that float32 doesn't use, and features take
    half the memory. A feature is at most 1, so rounding it costs as much as rounding the output
    does. Logarithms of features, scales and running sums stay in float32.
    """
    return "bfloat16" if dtype == "bfloat16" and accelerated() else "float32"


def cast(x: Any, dtype: str) -> Any:
    """`ops.cast`, which on torch takes some microseconds to find that it has nothing to do."""
    return x if keras.backend.standardize_dtype(x.dtype) == dtype else ops.cast(x, dtype)


def product(x: Any, y: Any) -> Any:
    """`x @ y`, rounded to the dtype of `x` as `y` is before, and returned as float32."""
    return cast(x @ cast(y, keras.backend.standardize_dtype(x.dtype)), "float32")


def inner(x: Any, y: Any) -> Any:
    """`x @ y'`: the inner products of the rows of `x` with those of `y`.

    If `y` is transposed first, JAX computes its gradient transposed and has to transpose it back.
    """
    if _BACKEND == "jax":
        return ops.einsum("...xh,...yh->...xy", x, y)
    return x @ ops.swapaxes(y, -1, -2)


def columns(x: Any, number: int) -> Any:
    """One column, `(..., 1)`, prepared for an elementwise product with `number` columns.

    Its gradient is a sum over the columns. XLA's sum on CPU takes as long as a product with a
    square matrix, so JAX multiplies by ones there instead. Elsewhere broadcasting is enough; on
    accelerators, a product would also round its operands.
    """
    if _BACKEND == "jax" and not accelerated():
        return x @ ops.ones((1, number), dtype=x.dtype)
    return x


def compiles() -> bool:
    """Whether `compiled` makes a new program for every shape, which takes seconds."""
    return _BACKEND != "torch"


def compiled(
    function: Callable[..., Any], variables: Sequence[Any], updated: Sequence[Any] = ()
) -> Callable[..., Any]:
    """A function of tensors for inference, compiled if the backend compiles.

    JAX compiles closed-over values into the program. The weights of a model therefore have to go in
    as arguments, and the state of its random numbers has to come out again.

    Args:
        function: function of positional tensors and Python values that a trace may take as tensors.
        variables: the variables it reads.
        updated: other variables that it also assigns.
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
    """A context in which nothing is recorded for gradients.

    Otherwise PyTorch records every call of a model and keeps all intermediate tensors: gigabytes
    for one text in a real model.
    """
    if _BACKEND == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def track_variables(layers: Iterable[Any]) -> None:
    """Registers the new variables of layers' sublayers in the backend's own way.

    On torch, a Keras layer is a module that records its parameters once, when it is built. A torch
    optimizer over `model.parameters()` would silently leave new ones unchanged. KerasHub's models
    record no parameters, and that stays so.
    """
    for layer in layers if _BACKEND == "torch" else ():
        if hasattr(layer, "_torch_params") and next(layer.named_parameters(), None) is not None:
            layer._track_variables()


def pad(x: Any, widths: Sequence[tuple[int, int]]) -> Any:
    """`ops.pad` with zeros.

    On torch, `ops.pad` makes an operation with a new name at every call, for which `torch.compile`
    makes a new program.
    """
    if _BACKEND != "torch":
        return ops.pad(x, widths)
    import torch

    return torch.nn.functional.pad(x, [size for both in reversed(widths) for size in both])


def split_at(x: Any, index: Any, axis: int) -> Any:
    """`x` before `index`, and from `index` on. On TensorFlow, `index` may be a tensor.

    On torch, `ops.split` turns the index into a tensor and reads it back, which waits for the
    device and hides the sizes from `torch.export`. Slices would work, but their gradient fills
    tensors with zeros.
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

    JAX compiles one step and loops over it, since the compile time of an unrolled loop grows with
    the length. The other backends run a Python loop: TensorFlow's `ops.scan` has no gradient under
    `jit_compile`, and torch's indexes its inputs step by step, which makes the backward pass
    quadratic (`unstack` does not). On TensorFlow, a length that is known only at run time needs a
    separate loop.

    Args:
        step: function of `(carry, input, constants)` to `(carry, output)`; it must reach tensors
            that have gradients through its arguments.
        carry: nested structure of tensors.
        inputs: nested structure of tensors whose second axes have the same length.
        constants: nested structure of tensors.
        shapes: shapes of the tensors of one output, all float32, in the order of `keras.tree`. They
            are needed if the length is known only at run time.
        remat: whether the backward pass recomputes a step instead of keeping its intermediate
            tensors. `None` does so where it is faster. On JAX it is faster from two steps on, since
            a loop there writes everything it keeps into separate arrays.

    Returns:
        The last carry, and the outputs stacked along a new second axis.
    """
    leaves = tree.flatten(inputs)
    length = leaves[0].shape[1]
    # Where Keras asks JAX for shapes alone, a length that stands for any is not an int.
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
    made: list[_Stack] = []
    for block in zip(*unstacked, strict=True):
        carry, output = step(carry, tree.pack_sequence_as(inputs, list(block)), constants)
        made = made or [_Stack(length) for _ in tree.flatten(output)]
        for stack, x in zip(made, tree.flatten(output), strict=True):
            stack.add(x)
    return carry, tree.pack_sequence_as(output, [stack.whole() for stack in made])


class _Stack:
    """So many tensors along a new second axis.

    Where torch records nothing for gradients, each is copied to its place as it comes. Kept until
    all are there, they would take their memory twice while they are stacked. A compiler would copy
    the whole for each of them.
    """

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self.parts: list[Any] = []
        self.places: Any = None

    def add(self, x: Any) -> None:
        if self.size > 1 and _fills_in_place(x):
            if self.places is None:
                self.places = x.new_empty((x.shape[0], self.size, *x.shape[1:]))
            self.places[:, self.count] = x
        else:
            self.parts.append(x)
        self.count += 1

    def whole(self) -> Any:
        if self.places is not None:
            return self.places
        return ops.expand_dims(self.parts[0], 1) if self.size == 1 else ops.stack(self.parts, 1)


def _fills_in_place(x: Any) -> bool:
    if _BACKEND != "torch":
        return False
    import torch

    return not (x.requires_grad or torch.compiler.is_compiling())


def _loop(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any,
    constants: Any,
    shapes: Sequence[tuple[Any, ...]],
) -> tuple[Any, Any]:
    """`scan` on TensorFlow over a length of at least 1 that is known only at run time.

    XLA has gradients only of loops that state their maximum number of iterations.
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
    """Like `scan`, without gradients; the length may be known only at run time.

    Args:
        step: function of `(carry, input)` to `(carry, output)`.
        carry: nested structure of tensors.
        output: tensors with the structure, shapes and dtypes of one output.
        inputs: nested structure of tensors.
    """
    if _BACKEND != "tensorflow":
        return scan(lambda c, x, _: step(c, x), carry, inputs, (), remat=False)

    import tensorflow as tf

    # `ops.scan` on TensorFlow needs a length that is known before the run.
    carries, outputs = tf.scan(
        lambda last, x: step(last[0], x), tree.map_structure(_swap, inputs), (carry, output)
    )
    return tree.map_structure(lambda x: x[-1], carries), tree.map_structure(_swap, outputs)


def _swap(x: Any) -> Any:
    return ops.swapaxes(x, 0, 1)


def _rematerialized(step: Callable[..., Any]) -> Callable[..., Any]:
    """`keras.remat(step)` that on TensorFlow also takes nested structures, and booleans in XLA."""

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

    TensorFlow's own, which Keras uses, refuses second derivatives.
    """
    if _BACKEND != "tensorflow":
        return keras.remat(function)
    import tensorflow as tf

    @tf.custom_gradient
    def recomputed(*inputs: Any) -> Any:
        def gradient(*upstream: Any, variables: Any = ()) -> Any:
            # XLA drops control dependencies and would compute everything again at once, in the
            # forward pass. So the inputs depend on what asks for them, by a zero that XLA can't
            # know to be one: `asked` could be NaN.
            asked = sum(
                tf.cast(tf.reduce_max(tf.reshape(x, (-1,))[:1]), "float32") for x in upstream
            )
            zero = tf.stop_gradient(tf.where(asked == asked, 0.0, asked))
            with tf.GradientTape() as tape:
                again = [
                    x + tf.cast(zero, x.dtype) if x.dtype.is_floating else tf.identity(x)
                    for x in inputs
                ]
                tape.watch([x for x in again if x.dtype.is_floating])
                outputs = function(*again)
            found = tape.gradient(outputs, [*again, *variables], output_gradients=upstream)
            # Gradients of variables that the function uses are returned separately.
            return (found[: len(again)], found[len(again) :]) if variables else found

        return function(*map(tf.stop_gradient, inputs)), gradient  # nothing is recorded

    return recomputed


class SequenceAxis:
    """A sequence split over devices along a mesh axis, seen inside `jax.shard_map`.

    Args:
        name: the mesh axis.

    Raises:
        RuntimeError: on a backend other than JAX, which alone has `shard_map`.
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
