"""Layers take a batch without rows and sequences without tokens, as stock layers do."""

import keras
import numpy as np
import pytest
from backends import further, to_numpy

from keras_darkformer import DarkAttention, DarkTransformerBlock

from .helpers import HEADS, WIDTH, call, normal

MEMORY = {"sliding_window": 3, "num_sinks": 1, "cache_size": 2}
KINDS = {
    "dark": {},
    "rope": {"rope_max_wavelength": 100.0},
    "before": {"rope_max_wavelength": 100.0, "rope_geometry": "before"},
    "exponential": {"feature_map": "exponential"},
    "memory": MEMORY,
    "memory alone": {"feature_map": "none", "sliding_window": 3},
    "exact": {"attention_mode": "exact"},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@kinds
@pytest.mark.parametrize("shape", [(0, 5), (0, 1), (2, 0)], ids=str)
def test_attention_of_nothing_has_the_shape_of_stock_attention(shape, options):
    x, mask = normal(*shape, WIDTH), np.ones(shape, bool)
    layer = DarkAttention(**HEADS | options)
    sizes = {name: HEADS[name] for name in HEADS if name != "num_features"}
    stock = keras.layers.GroupQueryAttention(**sizes)
    layer.build((2, 5, WIDTH), (2, 5, WIDTH))
    causal = "sliding_window" in options
    masks = {"query_mask": mask, "value_mask": mask}
    for given in ({}, masks) if options in ({}, MEMORY) else (masks,):
        output = call(layer, x, x, use_causal_mask=causal, **given)
        assert tuple(output.shape) == tuple(stock(x, x, use_causal_mask=causal).shape)
    if layer.is_linear:
        state = layer.get_initial_state(shape[0])
        again = {"use_causal_mask": True, "initial_state": state, "return_state": True}
        output, after = call(layer, x, x, **again)
        assert tuple(output.shape) == x.shape
        shapes = [[tuple(leaf.shape) for leaf in keras.tree.flatten(y)] for y in (state, after)]
        assert shapes[0] == shapes[1]


@kinds
def test_queries_that_have_no_keys_give_what_attending_to_nothing_gives(options):
    if "sliding_window" in options:
        pytest.skip("a memory is of self-attention")
    layer = DarkAttention(**HEADS | options)
    layer.build((2, 5, WIDTH), (2, 5, WIDTH))
    query, nothing = normal(2, 3, WIDTH), normal(2, 0, WIDTH)
    some = normal(2, 4, WIDTH)
    expected = layer(query, some, value_mask=np.zeros((2, 4), bool))
    np.testing.assert_allclose(*to_numpy((layer(query, nothing), expected)), atol=1e-6)


@pytest.mark.parametrize("options", [MEMORY, *further({})], ids=["memory", *further("")])
def test_a_model_is_fitted_and_predicts_past_an_empty_batch(options):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(8, WIDTH, mask_zero=True)(tokens)
    x = DarkTransformerBlock(8, 4, num_features=8, rope_max_wavelength=100.0, **options)(x)
    model = keras.Model(tokens, keras.layers.Dense(8)(x))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    ids = np.random.default_rng(0).integers(1, 8, (4, 6))

    class Pieces(keras.utils.PyDataset):
        """The last piece of a filtered data set holds nothing."""

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return ids[4 * index : 4 * index + 4], ids[4 * index : 4 * index + 4]

    model.fit(Pieces(), shuffle=False, verbose=0)
    assert all(np.isfinite(w).all() for w in model.get_weights())
    assert model.predict(Pieces(), verbose=0).shape == (4, 6, 8)
