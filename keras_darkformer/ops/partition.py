"""How a sequence is cut into blocks, and a block into chunks."""

from typing import Any

import keras
from keras import ops

from keras_darkformer.ops.backend import block_length, reshape


def block_partition(length: Any) -> tuple[int, Any]:
    """Blocks and tokens per block that cover `length` with little padding.

    A block without chunks holds less: it may have twice the tokens. A length
    known only at run time (TensorFlow) makes one block: XLA there has no
    gradient of a loop.
    """
    blocks = -(-length // (2 * block_length(length))) if isinstance(length, int) else 1
    return blocks, -(-length // blocks)


def pick_chunk_size(head_dim: int, groups: int) -> int:
    """Tokens per chunk of the causal form: measured on CPU, alike on all backends.

    A chunk costs scores of its length by its length, and a state. Large heads
    have large states; in a group of query heads the scores are as many times
    as tall, the state is not.
    """
    if groups >= 8:
        return 32
    return 128 if head_dim > 128 and groups == 1 else 64


def chunk_partition(
    length: Any, head_dim: int, groups: int, chunk_size: int | None
) -> tuple[Any, Any, int]:
    """Blocks, chunks per block and chunk size that cover `length` with little padding.

    The one block of a length known only at run time has many chunks; the (N, N)
    decays between them are small change up to some hundred thousand tokens.
    """
    if chunk_size is None:
        chunk_size = pick_chunk_size(head_dim, groups)
    if not isinstance(length, int):
        return 1, (length + chunk_size - 1) // chunk_size, chunk_size
    chunk_size = min(chunk_size, length)
    chunks = -(-length // chunk_size)
    blocks = -(-chunks * chunk_size // max(block_length(length), chunk_size))
    return blocks, -(-chunks // blocks), chunk_size


def split_blocks(inputs: dict[str, Any], key_mask: Any, blocks: int, tokens: Any) -> dict[str, Any]:
    """`(b, length, ...) -> (b, blocks, tokens, ...)`; keys that fill up are masked."""
    batch, length = shape_of(next(iter(inputs.values())))[:2]
    if key_mask is not None:
        key_mask = ops.broadcast_to(ops.cast(key_mask, "bool"), (batch, length))
    if not isinstance(tokens, int) or blocks * tokens != length:
        padding = blocks * tokens - length
        if key_mask is None and "key" in inputs:
            key_mask = ops.ones((batch, length), dtype="bool")
        inputs = {name: _pad(x, padding) for name, x in inputs.items()}
        key_mask = None if key_mask is None else _pad(key_mask, padding)
    if key_mask is not None:
        inputs["key_mask"] = key_mask
    return {name: reshape(x, (batch, blocks, tokens, *x.shape[2:])) for name, x in inputs.items()}


def join_blocks(output: Any, length: Any) -> Any:
    """`(b, blocks, tokens, n, v) -> (b, length, n, v)`."""
    batch, blocks, tokens, *sizes = shape_of(output)
    output = reshape(output, (batch, blocks * tokens, *sizes))
    return output[:, :length]


def tokens_first(output: Any, length: Any) -> Any:
    """`(b, k, t * g, v) -> (b, t, n, v)`."""
    batch, kv_heads, _, value_dim = shape_of(output)
    output = reshape(output, (batch, kv_heads, length, -1, value_dim))
    output = ops.transpose(output, (0, 2, 1, 3, 4))
    return reshape(output, (batch, length, -1, value_dim))


def _pad(x: Any, amount: Any) -> Any:
    """Zeros behind axis 1. `ops.pad` takes no amount that is a tensor."""
    return ops.concatenate([x, _zeros(x, amount)], axis=1)


def _zeros(x: Any, amount: Any) -> Any:
    """Of the other sizes of `x`."""
    shape = shape_of(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    return ops.zeros((shape[0], amount, *shape[2:]), dtype=dtype)


def pad_front(x: Any, amount: Any) -> Any:
    """Zeros before axis 1."""
    return ops.concatenate([_zeros(x, amount), x], axis=1)


def shape_of(x: Any) -> tuple[Any, ...]:
    """Static sizes as ints, the others as scalar tensors."""
    return tuple(ops.shape(x))
