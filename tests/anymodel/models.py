"""Small Keras models and layers with Keras' own attention, and what they are judged by."""

import keras
import numpy as np
from backends import to_numpy
from keras.layers import GroupQueryAttention, MultiHeadAttention
from layers.helpers import arrays, normal, scrambled

from keras_darkformer import convert_to_dark  # noqa: F401  for a fresh process
from keras_darkformer.anymodel.attention import DarkKerasAttention
from keras_darkformer.anymodel.finding import attention_layers
from keras_darkformer.ops.reference import dark_attention_reference

BATCH, LENGTH, OTHER, WIDTH = 2, 6, 5, 8
X, Y, Z = normal(BATCH, LENGTH, WIDTH), normal(BATCH, OTHER, WIDTH, seed=1), normal(BATCH, OTHER, 8)
PADDING = np.arange(LENGTH) < np.array([[3], [5]])
OTHER_PADDING = np.arange(OTHER) < np.array([[4], [2]])
CAUSAL = np.tri(LENGTH, dtype=bool)

# Every option of the stock layers that linear attention has to do with.
KINDS = {
    "multi-head": lambda **o: MultiHeadAttention(2, 4, **o),
    "of other sizes": lambda **o: MultiHeadAttention(
        3, 4, value_dim=5, output_shape=(2, 3), use_bias=False, **o
    ),
    "gated": lambda **o: MultiHeadAttention(2, 4, use_gate=True, value_dim=3, **o),
    "grouped": lambda **o: GroupQueryAttention(4, 4, 2, **o),
    "grouped and gated": lambda **o: GroupQueryAttention(4, 4, 1, use_gate=True, **o),
}


def built(kind, shapes=((BATCH, LENGTH, WIDTH),) * 2, **options):
    """A stock layer none of whose weights is at its initial value."""
    layer = KINDS[kind](**options)
    layer.build(*shapes)
    return scrambled(layer)


def dark_layers_of(model):
    return [x for x in attention_layers(model) if isinstance(x, DarkKerasAttention)]


def weights_of(layer):
    """The stock weights by path, as arrays."""
    return {w.path: to_numpy(w.value) for w in layer.weights if "/feature_map/" not in w.path}


def reference(layer, query, value, key=None, **masks):
    """What a dark layer in linear mode means, in float64 and from its weights."""

    def project(dense, x, to="btd,dnh->btnh"):
        out = np.einsum(to, np.asarray(x, "float64"), arrays(dense.kernel))
        return out + (0.0 if dense.bias is None else arrays(dense.bias))

    attended, _ = dark_attention_reference(
        project(layer._query_dense, query),
        project(layer._key_dense, value if key is None else key),
        project(layer._value_dense, value),
        arrays(layer.feature_map.geometry),
        arrays(layer.feature_map.projection),
        **masks,
    )
    if hasattr(layer, "_gate_dense"):
        attended = attended / (1.0 + np.exp(-project(layer._gate_dense, query)))
    dense = layer._output_dense
    rest = "ef"[: len(dense.kernel.shape) - 2]
    return project(dense, attended, f"btnh,nh{rest}->bt{rest}")


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """A layer of a user's own that makes its attention itself, one of the two when it is built."""

    def __init__(self, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.dropout = dropout
        self.attention = MultiHeadAttention(2, 4, dropout=dropout)
        self.norm = keras.layers.LayerNormalization()

    def build(self, shape):
        self.attention.build(shape, shape)
        self.causal = GroupQueryAttention(4, 2, 1)
        self.causal.build(shape, shape)
        self.norm.build(shape)

    def call(self, x):
        x = x + self.attention(x, x)
        return self.norm(x + self.causal(x, x, use_causal_mask=True))

    def get_config(self):
        return {**super().get_config(), "dropout": self.dropout}


@keras.saving.register_keras_serializable("tests")
class Own(keras.Model):
    """A model of a user's own, without a config of its own."""

    def __init__(self, width=WIDTH, **kwargs):
        super().__init__(**kwargs)
        self.block = Block()
        self.top = keras.layers.Dense(width)

    def call(self, x):
        return self.top(self.block(x))


def functional():
    """Nested models, a shared layer, one in a wrapper, and a layer of a user's own."""
    inputs = keras.Input((None, WIDTH))
    shared = MultiHeadAttention(2, 4, name="shared")
    x = inputs + shared(inputs, inputs)
    inner = keras.Input((None, WIDTH))
    inside = GroupQueryAttention(4, 4, 2, name="inside")(inner, inner, use_causal_mask=True)
    x = x + keras.Model(inner, inside, name="nested")(x)
    x = x + shared(x, x)
    x = Block(name="block")(x)
    steps = keras.layers.Reshape((-1, 2, WIDTH))(x)
    x = keras.layers.TimeDistributed(Pair(name="pair"))(steps)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


@keras.saving.register_keras_serializable("tests")
class Pair(keras.layers.Layer):
    """Attends among the few tokens that a wrapper hands it."""

    def build(self, shape):
        self.attention = MultiHeadAttention(2, 4, name="of_pair")
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)

    def compute_output_shape(self, shape):
        return shape


def sequential():
    return keras.Sequential([keras.Input((None, WIDTH)), Block(), keras.layers.Dense(3)])


def own():
    model = Own()
    model(X)
    return model


MODELS = {"functional": functional, "sequential": sequential, "own": own}


def outputs(model, *inputs, **options):
    return to_numpy(model(*inputs, **options))
