import keras
import numpy as np
import pytest
from backends import DEFAULT_JIT, compiled, to_numpy
from keras import ops, tree

from keras_darkformer import DarkAttention
from keras_darkformer.ops import PositionedState, State

from .helpers import (
    BATCH,
    HEADS,
    LENGTH,
    PADDING,
    WIDTH,
    arrays,
    assert_close,
    attention,
    call,
    differ,
    dtypes,
    normal,
    shapes_and_dtypes,
)

X = normal(BATCH, LENGTH, WIDTH)
ropes = pytest.mark.parametrize("rope", [None, 100.0], ids=["", "rope"])


def in_pieces(layer, x, sizes, state, mask=None):
    """The output of causal attention fed piece by piece, and the last state."""

    def step(piece, mask, state):
        return layer(
            piece,
            piece,
            value_mask=mask,
            use_causal_mask=True,
            initial_state=state,
            return_state=True,
        )

    step = compiled(step) if DEFAULT_JIT else step
    outputs, cuts = [], np.cumsum(sizes)[:-1]
    masks = [None] * len(sizes) if mask is None else np.split(mask, cuts, axis=1)
    for piece, piece_mask in zip(np.split(x, cuts, axis=1), masks, strict=True):
        output, state = step(piece, piece_mask, state)
        outputs.append(output)
    return ops.concatenate(outputs, axis=1), state


@ropes
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [3, 1, 3]], ids=["token_by_token", "in_pieces"])
def test_pieces_give_what_the_whole_gives(sizes, masked, rope):
    layer = attention(rope_max_wavelength=rope)
    mask = PADDING if masked else None
    whole = layer(X, X, value_mask=mask, use_causal_mask=True, return_state=True)
    assert_close(in_pieces(layer, X, sizes, layer.get_initial_state(BATCH), mask), whole, 1e-4)


@ropes
def test_the_initial_state_is_that_of_no_tokens(rope):
    layer = attention(rope_max_wavelength=rope)
    expected = in_pieces(layer, X[:, :1], [1], None)
    assert_close(in_pieces(layer, X[:, :1], [1], layer.get_initial_state(BATCH)), expected)


@ropes
def test_the_state_has_one_shape_and_is_float32_and_batch_first(rope):
    expected = [((BATCH, 2, 8, 4), "float32"), ((BATCH, 2, 8), "float32"), ((BATCH, 2), "float32")]
    expected += [((BATCH,), "float32")] if rope else []
    layer = attention(rope_max_wavelength=rope)
    state = layer.get_initial_state(BATCH)
    kind = PositionedState if rope else State
    assert type(state) is kind
    for length in (1, 3):
        assert shapes_and_dtypes(state) == expected
        _, state = in_pieces(layer, X[:, :length], [length], state)
        assert type(state) is kind
    assert shapes_and_dtypes(state) == expected
    unbuilt = DarkAttention(**HEADS, rope_max_wavelength=rope)
    assert shapes_and_dtypes(unbuilt.get_initial_state(BATCH)) == expected


@ropes
def test_rows_of_the_state_may_be_reordered(rope):
    """As beam search does."""
    layer = attention(rope_max_wavelength=rope)
    _, state = in_pieces(layer, X[:, :4], [4], layer.get_initial_state(BATCH))
    expected, _ = in_pieces(layer, X[:, 4:], [3], state)
    swapped = tree.map_structure(lambda x: ops.flip(x, axis=0), state)
    output, _ = in_pieces(layer, X[::-1, 4:].copy(), [3], swapped)
    assert_close(output, arrays(expected)[::-1])


def test_keys_seen_before_are_attended_to():
    """Without a causal mask: the state is a memory that queries read."""
    layer = attention()
    _, state = call(layer, X[:, :1], X[:, :4], return_state=True)
    output = call(layer, X, X[:, 4:], initial_state=state)
    assert_close(output, layer(X, X), 1e-4)
    assert differ(output, call(layer, X, X[:, 4:]))


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "float16"])
def test_the_state_stays_float32_under_every_policy(dtype):
    layer = attention(dtype=dtype, rope_max_wavelength=100.0)
    _, state = in_pieces(layer, X[:, :4], [4], None)
    # Neither half precision holds this position.
    state = state._replace(position=ops.full((BATCH,), 40_001.0))
    nothing = np.zeros((BATCH, 3), bool)
    output, after = in_pieces(layer, X[:, 4:], [3], state, nothing)
    assert dtypes(output) == {dtype.removeprefix("mixed_")}
    assert dtypes([after, layer.feature_map.geometry, layer.feature_map.projection]) == {"float32"}
    assert_close(after.attention, state.attention, 0)
    assert_close(after.position, np.full(BATCH, 40_001.0), 0)


