"""Generation with a state gives what the full forward pass gives."""

import numpy as np
import pytest
from backends import (
    DEFAULT_JIT,
    MODES,
    compiled,
    further,
    largest_intermediate,
    on_one_backend,
    to_numpy,
)
from keras import ops
from keras_hub.samplers import BeamSampler

from keras_darkformer.hub.attention import Code
from keras_darkformer.hub.causal_lm import DarkCausalLM

from .models import LENGTH, dark, gemma, gemma2, gemma3, inputs, outputs
from .searches import beam_search, greedy_search

RAGGED = inputs(8, 2, 5)


# Gemma 2 and 3 have a layer left exact, with a window and a key/value cache, and a dark one.
BUILDERS = {
    "gemma": lambda: dark(gemma()),
    "gemma2": lambda: dark(gemma2()),
    # Of this seed, since most write one token over and over.
    "gemma3": lambda: dark(gemma3(num_layers=2, seed=11), layers=[1]),
}


def _family(name):
    return pytest.param(name, marks=() if name == "gemma2" else pytest.mark.slow)


@pytest.fixture(scope="module", params=map(_family, ["gemma2", *further("gemma", "gemma3")]))
def model(request):
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def by_argmax(model):
    return greedy_search(model, RAGGED)


def generated(model, prompt, **options):
    return model.generate(dict(prompt), **{"stop_token_ids": None} | options)["token_ids"]


def row(batch, index):
    return {name: array[index : index + 1] for name, array in batch.items()}


def check_greedy(model, expected):
    np.testing.assert_array_equal(generated(model, RAGGED), expected)


def test_no_prompts_give_no_texts():
    none = {name: array[:0] for name, array in RAGGED.items()}
    assert dark(gemma()).generate(none, stop_token_ids=None)["token_ids"].shape == (0, LENGTH)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([1] * LENGTH, id="one_by_one"),
        pytest.param([5, 1, 8], id="pieces", marks=pytest.mark.slow),
    ],
)
def test_recurrent_logits_equal_those_of_the_full_forward(model, pieces):
    batch = inputs(LENGTH, LENGTH, LENGTH)
    step = compiled(model.call_with_cache) if DEFAULT_JIT else model.call_with_cache
    cache, logits, start = model.get_initial_cache(3, LENGTH), [], 0
    for size in pieces:
        token_ids = ops.convert_to_tensor(batch["token_ids"][:, start : start + size])
        part, hidden_states, cache = step(token_ids, cache, start)
        assert hidden_states.shape == (3, size, 16)
        logits.append(to_numpy(part))
        start += size
    expected = outputs(model, batch)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("jit", MODES)
def test_greedy_generation_of_a_ragged_batch_equals_an_argmax_loop(model, by_argmax, jit):
    lengths = RAGGED["padding_mask"].sum(1)
    for tokens, length in zip(by_argmax, lengths, strict=True):
        assert len(set(tokens[length:])) >= 4  # not one token over and over
    model.compile(sampler="greedy", jit_compile=jit)
    check_greedy(model, by_argmax)


@pytest.mark.parametrize("size", [5, pytest.param(LENGTH - 1, marks=pytest.mark.slow)])
def test_a_prompt_prefilled_in_pieces_gives_the_same(model, by_argmax, monkeypatch, size):
    monkeypatch.setattr(model, "prefill_size", size)
    model.compile(sampler="greedy")
    check_greedy(model, by_argmax)


@pytest.mark.slow
def test_generation_of_a_batch_equals_generation_row_by_row(model, by_argmax):
    for index in range(3):
        tokens = generated(model, row(RAGGED, index))
        np.testing.assert_array_equal(tokens, by_argmax[index : index + 1])


def test_pieces_bound_the_memory_of_a_prefill():
    """Feedforward activations of all tokens are never there at once."""
    model, length = dark(gemma(num_layers=1, intermediate_dim=1024)), 512
    model.compile(sampler="greedy")

    def largest(size):
        model.prefill_size = size

        def prefill(token_ids, padding_mask):
            return model._build_cache(token_ids, padding_mask, length)

        tokens = np.ones((1, length), "int32")
        return largest_intermediate(prefill, tokens, tokens)

    assert largest(None) >= length * 512 > 8 * largest(32)


@on_one_backend
def test_the_whole_prompt_in_the_prefilled_state_would_be_wrong(model, by_argmax, monkeypatch):
    def whole(self, padding_mask, start):
        return ops.where(ops.cast(padding_mask, "bool"), Code.WRITE.value, Code.PAD.value)

    monkeypatch.setattr(DarkCausalLM, "_prefill_mask", whole)
    model.compile(sampler="greedy")
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        check_greedy(model, by_argmax)


@on_one_backend
def test_no_mask_at_all_would_be_wrong(model, by_argmax, monkeypatch):
    monkeypatch.setattr(DarkCausalLM, "_prefill_mask", lambda *args: None)
    model.compile(sampler="greedy")
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        check_greedy(model, by_argmax)


@pytest.mark.slow
def test_beam_search_equals_a_search_over_the_full_forward(model):
    prompt = inputs(5, 5, 5)
    model.compile(sampler=BeamSampler(num_beams=3))
    found = beam_search(model, prompt, num_beams=3)
    np.testing.assert_array_equal(generated(model, prompt), found)
    assert (found != beam_search(model, prompt, num_beams=1)).any()  # it is not just greedy


def test_a_row_is_masked_behind_its_first_generated_stop_token(model, by_argmax):
    lengths, prompts = RAGGED["padding_mask"].sum(1), RAGGED["token_ids"]
    # One that a row generates, and one from a prompt, where it does not count.
    stops = (int(by_argmax[0, 10]), int(prompts[0, 0]))
    model.compile(sampler="greedy")
    result = model.generate(dict(RAGGED), stop_token_ids=stops)
    stopped = []
    for tokens, mask, expected, length in zip(
        result["token_ids"], result["padding_mask"], by_argmax, lengths, strict=True
    ):
        found = [i for i in range(length, LENGTH) if expected[i] in stops]
        end = found[0] + 1 if found else LENGTH
        stopped.append(bool(found))
        np.testing.assert_array_equal(tokens[:end], expected[:end])
        np.testing.assert_array_equal(mask, np.arange(LENGTH) < end)
    assert stopped[0]


@pytest.mark.slow
def test_generation_ends_when_every_row_has_stopped(model, by_argmax):
    stop = int(by_argmax[0, 10])
    end = 9 + by_argmax[0, 8:].tolist().index(stop)
    model.compile(sampler="greedy")
    result = model.generate(row(RAGGED, 0), stop_token_ids=[stop])
    np.testing.assert_array_equal(result["token_ids"][0, :end], by_argmax[0, :end])
    np.testing.assert_array_equal(result["token_ids"][0, end:], 0)
    np.testing.assert_array_equal(result["padding_mask"][0], np.arange(LENGTH) < end)
