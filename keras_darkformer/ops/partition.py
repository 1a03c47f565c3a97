"""How a sequence is cut into blocks, and a block into chunks."""

import keras
from keras import ops

from keras_darkformer.ops.backend import ACCELERATOR_CHUNK, accelerated, block_length, reshape
from keras_darkformer.types import Tensor


def block_partition(length: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and tokens per block, at least one each, that cover `length` with little padding.

    A block without chunks takes less memory, so it may have twice the tokens.
    """
    length = at_least_one(length)
    blocks = _blocks(length, rows, times=2)
    return blocks, _parts(length, blocks)


def _blocks(length: Tensor, rows: Tensor, times: int = 1, least: int = 1) -> Tensor:
    """How many blocks cover `length`, each of at most `times` the usual tokens or `least`."""
    if isinstance(length, int):
        most = max(times * block_length(length, rows), least)
        # This way `torch.compile` knows how many there are, if not how long: a Python loop runs
        # over them.
        blocks = 1
        while blocks * most < length:
            blocks += 1
        return blocks
    if not ops.is_tensor(length):  # a size that stands for any
        return 1
    return _parts(length, max(times * block_length(None, rows), least))


def _parts(length: Tensor, size: Tensor) -> Tensor:
    """How many parts of this size hold everything.

    `torch.compile` gets the shorter `-(-length // size)` wrong if the length is unknown.
    """
    return (length + size - 1) // size


def at_least_one(length: Tensor) -> Tensor:
    """`length`, or 1 if it is 0: an empty sequence is computed as one token of padding.

    A size that stands for any, where Keras asks JAX for shapes alone, is at least 2.
    """
    if isinstance(length, int):
        return max(1, length)
    return ops.maximum(1, length) if ops.is_tensor(length) else length


def pick_chunk_size(head_dim: int, groups: int) -> int:
    """Tokens per chunk of the causal form.

    On CPU, where it was measured, all backends are alike. See `backend.ACCELERATOR_CHUNK`, too.

    A chunk costs scores of its length by its length, and a state. Large heads have large states.
    Each query head of a group adds scores, but no state.
    """
    if ACCELERATOR_CHUNK is not None and accelerated():
        return ACCELERATOR_CHUNK
    if groups >= 8:
        return 32
    return 128 if head_dim > 128 and groups == 1 else 64


def chunk_partition(
    length: Tensor, rows: Tensor, head_dim: int, groups: int, chunk_size: int | None
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
    blocks = _blocks(length, rows, least=chunk_size)
    return blocks, _parts(chunks, blocks), chunk_size


def split_blocks(inputs: dict[str, Tensor], blocks: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """`(b, length, ...) -> (b, blocks, tokens, ...)`, padded before the first token.

    Padding after the last token would push the last tokens out of a window. Padding keys are
    masked: if `mask` is `None`, one is made. Other inputs that are `None` are left out.
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
    """Pads axis 1 with zeros in front. `ops.pad` does not take a tensor as the amount."""
    if isinstance(amount, int) and not amount:
        return x
    shape = shape_of(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    zeros = ops.zeros((shape[0], amount, *shape[2:]), dtype=dtype)
    return ops.concatenate([zeros, x], axis=1)


def shape_of(x: Tensor) -> tuple[Tensor, ...]:
    """Static sizes as ints, the others as scalar tensors."""
    return tuple(ops.shape(x))
