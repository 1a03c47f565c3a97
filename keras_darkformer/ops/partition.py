"""How a sequence is cut into blocks, and a block into chunks."""

import keras
from keras import ops

from keras_darkformer.ops.backend import block_length, reshape
from keras_darkformer.types import Tensor


def block_partition(length: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and tokens per block, at least one, that cover `length` with little padding.

    A block without chunks holds less: it may have twice the tokens.
    """
    length = at_least_one(length)
    blocks = _blocks(length, 2)
    return blocks, _parts(length, blocks)


def _blocks(length: Tensor, times: int = 1, least: int = 1) -> Tensor:
    """Blocks of so many times the usual tokens, and of `least`, that cover `length`."""
    if isinstance(length, int):
        most = max(times * block_length(length), least)
        # `torch.compile` then knows how many, if not how long: a loop in Python goes over them.
        blocks = 1
        while blocks * most < length:
            blocks += 1
        return blocks
    if not ops.is_tensor(length):  # a size that stands for any
        return 1
    return _parts(length, max(times * block_length(None), least))


def _parts(length: Tensor, size: Tensor) -> Tensor:
    """How many parts of so many hold all.

    `torch.compile` gets the shorter `-(-length // size)` wrong where it does not know the length.
    """
    return (length + size - 1) // size


def at_least_one(length: Tensor) -> Tensor:
    """`length`, or 1: a sequence without tokens goes through as one that is padding.

    A size that stands for any, where Keras asks JAX for shapes alone, is at least 2.
    """
    if isinstance(length, int):
        return max(1, length)
    return ops.maximum(1, length) if ops.is_tensor(length) else length


def pick_chunk_size(head_dim: int, groups: int) -> int:
    """Tokens per chunk of the causal form: measured on CPU, alike on all backends.

    A chunk costs scores of its length by its length, and a state. Large heads have large states; in
    a group of query heads the scores are as many times as tall, the state is not.
    """
    if groups >= 8:
        return 32
    return 128 if head_dim > 128 and groups == 1 else 64


def chunk_partition(
    length: Tensor, head_dim: int, groups: int, chunk_size: int | None
) -> tuple[Tensor, Tensor, int]:
    """Blocks, chunks per block and chunk size that cover `length` with little padding.

    They hold at least one token.
    """
    length = at_least_one(length)
    if chunk_size is None:
        chunk_size = pick_chunk_size(head_dim, groups)
    if isinstance(length, int) and length < chunk_size:
        chunk_size = length
    chunks = _parts(length, chunk_size)
    blocks = _blocks(length, least=chunk_size)
    return blocks, _parts(chunks, blocks), chunk_size


def split_blocks(inputs: dict[str, Tensor], blocks: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """`(b, length, ...) -> (b, blocks, tokens, ...)`, filled up before the first token.

    Behind the last one, what fills up would push the last tokens out of a window. Keys that fill up
    are masked: a `mask` that is `None` then becomes one. Other inputs that are `None` are left
    out.
    """
    batch, length = shape_of(next(iter(inputs.values())))[:2]
    is_whole = isinstance(tokens, int) and blocks * tokens == length
    if not is_whole and "mask" in inputs and inputs["mask"] is None:
        inputs = inputs | {"mask": ops.ones((batch, length), dtype="bool")}
    parts = {}
    for name, x in inputs.items():
        if x is not None:
            if len(x.shape) == 2:  # a mask may have one row for all
                x = ops.broadcast_to(x, (batch, ops.shape(x)[1]))
            x = pad_front(x, blocks * tokens - ops.shape(x)[1])
            parts[name] = reshape(x, (batch, blocks, tokens, *x.shape[2:]))
    return parts


def join_blocks(output: Tensor, length: Tensor) -> Tensor:
    """`(b, blocks, tokens, n, v) -> (b, length, n, v)`."""
    batch, blocks, tokens, *sizes = shape_of(output)
    output = reshape(output, (batch, blocks * tokens, *sizes))
    return output[:, blocks * tokens - length :]


def tokens_first(output: Tensor, length: Tensor, groups: int) -> Tensor:
    """`(b, k, t * g, v) -> (b, t, n, v)`."""
    batch, kv_heads, _, value_dim = shape_of(output)
    output = reshape(output, (batch, kv_heads, length, groups, value_dim))
    output = ops.transpose(output, (0, 2, 1, 3, 4))
    return reshape(output, (batch, length, kv_heads * groups, value_dim))


def pad_front(x: Tensor, amount: Tensor) -> Tensor:
    """Zeros before axis 1. `ops.pad` takes no amount that is a tensor."""
    if isinstance(amount, int) and not amount:
        return x
    shape = shape_of(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    zeros = ops.zeros((shape[0], amount, *shape[2:]), dtype=dtype)
    return ops.concatenate([zeros, x], axis=1)


def shape_of(x: Tensor) -> tuple[Tensor, ...]:
    """Static sizes as ints, the others as scalar tensors."""
    return tuple(ops.shape(x))
