"""Every query sees every key: bidirectional and cross attention.

All keys enter the sums, and then every query reads them. Long sequences are processed in blocks
whose tensors fit into a cache.
"""

from keras_darkformer.ops.backend import product, scan
from keras_darkformer.ops.call import Call
from keras_darkformer.ops.features import FoldedFeatures
from keras_darkformer.ops.partition import (
    block_partition,
    join_blocks,
    shape_of,
    split_blocks,
    tokens_first,
)
from keras_darkformer.ops.state import State
from keras_darkformer.ops.sums import (
    Sums,
    add_keys,
    by_head,
    features_of_keys,
    features_of_queries,
    normalize,
    pack,
    split_last,
    unpack,
)
from keras_darkformer.types import Tensor


def parallel(
    query: Tensor, key: Tensor, value: Tensor, features: FoldedFeatures, state: State, call: Call
) -> tuple[Tensor, State]:
    """Output `(b, t, n, v)` in float32, and the state after all keys; see `attention.attend`."""
    state = absorb(key, value, features, state, call)
    return read(query, features, state, call), state


def absorb(key: Tensor, value: Tensor, features: FoldedFeatures, state: State, call: Call) -> State:
    """The state with all keys added, block by block."""
    rows, length = shape_of(key)[:2]
    blocks, tokens = block_partition(length, rows)
    inputs = split_blocks({"key": key, "value": value, "mask": call.key_mask}, blocks, tokens)

    def step(sums: Sums, block: dict[str, Tensor], features: FoldedFeatures) -> tuple[Sums, Tensor]:
        keys = features_of_keys(
            block["key"], block["value"], block.get("mask"), features, dtype=call.products
        )
        return add_keys(sums, keys), ()

    return unpack(scan(step, pack(state), inputs, features, remat=call.remat)[0])


def read(query: Tensor, features: FoldedFeatures, state: State, call: Call) -> Tensor:
    """What every query reads from the state, block by block."""
    batch, length, num_heads = shape_of(query)[:3]
    blocks, tokens = block_partition(length, batch)
    inputs = split_blocks({"query": query}, blocks, tokens)

    def step(
        carry: Tensor, block: dict[str, Tensor], constants: tuple[FoldedFeatures, Tensor]
    ) -> tuple[Tensor, Tensor]:
        features, both = constants
        query, groups = block["query"], block["query"].shape[2] // features.num_heads
        query = by_head(query, features.num_heads)
        of_queries, _ = features_of_queries(query, features, dtype=call.products)
        sums = product(of_queries, both)
        return carry, tokens_first(normalize(*split_last(sums)), tokens, groups)

    constants = features, pack(state).both
    shapes = [(batch, tokens, num_heads, state.kv_state.shape[3])]
    output = scan(step, (), inputs, constants, shapes=shapes, remat=call.remat)[1]
    return join_blocks(output, length)
