"""Pure functions of tensors: the mathematics, without layers or variables."""

from keras_darkformer.ops.dark_attention import dark_attention
from keras_darkformer.ops.dark_features import apply_geometry, dark_features
from keras_darkformer.ops.exact_attention import (
    exact_dark_attention,
    exact_dark_attention_scores,
)
from keras_darkformer.ops.projections import draw_projection, proposal_log_weight
from keras_darkformer.ops.rotary import rotary_embedding
from keras_darkformer.ops.sequence_parallel import sequence_parallel_dark_attention
from keras_darkformer.ops.state import (
    MemoryState,
    PositionedState,
    State,
    Tokens,
    initial_state,
)

__all__ = [
    "MemoryState",
    "PositionedState",
    "State",
    "Tokens",
    "apply_geometry",
    "dark_attention",
    "dark_features",
    "draw_projection",
    "exact_dark_attention",
    "exact_dark_attention_scores",
    "initial_state",
    "proposal_log_weight",
    "rotary_embedding",
    "sequence_parallel_dark_attention",
]
