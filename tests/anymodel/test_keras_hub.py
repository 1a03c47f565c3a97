"""KerasHub's `TransformerEncoder`, `TransformerDecoder` and cached attention in a user's model."""

import json

import keras
import numpy as np
import pytest
from backends import BACKEND, compiled, largest_intermediate, on_one_backend, to_numpy
from fresh_process import run_python
from keras import ops
from keras_hub.layers import CachedMultiHeadAttention, TransformerDecoder, TransformerEncoder
from layers.helpers import assert_close, differ, normal, scrambled

from keras_darkformer import (
    approximation_report,
    calibrate,
    convert_to_dark,
    transfer_attention,
)
from keras_darkformer.layers.core import observed
from keras_darkformer.ops.reference import dark_attention_reference

from .models import CAUSAL, LENGTH, OTHER, OTHER_PADDING, PADDING, WIDTH, X, Y, dark_layers_of

EXACT = {"attention_mode": "exact", "geometry_scale": 1.0}
PAIRS = np.random.default_rng(3).random((2, LENGTH, LENGTH)) < 0.7
# A block, what it is called with, and the masks that its attention layers are to have.
BLOCKS = {
    "encoder": (
        TransformerEncoder,
        {"inputs": X, "padding_mask": PADDING},
        [{"key_mask": PADDING}],
    ),
    "decoder": (TransformerDecoder, {"decoder_sequence": X}, [{"causal": True}]),
    "padded decoder": (
        TransformerDecoder,
        {"decoder_sequence": X, "decoder_padding_mask": PADDING},
        [{"causal": True, "key_mask": PADDING}],
    ),
    "decoder in both directions": (
        TransformerDecoder,
        {"decoder_sequence": X, "decoder_padding_mask": PADDING, "use_causal_mask": False},
        [{"key_mask": PADDING}],
    ),
    "decoder of an encoder": (
        TransformerDecoder,
        {"decoder_sequence": X, "encoder_sequence": Y, "encoder_padding_mask": OTHER_PADDING},
        [{"causal": True}, {"key_mask": OTHER_PADDING}],
    ),
}


def block(which, **options):
    """A block none of whose weights is at its initial value, how it is called, and its masks."""
    make, inputs, masks = BLOCKS[which]
    layer = make(16, 2, normalize_first=True, name="block", **options)
    shapes = [inputs[name].shape for name in list(inputs)[:1]]
    layer.build(*shapes, *([Y.shape] if "encoder_sequence" in inputs else []))
    return scrambled(layer), lambda **more: to_numpy(called(layer, {**inputs, **more})), masks


def called(layer, inputs):
    """As in `fit` and `predict`: compiled where the backend compiles."""
    static = {name: x for name, x in inputs.items() if isinstance(x, bool)}
    given = {name: ops.convert_to_tensor(x) for name, x in inputs.items() if name not in static}
    return compiled(lambda given: layer(**given, **static))(given)


def dark(model, **options):
    return convert_to_dark(model, **{"num_features": 8, "seed": 3} | options)


@pytest.mark.parametrize("which", BLOCKS)
def test_exact_mode_is_the_stock_block_and_linear_mode_the_definition(which):
    layer, output, masks = block(which)
    expected = output()
    assert_close(to_numpy(dark(layer, copy=True, **EXACT)(**BLOCKS[which][1])), expected)
    dark(layer)
    found, layers = output(), dark_layers_of(layer)
    assert len(layers) == len(masks)
    by_layer = dict(zip(map(id, layers), masks, strict=True))

    def definition(layer, heads):
        parts = (heads.unrotated_query, heads.unrotated_key, heads.value)
        weights = (layer.feature_map.geometry, layer.feature_map.projection)
        output, _ = dark_attention_reference(
            *to_numpy(list(parts)), *(to_numpy(x.value) for x in weights), **by_layer[id(layer)]
        )
        return ops.convert_to_tensor(output, "float32")

    with observed(layers, definition):
        assert_close(found, to_numpy(layer(**BLOCKS[which][1])), 1e-4)
    assert differ(found, expected)


def test_a_decoder_makes_no_mask_of_all_pairs():
    length = 256
    layer = TransformerDecoder(16, 2)
    layer.build((1, length, WIDTH))
    x, mask = normal(1, length, WIDTH), np.ones((1, length), "int32")

    def largest():
        return largest_intermediate(lambda x, mask: layer(x, decoder_padding_mask=mask), x, mask)

    assert largest() >= length * length
    dark(layer, chunk_size=16)
    assert largest() < length * length


