"""Every sampler of KerasHub, and prompts at the edges."""

import keras
import numpy as np
import pytest
from backends import on_one_backend
from keras_hub.models import GemmaCausalLM
from keras_hub.samplers import (
    BeamSampler,
    ContrastiveSampler,
    GreedySampler,
    RandomSampler,
    SpeculativeSampler,
    TopKSampler,
    TopPSampler,
)

from keras_darkformer import convert_to_dark, hub

from .models import LENGTH, dark, gemma, gemma2, inputs, outputs, row
from .searches import contrastive_search

PROMPT = inputs(8, 2, 5)
GIVEN = PROMPT["padding_mask"].astype(bool)
EXACT = {"attention_mode": "exact", "geometry_scale": 1.0, "layers": "all"}
K, P = 3, 0.6
SAMPLERS = {
    "top_k": lambda: TopKSampler(k=K, seed=1),
    "top_p": lambda: TopPSampler(p=P, seed=1),
    "random": lambda: RandomSampler(seed=1, temperature=0.7),
    "beam": lambda: BeamSampler(num_beams=3),
    "contrastive": lambda: ContrastiveSampler(k=K, alpha=0.4),
}


def generated(model, sampler, prompt=PROMPT):
    """Tokens, with a new sampler of the same seed each time."""
    model.compile(sampler=SAMPLERS[sampler]() if isinstance(sampler, str) else sampler)
    return generated_again(model, prompt)


def generated_again(model, prompt=PROMPT, seed=None):
    """With the sampler that the model has, from a seed, and with what was compiled for it."""
    if seed is not None:
        model.sampler.seed_generator.state.assign(keras.random.SeedGenerator(seed).state)
    mask = prompt["padding_mask"].astype(bool)  # stock models take no other
    return model.generate({**prompt, "padding_mask": mask}, stop_token_ids=None)["token_ids"]


@pytest.fixture(scope="module")
def stock():
    return gemma(num_layers=1)


@pytest.fixture(scope="module")
def exact(stock):
    return convert_to_dark(stock, copy=True, **EXACT)


@pytest.fixture(scope="module")
def linear():
    """One layer with a state, one with a key/value cache."""
    return dark(gemma2())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_exact_model_generates_what_the_stock_model_does(stock, exact, sampler):
    expected = generated(stock, sampler)
    np.testing.assert_array_equal(generated(exact, sampler), expected)
    np.testing.assert_array_equal(expected[GIVEN], PROMPT["token_ids"][GIVEN])


@pytest.fixture(scope="module")
def chances(linear):
    """Probabilities of the next token behind each, by the full forward pass."""

    def of(tokens):
        batch = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
        logits = outputs(linear, batch)[:, :-1].astype("float64")
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        return chances, np.take_along_axis(chances, tokens[:, 1:, None], axis=-1)

    return of


@pytest.mark.parametrize("sampler", ["top_k", pytest.param("top_p", marks=pytest.mark.slow)])
def test_a_state_draws_from_the_chances_of_the_full_forward(linear, chances, sampler):
    tokens = generated(linear, sampler)
    np.testing.assert_array_equal(tokens[GIVEN], PROMPT["token_ids"][GIVEN])
    np.testing.assert_array_equal(generated_again(linear, seed=1), tokens)
    assert (generated_again(linear, seed=2) != tokens).any()
    all_chances, chosen = chances(tokens)
    more = all_chances > chosen * (1 + 1e-3)  # to rounding
    rank, before = more.sum(-1)[~GIVEN[:, 1:]], (all_chances * more).sum(-1)[~GIVEN[:, 1:]]
    assert rank.max() > 0
    if sampler == "top_k":
        assert rank.max() < K
    if sampler == "top_p":
        assert before.max() < P + 1e-3
    # Tokens that were drawn from other chances would be less likely.
    assert np.log(chosen[..., 0][~GIVEN[:, 1:]]).mean() > -np.log(all_chances.shape[-1])


@on_one_backend
@pytest.mark.parametrize(
    "build", [gemma2, lambda: row("Llama", num_layers=2)], ids=["Gemma2", "Llama"]
)
def test_contrastive_search_equals_a_search_over_the_full_forward(build):
    model = dark(build())
    found = contrastive_search(model, PROMPT, K, alpha=0.4)
    np.testing.assert_array_equal(generated(model, "contrastive"), found)
    assert (found != contrastive_search(model, PROMPT, K, alpha=0.0)).any()


@pytest.mark.parametrize("sampler", ["speculative", SpeculativeSampler()], ids=["name", "object"])
def test_speculative_sampling_is_refused_with_the_reason(linear, sampler):
    linear.compile(sampler="greedy")
    with pytest.raises(ValueError, match="recurrent state can't be rolled back"):
        linear.compile(sampler=sampler)
    assert isinstance(linear.sampler, GreedySampler)


def test_a_model_compiled_for_speculative_sampling_is_refused_untouched(stock):
    model = GemmaCausalLM(stock.backbone)
    model.compile(sampler="speculative")
    with pytest.raises(ValueError, match="recurrent state can't be rolled back"):
        convert_to_dark(model, num_features=16)
    assert type(model) is GemmaCausalLM
    assert not isinstance(model.backbone, hub.DarkGemmaBackbone)


@on_one_backend
def test_stock_models_have_no_speculative_sampling_either(stock, exact):
    """But for Gemma 4, which is not converted."""
    for model in (stock, exact):
        with pytest.raises(ValueError, match="draft_next"):
            generated(model, SpeculativeSampler())


@pytest.mark.parametrize("lengths", [(0, 3, 5), (0, 0, 0)])
def test_empty_prompts_are_refused_before_anything_is_generated(linear, lengths):
    linear.compile(sampler="greedy")
    with pytest.raises(ValueError, match=r"at least one token.*lengths \[0, "):
        linear.generate(inputs(*lengths), stop_token_ids=None)


def test_a_prompt_that_fills_its_row_comes_back(linear):
    prompt = inputs(LENGTH, LENGTH, LENGTH)
    for sampler in ("top_k", "contrastive"):
        np.testing.assert_array_equal(generated(linear, sampler, prompt), prompt["token_ids"])


@pytest.mark.parametrize("prompts", [["", "the left"], ["", ""]])
def test_an_empty_string_is_its_start_token(preprocessor, prompts):
    model = dark(gemma(num_layers=1, preprocessor=preprocessor))
    texts = model.generate(prompts, max_length=8)
    assert len(texts) == 2
    assert texts[1].startswith(prompts[1])


@on_one_backend
def test_an_over_long_string_is_cut_as_by_the_stock_model(stock, exact, linear, preprocessor):
    long = "the left hand side of the right hand side of it all " * 3
    for model in (stock, exact, linear):
        model.compile(sampler="greedy")
        model.preprocessor = preprocessor
    try:
        expected = stock.generate([long, "a"], max_length=9)
        assert len(expected[0]) < len(long)
        assert exact.generate([long, "a"], max_length=9) == expected
        cut, short = linear.generate([long, "a"], max_length=9)
        assert cut == expected[0]
        assert short.startswith("a")
    finally:
        for model in (stock, exact, linear):
            model.preprocessor = None
