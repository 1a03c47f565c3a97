"""A stream is the model reading everything at once, whatever it was read in and wherever."""

import functools
import gc
import weakref

import numpy as np
import pytest
from backends import BACKEND, further, to_numpy
from keras_hub.samplers import RandomSampler

from keras_darkformer import calibrate
from keras_darkformer.hub import Stream

from .models import LENGTH, dark, gemma, gemma2, inputs, outputs, real, row
from .searches import greedy_search

TOKENS = inputs(LENGTH, LENGTH, LENGTH)["token_ids"]
PROMPT = inputs(5, 5, 5)
# One of the layers of gemma2 is left exact, with a key/value cache.
BUILDERS = {
    "gemma2": lambda: dark(gemma2()),
    "memory": lambda: dark(
        gemma(), sliding_window=3, num_sinks=1, cache_size=3, feature_map=["dark", "none"]
    ),
}


@pytest.fixture(params=BUILDERS)
def name(request):
    return request.param


@functools.cache
def model_of(name):
    model = BUILDERS[name]()
    model.compile(sampler="greedy")
    model.prefill_size = 4
    return model


@functools.cache
def first_stream(name):
    """What it compiled is there for the others as long as it is."""
    return Stream(model_of(name), 3, max_length=LENGTH)


def stream_of(name):
    """For texts that fill its cache to the end; it shares what was compiled for the others."""
    first_stream(name)
    return Stream(model_of(name), 3, max_length=LENGTH)


@functools.cache
def by_argmax(name):
    """Behind the prompts."""
    return greedy_search(model_of(name), PROMPT)[:, 5:]


def last_logits(model, token_ids):
    """Behind tokens, padded to the length that all tests have."""
    count = token_ids.shape[1]
    padded = np.pad(token_ids, [(0, 0), (0, LENGTH - count)])
    mask = real(count, count, count).astype("int32")
    return outputs(model, {"token_ids": padded, "padding_mask": mask})[:, count - 1]


@pytest.mark.parametrize("pieces", [[1, 1, 7, 5], *further([14])], ids=["pieces", *further("once")])
def test_logits_are_those_of_the_whole_text(name, pieces):
    stream, start = stream_of(name), 0
    for size in pieces:
        logits = to_numpy(stream.read(TOKENS[:, start : start + size]))
        start += size
        assert stream.position == start
        expected = last_logits(stream.model, TOKENS[:, :start])
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_what_is_written_is_an_argmax_loop_and_is_read(name):
    stream, expected = stream_of(name), by_argmax(name)
    stream.read(PROMPT["token_ids"][:, :5])
    written = np.concatenate([stream.write(4), stream.write(4)], axis=1)
    np.testing.assert_array_equal(written, expected[:, :8])
    assert stream.position == LENGTH - 1
    logits = stream.read(TOKENS[:, :1])
    whole = np.concatenate([PROMPT["token_ids"][:, :5], written, TOKENS[:, :1]], axis=1)
    expected = last_logits(stream.model, whole)
    np.testing.assert_allclose(to_numpy(logits), expected, rtol=1e-3, atol=1e-4)


def test_a_loaded_stream_goes_on_exactly(name, tmp_path):
    stream = stream_of(name)
    stream.read(TOKENS[:, :6])
    stream.save(tmp_path / "text.npz")
    expected = to_numpy(stream.read(TOKENS[:, 6:10])), stream.write(4)
    loaded = Stream.load(tmp_path / "text.npz", stream.model)
    assert (loaded.position, loaded.max_length) == (6, stream.max_length)
    np.testing.assert_array_equal(to_numpy(loaded.read(TOKENS[:, 6:10])), expected[0])
    np.testing.assert_array_equal(loaded.write(4), expected[1])


def test_of_a_piece_only_the_last_token_has_logits(monkeypatch):
    model, counts = dark(gemma(num_layers=1)), []
    call = type(model).call_with_cache

    def watched(self, token_ids, *args, **kwargs):
        counts.append(token_ids.shape[1])
        return call(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "call_with_cache", watched)
    logits = to_numpy(Stream(model, 3).read(TOKENS))
    np.testing.assert_allclose(logits, last_logits(model, TOKENS), rtol=1e-3, atol=1e-4)
    assert set(counts) == {1}


