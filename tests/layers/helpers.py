"""Small inputs and layers, and what they are judged by."""

import contextlib
import inspect
import json

import keras
import numpy as np
from backends import DEFAULT_JIT, compiled, to_numpy, value_and_gradients
from keras import ops, tree

from keras_darkformer import DarkAttention
from keras_darkformer.ops.reference import dark_attention_reference

BATCH, LENGTH, WIDTH = 2, 7, 16
HEADS = {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2, "num_features": 8}

# Options of a feature map and of an attention layer away from their defaults, in order; a second
# set of those that exclude one another.
FEATURE_OPTIONS = {
    "num_features": 10,
    "feature_map": "dark",
    "rank": 3,
    "projection": "gaussian",
    "train_geometry": False,
    "train_projection": True,
    "geometry_scale": 0.5,
    "tie_geometry": False,
    "rope_geometry": "after",
    "sliding_window": 7,
    "num_sinks": 2,
    "cache_size": 3,
    "seed": 5,
}
ATTENTION_OPTIONS = FEATURE_OPTIONS | {
    "attention_mode": "auto",
    "exact_below": 7,
    "chunk_size": 3,
    "remat": True,
}
OTHER_OPTIONS = {"rank": 6, "tie_geometry": True, "rope_geometry": "before"}
NO_MEMORY = {"sliding_window": None, "num_sinks": 0, "cache_size": 0}
EXPONENTIAL_OPTIONS = {"feature_map": "exponential"} | NO_MEMORY

# Real tokens (true) and padding behind them. Every row has some of both.
PADDING = np.arange(LENGTH) < np.array([[4], [6]])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def attention(shapes=((BATCH, LENGTH, WIDTH),) * 2, **options):
    """A built `DarkAttention` for these shapes, none of whose weights is at its initial value."""
    layer = DarkAttention(**HEADS | {"seed": 0} | options)
    layer.build(*shapes)
    return scrambled(layer)


def scrambled(layer):
    """The layer with noise on its trainable weights, biases and geometry included."""
    for seed, weight in enumerate(layer.trainable_weights):
        weight.assign(weight + 0.2 * normal(*weight.shape, seed=seed))
    return layer


def call(function, *inputs, **options):
    """`function(*inputs, **options)`, compiled on JAX.

    There, the first call with new shapes compiles every operation by itself,
    which takes a second or two. With shapes met before, calling is quicker.
    """
    if not DEFAULT_JIT:
        return function(*inputs, **options)
    static = {k: v for k, v in options.items() if v is None or isinstance(v, bool | int | float)}
    traced = {k: v for k, v in options.items() if k not in static}
    return compiled(lambda inputs, traced: function(*inputs, **traced, **static))(inputs, traced)


def arrays(structure):
    """NumPy arrays of tensors, variables and arrays."""
    return to_numpy(tree.map_structure(ops.convert_to_tensor, structure))


def assert_close(actual, expected, tolerance=2e-5):
    tree.map_structure(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance),
        *arrays((actual, expected)),
    )


def differ(first, second):
    return not np.allclose(*arrays((first, second)), rtol=1e-3, atol=1e-3)


def shapes_and_dtypes(structure):
    """The same for symbolic and for real tensors, however the backend spells them."""
    return [
        (tuple(x.shape), keras.backend.standardize_dtype(x.dtype)) for x in tree.flatten(structure)
    ]


def dtypes(structure):
    return {dtype for _, dtype in shapes_and_dtypes(structure)}


def keras_mask(tensor):
    return getattr(tensor, "_keras_mask", None)


@contextlib.contextmanager
def dtype_policy(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def weight_gradients(layer, *inputs, **options):
    """Gradients of a random function of the output by the trainable weights, by their names."""
    if not layer.trainable_weights:
        return {}
    rest = [x.value for x in layer.non_trainable_variables]

    def scalar(*weights):
        output, _ = layer.stateless_call(list(weights), rest, *inputs, **options)
        return ops.sum(output * ops.convert_to_tensor(normal(*output.shape, seed=9)))

    _, gradients = value_and_gradients(scalar, *arrays(layer.trainable_weights))
    return dict(zip(weight_names(layer.trainable_weights), gradients, strict=True))


def weight_names(weights):
    """Paths without the name of the layer they belong to."""
    return [weight.path.partition("/")[2] or weight.path for weight in weights]


def assert_config_is_complete(layer_class, arguments, *instead, but=()):
    """Every constructor argument, given here away from its default, survives `from_config`.

    `instead` holds arguments for further layers: some exclude each other. All
    `but` some can be given away from their defaults.
    """
    parameters = list(inspect.signature(layer_class).parameters.values())[:-1]  # but **kwargs
    assert [p.name for p in parameters] == list(arguments)
    layers = [arguments, *(arguments | others for others in instead)]
    for p in parameters:
        assert any(x[p.name] != p.default for x in layers) == (p.name not in but), p.name
    for of_layer in layers:
        assert_config_restores(layer_class, of_layer)


def assert_config_restores(layer_class, arguments):
    layer = layer_class(**arguments, name="mine", dtype="mixed_bfloat16", trainable=False)
    config = layer.get_config()
    for name, value in arguments.items():
        if hasattr(value, "get_config"):
            assert config[name]["class_name"] == type(value).__name__
            assert config[name]["config"] == value.get_config()
        else:
            assert config[name] == value, name
    restored = layer_class.from_config(json.loads(json.dumps(config)))
    assert restored.get_config() == config
    assert restored.name == "mine"
    assert restored.dtype_policy.name == "mixed_bfloat16"
    assert not restored.trainable
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is layer_class
    assert again.get_config() == config


def reference_attention(layer, query, value, key=None, *, causal=False, key_mask=None):
    """What a `DarkAttention` in linear mode means, in float64 and from its weights."""
    query_positions, key_positions = (np.arange(x.shape[1])[None] for x in (query, value))
    if key_mask is not None:  # padding has no position
        key_positions = np.cumsum(key_mask, axis=1) - 1
    if causal:
        query_positions = key_positions

    def project(dense, x):
        projected = np.einsum("btd,dnh->btnh", x.astype("float64"), arrays(dense.kernel))
        return projected + (0.0 if dense.bias is None else arrays(dense.bias))

    def rotate(x, positions):
        if layer.rope_max_wavelength is None:
            return x
        half = x.shape[-1] // 2
        frequencies = layer.rope_max_wavelength ** (-np.arange(half) / half)
        turns = np.exp(1j * positions[..., None, None] * frequencies)
        pairs = (x[..., :half] + 1j * x[..., half:]) * turns
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    attended, _ = dark_attention_reference(
        rotate(project(layer.query_dense, query), query_positions),
        rotate(project(layer.key_dense, value if key is None else key), key_positions),
        project(layer.value_dense, value),
        arrays(layer.feature_map.geometry),
        arrays(layer.feature_map.projection),
        causal=causal,
        key_mask=key_mask,
    )
    output = np.einsum("btnh,nhd->btd", attended, arrays(layer.output_dense.kernel))
    return output + (0.0 if layer.output_dense.bias is None else arrays(layer.output_dense.bias))
