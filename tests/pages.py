"""The pages of the project, their blocks of code, and stand-ins for what these take for granted.

A block runs after those before it on its page, with `StandIns` for what a reader has: models,
texts, images. A block whose fence has a title says who runs it:

    ```python title="JAX"                      runs on this backend only
    ```python title="Not run: it uploads"      does not run, for the reason that readers see
"""

import re
import shlex
from typing import NamedTuple

import keras
import keras_hub
import numpy as np
from fresh_process import ROOT
from hub import checkpoints
from hub.models import gemma, gemma_proto, row

import keras_darkformer
from keras_darkformer import convert_to_dark, hub
from keras_darkformer.hub.families import _LLAMA, _causal_lm, private
from keras_darkformer.linearizing import linearize
from keras_darkformer.options import LINEARIZED

FOLDERS = (".", "docs", "docs/api", "benchmarks", "benchmarks/results")
PAGES = [
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.md"))
]
FENCE = re.compile(r'^( *)```(\w+)(?: title="([^"]*)")?\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
BACKENDS = {"TensorFlow": "tensorflow", "JAX": "jax", "PyTorch": "torch"}


class Block(NamedTuple):
    """A block of code: its language, what it says of itself, and the code."""

    language: str
    title: str
    code: str

    def runs_on(self, backend):
        """Whether it runs: one without a title does with torch, where the others are the same."""
        return BACKENDS.get(self.title, "" if self.title else "torch") == backend


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for indent, kind, title, code in FENCE.findall(text):
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        found.append(Block(kind, title, "\n".join(lines)))
    return [block for block in found if block.language == language]


def texts(count=16, words=60):
    rng = np.random.default_rng(0)
    known = ["the", "left", "right", "hand", "of", "a", "name", "is", "bound", "to", "an", "object"]
    return [" ".join(rng.choice(known, words)) for _ in range(count)]


def _llama_folder(path):
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>"]
    size = len(
        checkpoints.write_byte_pairs(path, special, bos_token=special[0], eos_token=special[1])
    )
    checkpoints.write(path, "llama", vocab_size=size)
    return str(path)


class StandIns:
    """Small things for those that pages name; presets are saved in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self.proto = gemma_proto(texts(), vocab_size=40, hard_vocab_limit=False)
        self.preset = str(folder / "gemma")
        self.gemma().save_to_preset(self.preset)
        self.hugging_face = _llama_folder(folder / "llama")

    def gemma(self):
        """A stock decoder that writes text."""
        tokenizer = keras_hub.models.GemmaTokenizer(proto=self.proto)
        preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=24)
        return gemma(preprocessor=preprocessor)

    def dark(self):
        return convert_to_dark(self.gemma(), num_features=8)

    @staticmethod
    def tokens():
        return np.random.default_rng(0).integers(4, 30, (1, 20)).astype("int32")

    def of(self, page):
        """What a page takes for granted, made anew."""
        rng = np.random.default_rng(0)
        names = {"texts": texts(), "held_out_texts": texts(4)}
        if page in ("docs/calibration.md", "docs/memory.md"):
            names["model"] = self.gemma()
        elif page == "docs/kerashub.md":
            names |= {"model": self.dark(), "tokens": self.tokens(), "folder": self.hugging_face}
        elif page == "docs/encoders.md":
            names["encoder"] = row("Bert", num_layers=6)
            names["texts"] = {
                "token_ids": rng.integers(5, 30, (8, 14)).astype("int32"),
                "segment_ids": np.zeros((8, 14), "int32"),
                "padding_mask": np.ones((8, 14), "int32"),
            }
        elif page == "docs/how_to.md":
            names |= {"stock": self.gemma(), "tokens": self.tokens()}
            names |= {"images": rng.normal(size=(8, 16, 12)).astype("float32")}
            names |= {"labels": rng.normal(size=(8, 1)).astype("float32")}
        elif page == "docs/distribution.md":
            heads = rng.normal(size=(3, 1, 64, 2, 8)).astype("float32")
            names |= dict(zip(("query", "key", "value"), heads, strict=True))
            names |= {"geometry": np.stack([np.eye(8, dtype="float32")] * 2)}
            names |= {"projection": rng.normal(size=(2, 16, 8)).astype("float32")}
        elif page == "CONTRIBUTING.md":
            names |= {"private": private, "_causal_lm": _causal_lm, "_LLAMA": _LLAMA}
        return names

    def smaller(self, code):
        """The code with stand-ins for presets, and with less to do."""
        for written, instead in {
            "hf://HuggingFaceTB/SmolLM2-135M": self.hugging_face,
            "gemma_2b_en": self.preset,
            "qwen2.5_0.5b_en": self.preset,
            "max_length=8192": "max_length=16",
            "write(100)": "write(4)",
            "fullgraph=True)": 'fullgraph=True, backend="eager")',
            "steps=100": "steps=2",
            "steps=300": "steps=2",
            "targets, texts)": "targets, texts, steps=2)",
            "num_features=256": "num_features=8",
            "keep_exact=4, **options": "keep_exact=1, length=24, repeat=4, **options",
            "keep_exact=4": "keep_exact=1",
            "--keep-exact 4": "--keep-exact 1",
            "--minutes 60": "",
            '"sliding_window": 64': '"sliding_window": 4',
            '"cache_size": 188': '"cache_size": 3',
        }.items():
            code = code.replace(written, instead)
        return code


def at_hand():
    """What a reader has imported further up, or on another page."""
    names = {name: getattr(keras_darkformer, name) for name in keras_darkformer.__all__}
    names |= {
        "keras": keras,
        "np": np,
        "keras_hub": keras_hub,
        "keras_darkformer": keras_darkformer,
    }
    return names | {name: getattr(hub, name) for name in hub.__all__ if name.startswith("Dark")}


def quick(monkeypatch):
    """`linearize` and the memory it takes, as small as the models here; and no uploads."""

    def short(*args, minutes=None, **options):
        return linearize(*args, **{"length": 24, "tokens": 96, "verbose": False} | options)

    for module in (keras_darkformer.linearizing, keras_darkformer):
        monkeypatch.setattr(module, "linearize", short, raising=False)
    for name, value in {"sliding_window": 4, "cache_size": 3, "num_sinks": 1}.items():
        monkeypatch.setitem(LINEARIZED, name, value)


def run(page, stand_ins, backend):
    """Runs the blocks of a page, one after the other; returns its names."""
    names = at_hand()
    for block in blocks(page, "python"):
        if block.runs_on(backend):
            names |= stand_ins.of(page)
            exec(compile(stand_ins.smaller(block.code), page, "exec"), names)
    return names


def commands(page):
    """The commands of a page, as lists of words, without what sets the environment."""
    for block in blocks(page, "bash"):
        if block.title.startswith("Not run: "):
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removesuffix("&"), comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words and words[0] != "export":
                yield words
