"""The small Gemma that benchmarks measure, and what they ask of a converted model.

Everything here that is not public in keras_darkformer or Keras is used nowhere
else in benchmarks/.
"""

import contextlib

# By name: what differs from the sizes of `gemma`.
SHAPES = {
    # 4 layers with rotary positions, grouped heads
    "h64": {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    # Gemma 2B's heads
    "h256": {"num_query_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
}
SIZES = {
    "vocabulary_size": 1024,
    "num_layers": 4,
    "hidden_dim": 256,
    "intermediate_dim": 1024,
}


def gemma(**sizes):
    """A causal LM of random weights that takes tokens."""
    import keras_hub

    backbone = keras_hub.models.GemmaBackbone(**SIZES | SHAPES["h64"] | sizes)
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)


def dark_layers(model):
    """The converted attention layers, in order; none in a model that is not converted."""
    return list(getattr(model.backbone, "dark_layers", {}).values())


@contextlib.contextmanager
def moved(model, offset):
    """As if the tokens stood so many positions further on."""
    layers = dark_layers(model)
    for layer in layers:
        layer.position_offset = offset
    try:
        yield
    finally:
        for layer in layers:
            layer.position_offset = None


@contextlib.contextmanager
def only_trainable(model, chosen):
    """Freezes all other variables; afterwards all is as it was."""
    chosen = {id(variable) for variable in chosen}
    before = [(variable, variable.trainable) for variable in model.variables]
    for variable, _ in before:
        variable.trainable = id(variable) in chosen
    try:
        yield
    finally:
        for variable, trainable in before:
            variable.trainable = trainable
