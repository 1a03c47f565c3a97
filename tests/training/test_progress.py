"""What long calls show, in a terminal and in a file."""

import io
import sys

import numpy as np
import pytest
from backends import on_one_backend

from keras_darkformer import calibrate, progress, transfer_attention
from keras_darkformer.printed import PrintedDict
from keras_darkformer.progress import Progress

from .models import plain, tokens


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(monkeypatch, clock, seconds, stream, **options):
    """What comes of steps that end at these seconds."""
    monkeypatch.setattr(sys, "stdout", stream)
    bar = Progress("fit", "steps", **options)
    for count, second in enumerate(seconds, start=1):
        clock[0] = second
        bar.update(count + options.get("start", 0))
    bar.finish()
    return stream.getvalue()


def test_a_slow_first_step_promises_nothing_and_takes_no_part_in_the_estimate(monkeypatch, clock):
    found = shown(monkeypatch, clock, [60.0, 61.0, 62.0], Terminal(), total=1000)
    first, second, third, last = found.strip("\r\n").split("\r")
    assert first.strip() == "fit: 1 of 1000 steps in 1:00"
    assert second.strip() == "fit: 2 of 1000 steps in 1:01, 16:38 left"
    assert third.strip() == "fit: 3 of 1000 steps in 1:02, 16:37 left"
    assert last.strip() == "fit: 3 of 1000 steps in 1:02"
    assert found.endswith("\n")
    assert found.count("\n") == 1
    assert len({len(line) for line in (second, third, last)}) == 1  # nothing is left behind


def test_steps_from_before_take_no_part_in_the_estimate(monkeypatch, clock):
    found = shown(monkeypatch, clock, [10.0, 12.0], Terminal(), total=100, start=90)
    assert "fit: 92 of 100 steps in 0:12, 0:16 left" in found


def test_a_line_is_never_wider_than_the_terminal(monkeypatch, clock):
    """One that the terminal breaks would not be written over."""
    monkeypatch.setenv("COLUMNS", "20")
    found = shown(monkeypatch, clock, [1.0, 2.0, 3.0], Terminal(), total=1000)
    lines = found.rstrip("\n").strip("\r").split("\r")
    assert max(map(len, lines)) == 19
    assert lines[-1].startswith("fit: 3 of 1000 step")


def test_a_file_gets_a_line_now_and_then_and_no_carriage_return(monkeypatch, clock):
    found = shown(monkeypatch, clock, np.arange(1, 100), io.StringIO())
    assert "\r" not in found
    assert found.splitlines() == [
        "fit: 30 steps in 0:30",
        "fit: 60 steps in 1:00",
        "fit: 90 steps in 1:30",
        "fit: 99 steps in 1:39",
    ]


@on_one_backend
def test_long_calls_show_few_lines_in_a_file_and_nothing_if_so_asked(monkeypatch):
    model = plain()
    for verbose in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        calibrate(model, tokens(), refine=False, batch_size=1, verbose=verbose)
        transfer_attention(
            model, tokens(), steps=3, validate_every=2, batch_size=1, verbose=int(verbose)
        )
        lines = stream.getvalue().splitlines()
        if not verbose:
            assert not lines
            continue
        assert "\r" not in stream.getvalue()
        starts = ["calibrate, looking: 3 batches in ", "calibrate, fitting: 2 of 2 layers in "]
        starts.append("transfer_attention: 3 of 3 steps in ")
        assert len(lines) == len(starts)
        for line, start in zip(lines, starts, strict=True):
            assert line.startswith(start)
        assert ": loss " in lines[-1]


def test_a_line_an_epoch_is_that_of_keras(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    transfer_attention(plain(), tokens(), steps=2, validate_every=1, verbose=2)
    assert "Epoch 1/2" in stream.getvalue()
    assert "steps in" not in stream.getvalue()


class Table(PrintedDict):
    def __rich__(self):
        return "a table"


def test_a_report_is_printed_in_a_notebook_and_displayed_nowhere(monkeypatch):
    shows = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *given: shows.append(given))
    assert str(Table()) == "a table"
    assert shows == []
