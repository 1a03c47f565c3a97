import keras
import numpy as np
import pytest
from backends import BACKEND, compiled, to_numpy
from keras import ops

from keras_darkformer.layers.masks import merge_masks, split_attention_mask

from .helpers import BATCH, LENGTH, PADDING, WIDTH, attention, normal

CAUSAL = np.tri(LENGTH, dtype=bool)
# No key at the start: with the causal mask the first queries have nothing to attend to.
LEFT_PADDING = PADDING[:, ::-1]


def rows(padding):
    """The same keys for every query."""
    return np.repeat(padding[:, None], LENGTH, axis=1)


def band(width):
    index = np.arange(LENGTH)
    return np.abs(index[:, None] - index) < width


@pytest.mark.parametrize("heads", [False, True], ids=["", "with_a_head_axis"])
@pytest.mark.parametrize(
    ("mask", "causal", "padding"),
    [
        pytest.param(PADDING[:, None], False, PADDING, id="padding_in_one_row"),
        pytest.param(rows(PADDING), False, PADDING, id="padding_in_every_row"),
        pytest.param(rows(PADDING)[:, :3], False, PADDING, id="padding_of_a_longer_key"),
        pytest.param(rows(PADDING & False), False, PADDING & False, id="no_key_at_all"),
        pytest.param(CAUSAL[None], True, np.ones((1, LENGTH), bool), id="causal"),
        pytest.param(rows(PADDING) & CAUSAL, True, PADDING, id="causal_and_padding"),
        pytest.param(rows(LEFT_PADDING) & CAUSAL, True, LEFT_PADDING, id="causal_and_left_padding"),
    ],
)
def test_masks_of_keys_and_of_the_past_are_understood(mask, causal, padding, heads):
    mask = ops.convert_to_tensor(mask[:, None] if heads else mask)
    found_causal, found_padding = split_attention_mask(mask)
    assert found_causal is causal
    np.testing.assert_array_equal(to_numpy(found_padding), padding)


def test_a_mask_of_two_axes_has_no_batch():
    causal, padding = split_attention_mask(CAUSAL)
    assert causal is True
    assert to_numpy(padding).all()
    causal, padding = split_attention_mask(rows(PADDING)[0])
    assert causal is False
    np.testing.assert_array_equal(to_numpy(padding), PADDING[:1])


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_masks_of_numbers_are_read_as_booleans(dtype):
    causal, padding = split_attention_mask((rows(PADDING) & CAUSAL).astype(dtype))
    assert causal is True
    np.testing.assert_array_equal(to_numpy(padding), PADDING)


def test_a_single_query_sees_what_its_row_says():
    causal, padding = split_attention_mask(PADDING[:, None])
    assert causal is False
    np.testing.assert_array_equal(to_numpy(padding), PADDING)
    symbolic = keras.KerasTensor((None, 1, LENGTH), dtype="bool")
    causal, padding = split_attention_mask(symbolic)
    assert causal is False
    assert padding.shape == (None, LENGTH)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(np.random.default_rng(0).random((BATCH, LENGTH, LENGTH)) < 0.5, id="random"),
        pytest.param(band(3)[None], id="banded"),
        pytest.param((band(3) & CAUSAL)[None], id="causal_sliding_window"),
        pytest.param(CAUSAL.T[None], id="anticausal"),
        pytest.param(CAUSAL[None, :, :-1], id="causal_of_fewer_keys"),
        pytest.param(np.stack([CAUSAL, CAUSAL | True]), id="causal_in_one_row_of_the_batch"),
        pytest.param(np.tri(LENGTH, k=-1, dtype=bool)[None], id="strictly_causal"),
    ],
)
def test_other_masks_are_refused(mask):
    with pytest.raises(ValueError, match=r'arbitrary `attention_mask`.*attention_mode="exact"'):
        split_attention_mask(ops.convert_to_tensor(mask))


@pytest.mark.parametrize("shape", [(LENGTH,), (1,) * 5])
def test_shapes_that_are_no_mask_are_refused(shape):
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape .*Received: shape"):
        split_attention_mask(np.ones(shape, bool))


def test_heads_may_have_masks_of_their_own_if_these_agree():
    heads = np.repeat((rows(PADDING) & CAUSAL)[:, None], 4, axis=1)
    causal, padding = split_attention_mask(heads)
    assert causal
    np.testing.assert_array_equal(to_numpy(padding), PADDING)
    heads[0, 1, 2, 2] = False
    with pytest.raises(ValueError, match="differs, or may differ, between heads"):
        split_attention_mask(heads)


def test_a_symbolic_mask_is_padding_if_it_has_one_row_and_refused_else():
    one_row = keras.KerasTensor((None, 1, LENGTH), dtype="bool")
    causal, padding = split_attention_mask(one_row)
    assert causal is False
    assert padding.shape == (None, LENGTH)
    square = keras.KerasTensor((None, LENGTH, LENGTH), dtype="bool")
    with pytest.raises(ValueError, match="use_causal_mask=True"):
        split_attention_mask(square)


@pytest.mark.skipif(BACKEND == "torch", reason="torch runs eagerly")
def test_a_traced_mask_is_padding_if_it_has_one_row_and_refused_else():
    @compiled
    def padding(mask):
        return split_attention_mask(mask)[1]

    one_row = ops.convert_to_tensor(PADDING[:, None])
    np.testing.assert_array_equal(to_numpy(padding(one_row)), PADDING)
    with pytest.raises(ValueError, match="use_causal_mask=True"):
        padding(ops.convert_to_tensor(rows(PADDING)))


def test_merged_masks_apply_together():
    assert merge_masks(None, None) is None
    for first, second in ((PADDING, None), (None, PADDING)):
        np.testing.assert_array_equal(merge_masks(first, second), PADDING)
    both = merge_masks(ops.convert_to_tensor(PADDING), ops.convert_to_tensor(LEFT_PADDING * 1.0))
    np.testing.assert_array_equal(to_numpy(both), PADDING & LEFT_PADDING)


@pytest.mark.parametrize("mode", ["linear", "exact"])
def test_an_attention_mask_of_another_length_is_refused(mode):
    x = normal(BATCH, LENGTH, WIDTH)
    mask = np.ones((BATCH, 3, LENGTH), bool)
    with pytest.raises(ValueError, match=r"`attention_mask` must end in .*\(7, 7\)"):
        attention(attention_mode=mode)(x, x, attention_mask=mask)