def test_a_decoder_takes_masks_of_keras_and_of_pairs_that_are_padding_or_causal():
    layer, output, _ = block("decoder")
    dark(layer)
    padded = output(decoder_padding_mask=PADDING)
    tokens = ops.convert_to_tensor(X)
    keras.src.backend.set_keras_mask(tokens, ops.convert_to_tensor(PADDING))
    assert_close(to_numpy(layer(tokens)), padded)
    keys = np.repeat(PADDING[:, None], LENGTH, axis=1)
    assert_close(to_numpy(layer(X, decoder_attention_mask=keys)), padded)
    both = {"decoder_attention_mask": keys & CAUSAL, "use_causal_mask": False}
    assert_close(to_numpy(layer(X, **both)), padded)
    with pytest.raises(ValueError, match=r"'block/self_attention': .*arbitrary `attention_mask`"):
        layer(X, decoder_attention_mask=PAIRS)
    if BACKEND != "torch":
        with pytest.raises(ValueError, match=r"'block/self_attention': .*no values yet"):
            output(decoder_attention_mask=PAIRS)


def test_a_decoder_carries_a_state_from_token_to_token():
    layer, output, _ = block("padded decoder")
    dark(layer)
    attention = layer._self_attention_layer
    cache, found = attention.get_initial_state(2), []
    for t in range(LENGTH):
        here = slice(t, t + 1)
        part, cache = layer(
            X[:, here],
            decoder_padding_mask=PADDING[:, here],
            self_attention_cache=cache,
            self_attention_cache_update_index=t,
        )
        found.append(to_numpy(part))
    assert_close(np.concatenate(found, axis=1), output(), 1e-4)
    keys_and_values = np.zeros((2, 2, LENGTH, 2, 4), "float32")
    with pytest.raises(
        ValueError, match=r"recurrent state, not keys and values.*get_initial_state"
    ):
        layer(X, self_attention_cache=keys_and_values, self_attention_cache_update_index=0)


def test_a_decoder_of_an_encoder_carries_a_state_where_cross_attention_stays_exact():
    layer, output, _ = block("decoder of an encoder")
    both = dark(layer, copy=True)
    dark(layer, layers=["self_attention"])
    cache = layer._self_attention_layer.get_initial_state(2)
    others = {"encoder_sequence": Y, "encoder_padding_mask": OTHER_PADDING}
    empty = np.zeros((2, 2, OTHER, 2, 4), "float32")
    found, _, filled = layer(
        X,
        **others,
        self_attention_cache=cache,
        self_attention_cache_update_index=0,
        cross_attention_cache=empty,
        cross_attention_cache_update_index=0,
    )
    assert_close(to_numpy(found), output(), 1e-4)
    assert differ(to_numpy(filled), empty)
    cache = both._self_attention_layer.get_initial_state(2)
    with pytest.raises(ValueError, match=r"'block/cross_attention': .* `cache` is for self-att"):
        both(X, **others, self_attention_cache=cache, cross_attention_cache=empty)


def test_cached_attention_alone_is_called_as_the_stock_layer():
    layer = CachedMultiHeadAttention(2, 4, name="cached")
    layer.build(X.shape, X.shape)
    scrambled(layer)
    cache = np.zeros((2, 2, LENGTH, 2, 4), "float32")
    calls = (
        {"attention_mask": CAUSAL[None] & PADDING[:, None]},
        {"attention_mask": PAIRS, "return_attention_scores": True},
        {"cache": cache, "cache_update_index": 0},
    )
    expected = [to_numpy(layer(X, X, **options)) for options in calls]
    exact = dark(layer, copy=True, **EXACT)
    for options, wanted in zip(calls, expected, strict=True):
        keras.tree.map_structure(assert_close, to_numpy(exact(X, X, **options)), wanted)
    dark(layer)
    causal = to_numpy(layer(X, X, attention_mask=CAUSAL[None]))
    state = layer.get_initial_state(2)
    first, then = ops.convert_to_tensor(X[:, :4]), ops.convert_to_tensor(X[:, 4:])
    found, state = layer(first, first, cache=state)
    rest, _ = layer(then, then, cache=state)
    assert_close(np.concatenate(to_numpy([found, rest]), axis=1), causal, 1e-4)
    with pytest.raises(ValueError, match="'cached': `return_attention_scores=True` needs"):
        layer(X, X, return_attention_scores=True)


