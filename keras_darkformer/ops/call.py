"""What all forms of attention take besides queries, keys, values, features and a state."""

from typing import NamedTuple

from keras_darkformer.memory import NO_MEMORY, Memory
from keras_darkformer.types import Tensor


class Call(NamedTuple):
    """How attention is called.

    Attributes:
        key_mask: bool, `(b, s)` or `(1, s)`, true = attend, or `None`.
        write_mask: bool, of the same shape, true = enters the state, or `None`.
        memory: `Memory`.
        chunk_size: tokens per chunk, or `None`.
        remat: see `backend.scan`.
        with_state: whether the state that is returned will be used.
        products: the dtype in which features and values are multiplied, unless there is one token
            alone; see `backend.products_dtype`.
    """

    key_mask: Tensor = None
    write_mask: Tensor = None
    memory: Memory = NO_MEMORY
    chunk_size: int | None = None
    remat: bool | None = None
    with_state: bool = False
    products: str = "float32"
