"""Text for the benchmarks: a file, or what every Python carries; and windows of it."""

from pydoc_data.topics import topics

import numpy as np


def load_text(path: str | None) -> str:
    """A file's text, or by default Python's own help topics (460,000 characters)."""
    if path is None:
        return "\n\n".join(topics[name].strip() for name in sorted(topics))
    with open(path, encoding="utf-8") as file:
        return file.read()


def split_text(text: str, window: int) -> dict[str, list[str]]:
    """Parts the text into training, validation and test, spread over the whole.

    Of every ten stretches one is held out for validation and one for testing;
    each holds a few windows of `window` characters.
    """
    length = max(4096, 2 * window)
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for number, start in enumerate(range(0, len(text), length)):
        part = {4: "validation", 9: "test"}.get(number % 10, "train")
        stretch = text[start : start + length]
        if part == "train" and number % 10 not in (0, 5) and parts["train"]:
            parts["train"][-1] += stretch  # goes on where the last one ended
        else:
            parts[part].append(stretch)
    return parts


def sample_windows(stretches: list[str], count: int, length: int, seed: int) -> list[str]:
    """Windows of `length` characters, none of which crosses from one stretch into another."""
    stretches = [stretch for stretch in stretches if len(stretch) >= length]
    if not stretches:
        raise SystemExit(f"The text is too short to part: windows have {length} characters.")
    rng = np.random.default_rng(seed)
    room = np.array([len(stretch) - length + 1 for stretch in stretches])
    chosen = rng.choice(len(stretches), size=count, p=room / room.sum())
    starts = [int(rng.integers(room[i])) for i in chosen]
    return [stretches[i][start : start + length] for i, start in zip(chosen, starts, strict=True)]
