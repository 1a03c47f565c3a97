"""What generation carries: a float32 state of constant size, and what refuses it."""

import numpy as np
import pytest
from backends import DEFAULT_JIT, compiled, to_numpy
from keras import ops, tree
from keras_hub.models import Gemma3CausalLM, GemmaCausalLM

from keras_darkformer.hub.attention import Code

from .models import LENGTH, attentions, dark, gemma, gemma2, gemma3, inputs, outputs

PROMPT = inputs(8, 2, 5)


def shapes(cache):
    return [[tuple(x.shape) for x in tree.flatten(entry)] for entry in cache]


def step(model, cache, padding_mask=None):
    """Logits and cache of one token more."""
    token_ids = ops.convert_to_tensor(inputs(1, 1, 1)["token_ids"][:, :1])
    call = compiled(model.call_with_cache) if DEFAULT_JIT else model.call_with_cache
    logits, _, cache = call(token_ids, cache, 0, padding_mask)
    return to_numpy(logits).astype("float32"), cache


def dtypes(cache):
    return [{ops.dtype(x) for x in tree.flatten(entry)} for entry in cache]


def test_the_size_of_the_state_does_not_depend_on_the_length():
    model = dark(gemma())
    short, long = (shapes(model.get_initial_cache(2, length)) for length in (16, 4096))
    assert short == long == [[(2, 2, 16, 8), (2, 2, 16), (2, 2)]] * 2


@pytest.mark.parametrize(("build", "dark_layer"), [(gemma2, 1), (gemma3, 5)])
def test_layers_left_exact_keep_a_key_value_cache(build, dark_layer):
    model = dark(build())
    short, long = (shapes(model.get_initial_cache(2, length)) for length in (16, 4096))
    for index, (few, many) in enumerate(zip(short, long, strict=True)):
        assert (few == many) is (index == dark_layer)
        if index != dark_layer:
            assert {np.prod(shape) for shape in few} < {2 * 16 * 2 * 8, 2 * 2 * 16 * 2 * 8}


@pytest.fixture(
    scope="module",
    params=[
        (gemma2, "mixed_bfloat16"),
        pytest.param((gemma, "bfloat16"), marks=pytest.mark.slow),
        pytest.param((gemma3, "bfloat16"), marks=pytest.mark.slow),
    ],
    ids=lambda build_and_dtype: f"{build_and_dtype[0].__name__}-{build_and_dtype[1]}",
)
def half(request):
    """A model in half precision; those with sliding windows have layers left exact."""
    build, dtype = request.param
    options = {"layers": [1]} if build is gemma3 else {}
    return dark(build(num_layers=2, dtype=dtype), **options)


def test_the_state_is_float32_in_half_precision(half):
    expected = [
        {"float32"} if hasattr(attention, "feature_map") else {"bfloat16"}
        for attention in attentions(half)
    ]
    cache = half.get_initial_cache(3, LENGTH)
    assert dtypes(cache) == expected
    logits, cache = step(half, cache)
    assert dtypes(cache) == expected
    assert np.isfinite(logits).all()


def test_no_layer_rounds_the_state_on_its_way_in_half_precision(half):
    _, cache = step(half, half.get_initial_cache(3, LENGTH))
    # The code of a token that is attended to, but does not enter the state.
    _, after = step(half, cache, padding_mask=ops.full((3, 1), Code.ATTEND.value, "int32"))
    for attention, old, new in zip(attentions(half), cache, after, strict=True):
        if hasattr(attention, "feature_map"):
            tree.map_structure(np.testing.assert_array_equal, *to_numpy((new, old)))


def test_generation_in_half_precision_repeats_and_keeps_the_prompts(half):
    first, second = (
        half.generate(dict(PROMPT), stop_token_ids=None)["token_ids"] for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    given = PROMPT["padding_mask"].astype(bool)
    np.testing.assert_array_equal(first[given], PROMPT["token_ids"][given])


@pytest.mark.parametrize(
    ("build", "task"), [(gemma, GemmaCausalLM), (gemma3, Gemma3CausalLM)], ids=["gemma", "gemma3"]
)
def test_a_stock_task_around_a_dark_backbone_refuses_to_generate(build, task):
    stock = task(backbone=dark(build()).backbone, preprocessor=None)
    prompt = {**PROMPT, "padding_mask": PROMPT["padding_mask"].astype(bool)}
    with pytest.raises(ValueError, match=r"needs a recurrent state as `cache`.*DarkGemmaCausalLM"):
        stock.generate(prompt, stop_token_ids=None)


@pytest.mark.slow
def test_a_dark_exact_backbone_generates_as_the_full_forward_does():
    model = dark(gemma(), attention_mode="exact")
    assert shapes(model.get_initial_cache(2, 16)) == [[(2, 2, 16, 2, 8)]] * 2
    tokens = model.generate(dict(PROMPT), stop_token_ids=None)["token_ids"]
    logits = outputs(model, {"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    for row, length in enumerate(PROMPT["padding_mask"].sum(1)):
        np.testing.assert_array_equal(tokens[row, length:], logits[row].argmax(-1)[length - 1 : -1])


@pytest.mark.slow
def test_scores_are_the_logits_of_the_full_forward():
    model = dark(gemma())
    batch = inputs(LENGTH, 9, 5)
    scores = to_numpy(model.score(**batch, scoring_mode="logits"))
    np.testing.assert_allclose(scores, outputs(model, batch), rtol=1e-4, atol=1e-4)