def test_half_precision_gives_nearly_the_same_output():
    full, half = attention(), attention(dtype="mixed_bfloat16")
    half.set_weights(full.get_weights())
    expected = arrays(full(X, X, use_causal_mask=True))
    output = arrays(ops.cast(half(X, X, use_causal_mask=True), "float32"))
    assert np.abs(output - expected).max() < 0.05 * np.abs(expected).max()


def as_lists(state):
    return [as_lists(part) for part in state] if isinstance(state, tuple) else state


@pytest.mark.parametrize(("rope", "window"), [(None, None), (100.0, 3)], ids=["", "all"])
def test_a_state_may_come_as_plain_sequences(rope, window):
    """As it does from files, JSON or `keras.tree.flatten`."""
    layer = attention(rope_max_wavelength=rope, sliding_window=window)
    _, state = in_pieces(layer, X[:, :4], [4], None)
    expected = in_pieces(layer, X[:, 4:], [3], state)

    for plain in (as_lists(state), tuple(arrays(tree.flatten(state)))):
        found = in_pieces(layer, X[:, 4:], [3], plain)
        assert_close(found, expected, 0)
        assert type(found[1]) is type(state)
        tree.assert_same_structure(found[1], state)


@ropes
def test_a_functional_model_carries_the_state(rope, tmp_path):
    layer = attention(rope_max_wavelength=rope)
    token = keras.Input((1, WIDTH))
    initial = layer.get_initial_state(BATCH)
    state = tree.map_structure(lambda x: keras.Input(x.shape[1:]), initial)
    step = keras.Model(
        [token, state],
        layer(token, token, use_causal_mask=True, initial_state=state, return_state=True),
    )
    step.save(tmp_path / "step.keras")
    expected = layer(X, X, use_causal_mask=True)[:, :3]
    restored = keras.models.load_model(tmp_path / "step.keras")
    for model, state, kind in ((step, initial, type(initial)), (restored, as_lists(initial), list)):
        outputs = []
        for t in range(3):
            assert type(state) is kind
            output, state = model([ops.convert_to_tensor(X[:, t : t + 1]), state])
            outputs.append(output)
        assert_close(ops.concatenate(outputs, axis=1), expected, 1e-4)


def test_exact_mode_has_no_state():
    layer = attention(attention_mode="exact")
    state = layer.get_initial_state(BATCH)
    for x in (X, keras.KerasTensor(X.shape)):
        for options in ({"return_state": True}, {"initial_state": state}):
            with pytest.raises(ValueError, match='`return_state` need `attention_mode="linear"`'):
                layer(x, x, **options)


def test_the_state_is_no_activity_to_regularize():
    layer = attention(activity_regularizer=keras.regularizers.L2(0.1))
    layer(X, X)
    losses = arrays(layer.losses)
    layer(X, X, return_state=True)
    assert_close(sum(arrays(layer.losses)), sum(losses))


def test_a_state_of_other_sizes_is_refused():
    state = attention(num_features=16).get_initial_state(BATCH)
    with pytest.raises(ValueError, match="`initial_state` must be a state"):
        attention()(X, X, initial_state=state)


def test_padding_moves_no_position_when_going_on_from_a_state(rng):
    layer = DarkAttention(8, 2, num_features=16, rope_max_wavelength=100.0, seed=0)
    x = rng.standard_normal((1, 9, 16)).astype("float32")
    layer.build(x.shape, x.shape)
    padded = np.concatenate([x[:, :4], 0 * x[:, :3], x[:, 4:]], axis=1)
    real = np.array([[1] * 4 + [0] * 3 + [1] * 5], bool)
    causal = {"use_causal_mask": True}
    whole = to_numpy(call(layer, x, x, **causal))

    output = to_numpy(call(layer, padded, padded, value_mask=real, **causal))
    np.testing.assert_allclose(output[real], whole[0], atol=2e-5)

    first = padded[:, :7]
    _, state = call(layer, first, first, value_mask=real[:, :7], return_state=True, **causal)
    rest = call(layer, x[:, 4:], x[:, 4:], initial_state=state, **causal)
    np.testing.assert_allclose(to_numpy(rest), whole[:, 4:], atol=2e-5)