def test_streams_share_what_is_compiled_until_a_feature_map_is_another(monkeypatch):
    model, traced = dark(gemma(num_layers=1)), []
    call = type(model).call_with_cache

    def watched(*args, **kwargs):
        traced.append(args)
        return call(*args, **kwargs)

    def logits(stream):
        return to_numpy(stream.read(TOKENS))

    monkeypatch.setattr(type(model), "call_with_cache", watched)
    streams = [Stream(model, 3) for _ in range(2)]
    first, of_first = logits(streams[0]), len(traced)
    np.testing.assert_array_equal(logits(streams[1]), first)
    assert streams[0]._functions is streams[1]._functions
    assert BACKEND == "torch" or len(traced) == of_first > 0
    calibrate(model, PROMPT, method="clusters", refine=False, verbose=False)
    streams.append(Stream(model, 3))
    assert streams[2]._functions is not streams[1]._functions
    calibrated = logits(streams[2])
    expected = last_logits(model, TOKENS)
    np.testing.assert_allclose(calibrated, expected, rtol=1e-3, atol=1e-4)
    assert np.abs(calibrated - first).max() > 0.01


def test_what_a_model_had_goes_with_its_streams():
    model = dark(gemma(num_layers=1))
    stream = Stream(model, 3)
    stream.read(TOKENS)
    before = [weakref.ref(x.feature_map) for x in model.backbone.dark_layers.values()]
    calibrate(model, PROMPT, method="clusters", refine=False, verbose=False)
    del stream
    gc.collect()
    assert not any(reference() for reference in before)


def test_the_size_of_a_file_does_not_depend_on_the_text(tmp_path):
    stream, sizes = stream_of("memory"), []
    for part in (TOKENS[:, :2], TOKENS[:, 2:]):
        stream.read(part)
        stream.save(tmp_path / "text.npz")
        sizes.append((tmp_path / "text.npz").stat().st_size)
    assert sizes[0] == sizes[1]


def test_writing_ends_when_every_row_has_stopped():
    stream, free = stream_of("memory"), by_argmax("memory")
    stream.read(PROMPT["token_ids"][:, :5])
    stops = [int(row[3]) for row in free]
    ends = [min(np.flatnonzero(np.isin(row, stops))) + 1 for row in free]
    written = stream.write(9, stop_token_ids=stops)
    assert written.shape == (3, max(ends))
    for actual, expected, end in zip(written, free, ends, strict=True):
        np.testing.assert_array_equal(actual[:end], expected[:end])
    assert stream.position == 5 + max(ends)


def test_a_random_sampler_goes_on_drawing():
    model = dark(gemma(num_layers=1))
    model.compile(sampler=RandomSampler(temperature=5.0, seed=3))
    stream = Stream(model)
    stream.read(TOKENS[0, :9])
    drawn = [tuple(stream.write(8)[0]) for _ in range(3)]
    assert len(set(drawn)) == 3
    assert {token for row in drawn for token in row} <= set(range(64))


@pytest.mark.parametrize("shape", [(3,), (2, 4), (3, 0), (3, 4, 1)])
def test_tokens_of_another_shape_are_refused(shape):
    stream = Stream(dark(gemma(num_layers=1)), 3)
    with pytest.raises(ValueError, match=r"`token_ids` must have shape \(3, t\)"):
        stream.read(np.ones(shape, "int32"))


def test_a_text_that_gets_too_long_is_refused_and_the_stream_stays(name):
    stream = stream_of(name)
    stream.read(TOKENS[:, :8])
    for too_much in (lambda: stream.read(TOKENS[:, :7]), lambda: stream.write(7)):
        with pytest.raises(ValueError, match=r"`max_length=14`: 8 tokens were read, 7 more"):
            too_much()
    assert stream.position == 8
    logits = to_numpy(stream.read(TOKENS[:, 8:]))
    expected = last_logits(stream.model, TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_what_can_not_be_streamed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`model` must be a causal LM made by"):
        Stream(gemma(num_layers=1))
    with pytest.raises(ValueError, match="`max_length` is needed: layers left exact"):
        Stream(dark(gemma2()))
    stream = Stream(dark(gemma(num_layers=1)))
    with pytest.raises(ValueError, match="`read` at least one token first"):
        stream.write(3)
    stream.read(TOKENS[0])
    stream.save(tmp_path / "text.npz")
    with pytest.raises(ValueError, match=r"state of another model.*24 features"):
        Stream.load(tmp_path / "text.npz", dark(gemma(num_layers=1), num_features=24))


def test_learned_positions_end_the_text():
    model = dark(row("GPT2", num_layers=1))
    assert Stream(model).max_length == 64