@keras.saving.register_keras_serializable("tests")
class Inside(keras.layers.Layer):
    """Has a decoder in it that nothing but its constructor tells of."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.decoder = TransformerDecoder(16, 2, name="inner")

    def build(self, shape):
        self.decoder.build(shape)

    def call(self, x, mask):
        return self.decoder(x, decoder_padding_mask=mask)


def of_blocks():
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    mask = keras.Input((None,), dtype="int32", name="mask")
    encoded = keras.Input((None, WIDTH), name="encoded")
    x = keras.layers.Embedding(20, WIDTH)(tokens)
    x = TransformerDecoder(16, 2, name="cross")(x, encoded, decoder_padding_mask=mask)
    x = Inside(name="inside")(x, mask)
    x = TransformerEncoder(16, 2, name="encoder")(x, padding_mask=mask)
    inputs = {"tokens": tokens, "mask": mask, "encoded": encoded}
    return scrambled(keras.Model(inputs, keras.layers.Dense(3)(x)))


BATCH = {
    "tokens": np.random.default_rng(0).integers(0, 20, (2, LENGTH)),
    "mask": PADDING.astype("int32"),
    "encoded": Y,
}
NAMES = ["self_attention", "cross_attention", "self_attention", "self_attention_layer"]


def test_a_decoder_is_fitted_calibrated_transferred_and_judged(few_steps):
    inputs = {"x": keras.Input((None, WIDTH), name="x")}
    inputs["mask"] = keras.Input((None,), dtype="bool", name="mask")
    outputs = TransformerDecoder(16, 2)(inputs["x"], decoder_padding_mask=inputs["mask"])
    model = dark(keras.Model(inputs, outputs))
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    (layer,) = dark_layers_of(model)
    before = to_numpy(layer.feature_map.geometry.value)
    data = {"x": X, "mask": PADDING}
    losses = model.fit(data, np.zeros_like(X), epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert differ(to_numpy(layer.feature_map.geometry.value), before)
    scrambled(layer.feature_map)
    options = {"steps": 3, "validate_every": 1, "learning_rate": 1e-2, "verbose": 0}
    losses = transfer_attention(model, data, **options).history["loss"]
    assert losses[-1] < losses[0]
    calibrate(model, data, refine=False, verbose=False)
    report = approximation_report(model, data).summary()
    assert report["relative_error"]["dark"] < report["relative_error"]["uniform"]


def test_a_model_of_blocks_is_saved_loaded_and_cloned_dark(tmp_path):
    model = dark(of_blocks())
    assert [x.name for x in dark_layers_of(model)] == NAMES
    expected = to_numpy(model(BATCH))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for again in (loaded, clone):
        assert [type(x) for x in dark_layers_of(again)] == [type(x) for x in dark_layers_of(model)]
        assert_close(to_numpy(again(BATCH)), expected)
    assert_close(loaded.predict(BATCH, verbose=0), expected)


def test_a_copy_leaves_a_model_of_blocks_as_it_is():
    model = of_blocks()
    expected = to_numpy(model(BATCH))
    assert_close(to_numpy(dark(model, copy=True, **EXACT)(BATCH)), expected)
    assert differ(to_numpy(dark(model, copy=True)(BATCH)), expected)
    assert not dark_layers_of(model)
    assert type(model.get_layer("cross")) is TransformerDecoder
    assert_close(to_numpy(model(BATCH)), expected)


class Scaled(CachedMultiHeadAttention):
    def call(self, query, value, key=None):
        return 2.0 * super().call(query, value)


def test_what_a_subclass_changes_is_refused_and_nothing_is_changed():
    model = of_blocks()
    before = [type(x) for x in model._flatten_layers()]
    x = model.output
    more = keras.Model(model.input, Scaled(2, 4)(x, x))
    with pytest.raises(
        ValueError, match="Scaled has its own `call`, and what it changes there of C"
    ):
        dark(more)
    with pytest.raises(ValueError, match="one for each of the 4 converted layers"):
        dark(model, num_features=[1, 2])
    assert [type(x) for x in model._flatten_layers()] == before


SESSION = """
    import json, sys
    import keras, numpy as np
    import keras_darkformer.hub
    sys.path.insert(0, "tests")
    import anymodel.test_keras_hub as here

    model = keras.saving.load_model(sys.argv[1])
    again = here.dark(here.of_blocks())
    again.load_weights(sys.argv[2])
    found = [keras.ops.convert_to_numpy(x(here.BATCH)).tolist() for x in (model, again)]
    print(json.dumps([found, [x.name for x in here.dark_layers_of(model)]]))
"""


@pytest.mark.slow
@on_one_backend
def test_a_fresh_process_loads_a_model_of_blocks_dark(tmp_path):
    model = dark(of_blocks())
    paths = [tmp_path / "model.keras", tmp_path / "model.weights.h5"]
    model.save(paths[0])
    model.save_weights(paths[1])
    with pytest.raises(ValueError, match="object <EinsumDense name=key"):
        of_blocks().load_weights(paths[1])
    outputs, names = json.loads(run_python(SESSION, *paths).splitlines()[-1])
    assert names == NAMES
    for output in outputs:
        assert_close(np.asarray(output), to_numpy(model(BATCH)))
