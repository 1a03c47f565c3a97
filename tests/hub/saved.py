"""Models and streams saved here, and one fresh process that loads them all."""

import functools
import json
from typing import NamedTuple

import numpy as np
from backends import BACKEND, further
from fresh_process import run_python
from keras_hub.models import (
    Gemma3CausalLMPreprocessor,
    Gemma3Tokenizer,
    GemmaCausalLMPreprocessor,
    GemmaTokenizer,
)

from keras_darkformer import calibrate, convert_to_dark, transfer_attention
from keras_darkformer.hub import Stream

from .models import ROWS, dark, gemma, gemma2, gemma3, inputs, row

BATCH = inputs(14, 5, 9)
PROMPTS = ["the left", "a"]

# Ways to load a model that was saved as a preset and as files; "{family}" is Gemma or Gemma3.
TASKS = {
    "DarkCausalLM": "hub.Dark{family}CausalLM.from_preset(path)",
    "StockCausalLM": "keras_hub.models.{family}CausalLM.from_preset(path)",
    "CausalLM": "keras_hub.models.CausalLM.from_preset(path)",
    "load_model": "keras.saving.load_model(path + '.keras')",
}
BACKBONES = {
    "DarkBackbone": "hub.Dark{family}Backbone.from_preset(path)",
    "StockBackbone": "keras_hub.models.{family}Backbone.from_preset(path)",
    "Backbone": "keras_hub.models.Backbone.from_preset(path)",
    "load_backbone": "keras.saving.load_model(path + '_backbone.keras')",
}
LOADERS = TASKS | BACKBONES
if BACKEND != "torch":  # a loader in Python is the same on all backends
    LOADERS = {name: LOADERS[name] for name in ("DarkCausalLM", "load_model", "Backbone")}

# Fitted models: options of the conversion, of calibration, and whether to train afterwards.
MEMORY = {"sliding_window": 4, "num_sinks": 2, "cache_size": 3}
DATA = [inputs(14, 9, 5), inputs(7, 14, 12)]
KINDS = {
    "spectral": ({}, {"method": "spectral"}, False),
    "clusters": ({}, {"method": "clusters", "refine": False}, False),
    "windowed": (MEMORY, {"refine": False}, False),
    "transferred": ({"tie_geometry": False}, {"refine": False}, True),
    "before": ({"rope_geometry": "before"}, {}, False),
}
# KerasHub loads presets as float32 unless told.
DTYPES = {"before": "mixed_bfloat16", "clusters": "bfloat16"}
IN_FILES = ("clusters", "windowed")
IN_PRESETS = ("windowed", "before", *further("spectral", "clusters", "transferred"))
GEMMAS = ("Gemma", *further("Gemma3"))
# Of the other families all where nothing has to be compiled.
FAMILIES = tuple(ROWS) if BACKEND == "torch" else ("Llama", "GPT2", "Bert")

LOAD_ALL = """
    import json, sys, traceback
    import keras, keras_hub, numpy as np
    from keras_darkformer import hub

    folder = sys.argv[1]
    with open(folder + "/jobs.json") as file:
        jobs, prompts = json.load(file)
    arrays, facts = {}, {}

    def load(name, path, expression, batch, writes):
        model = eval(expression, globals() | {"path": path})
        output = model(dict(np.load(batch)))
        if isinstance(output, dict):
            output = output["sequence_output"]
        arrays[name] = keras.ops.convert_to_numpy(keras.ops.cast(output, "float32"))
        found = facts[name] = {
            "class": type(model).__name__,
            "report": hub.conversion_report(model),
            "dtypes": sorted({w.dtype for w in model.weights if "/feature_map/" in w.path}),
        }
        if writes == "text":
            found["text"] = model.generate(prompts, max_length=16)
        if writes == "stream":
            model.compile(sampler="greedy")
            found["tokens"] = hub.Stream.load(path + ".npz", model).write(6).tolist()

    for job in jobs:
        try:
            load(**job)
        except Exception:
            facts[job["name"]] = {"error": traceback.format_exc()}
    np.savez(folder + "/outputs.npz", **arrays)
    with open(folder + "/facts.json", "w") as file:
        json.dump(facts, file)
"""


class Loaded(NamedTuple):
    """What a fresh process made of a file; `output` is that of the batch it was saved with."""

    facts: dict
    output: np.ndarray


def fitted(kind, build=gemma, preprocessor=None, dtype=None, **more):
    """A model after calibration, perhaps transfer."""
    options, how, train = KINDS[kind]
    options = {"num_features": 16, "seed": 5} | options | more
    stock = {} if dtype is None else {"dtype": dtype}
    if preprocessor is not None:
        stock["preprocessor"] = preprocessor
    model = convert_to_dark(build(**stock), **options)
    calibrate(model, DATA, verbose=False, seed=2, **how)
    if train:
        transfer_attention(model, DATA, steps=2, verbose=0)
    return model


class Saved:
    """A folder of models, each made and saved when it is first asked for."""

    def __init__(self, folder, sentencepiece_proto):
        self.folder, self.proto = folder, sentencepiece_proto
        self.batch = str(folder / "batch.npz")
        np.savez(self.batch, **BATCH)

    def with_tokenizer(self, family):
        """A stock model with a real tokenizer."""
        if family == "Gemma":
            tokenizer = GemmaTokenizer(proto=self.proto)
            return gemma(preprocessor=GemmaCausalLMPreprocessor(tokenizer, sequence_length=16))
        tokenizer = Gemma3Tokenizer(proto=self.proto, has_vision_tokens=False)
        preprocessor = Gemma3CausalLMPreprocessor(tokenizer, sequence_length=16)
        return gemma3(num_layers=2, preprocessor=preprocessor)

    @functools.cache  # noqa: B019  it lives as long as the tests
    def stock(self, family):
        """A stock model and the preset it was saved to."""
        model, preset = self.with_tokenizer(family), str(self.folder / f"{family}_stock")
        model.save_to_preset(preset)
        return model, preset

    @functools.cache  # noqa: B019
    def dark(self, family):
        """A dark model, geometries away from their initial value, and where it was saved."""
        options = {"num_features": 24, "geometry_scale": 0.5, "seed": 7}
        if family == "Gemma3":
            options["layers"] = [1]
        model, preset = dark(self.with_tokenizer(family), **options), str(self.folder / family)
        model.save_to_preset(preset)
        model.save(preset + ".keras")
        model.backbone.save(preset + "_backbone.keras")
        return model, preset

    @functools.cache  # noqa: B019
    def fitted(self, kind):
        """A fitted model, and where it was saved."""
        tokenizer = GemmaTokenizer(proto=self.proto)
        preprocessor = GemmaCausalLMPreprocessor(tokenizer, sequence_length=16)
        model = fitted(kind, preprocessor=preprocessor, dtype=DTYPES.get(kind))
        preset = str(self.folder / kind)
        model.save_to_preset(preset)
        if kind in IN_FILES:
            model.save(preset + ".keras")
        return model, preset

    @functools.cache  # noqa: B019
    def of_family(self, name):
        """A model of another family, one layer left exact, and the batch it was saved with."""
        model = dark(row(name, num_layers=2), layers=[0])
        model.save(self.folder / f"{name}.keras")
        batch = inputs(14, 5, 9, model=model)
        np.savez(self.folder / f"{name}_batch.npz", **batch)
        return model, batch

    @functools.cache  # noqa: B019
    def stream(self):
        """A stream that was saved, as well as its model, which has a layer left exact."""
        model = dark(gemma2(dtype="bfloat16"))
        model.compile(sampler="greedy")
        stream = Stream(model, 3, max_length=40)
        stream.read(inputs(14, 14, 14)["token_ids"])
        model.save_to_preset(self.folder / "stream")
        stream.save(self.folder / "stream.npz")
        return stream

    def jobs(self):
        """What the fresh process is asked to load."""

        def job(name, path, expression, batch=self.batch, writes=None):
            return {
                "name": name,
                "path": path,
                "expression": expression,
                "batch": batch,
                "writes": writes,
            }

        yield job("broken", "", "no_such_name")
        for family in GEMMAS:
            _, path = self.dark(family)
            for name, code in LOADERS.items():
                writes = "text" if name == "DarkCausalLM" else None
                yield job(f"{family} {name}", path, code.format(family=family), writes=writes)
        for kind in IN_PRESETS:
            _, path = self.fitted(kind)
            options = f", dtype={DTYPES[kind]!r}" if kind in DTYPES else ""
            code = f"keras_hub.models.CausalLM.from_preset(path{options})"
            yield job(kind, path, code, writes="text" if kind == "windowed" else None)
        for kind in IN_FILES:
            self.fitted(kind)
            path = str(self.folder / f"{kind}.keras")
            yield job(f"{kind}.keras", path, "keras.saving.load_model(path)")
        for name in FAMILIES:
            self.of_family(name)
            path, batch = (str(self.folder / f"{name}{x}") for x in (".keras", "_batch.npz"))
            yield job(name, path, "keras.saving.load_model(path)", batch)
        self.stream()
        options = "preprocessor=None, dtype='bfloat16'"
        code = f"keras_hub.models.CausalLM.from_preset(path, {options})"
        yield job("stream", str(self.folder / "stream"), code, writes="stream")

    @functools.cache  # noqa: B019
    def fresh(self):
        """What a fresh process makes of all the files: `Loaded` by their names."""
        (self.folder / "jobs.json").write_text(json.dumps([list(self.jobs()), PROMPTS]))
        run_python(LOAD_ALL, self.folder)
        facts = json.loads((self.folder / "facts.json").read_text())
        arrays = np.load(self.folder / "outputs.npz")
        return {name: Loaded(of, arrays.get(name)) for name, of in facts.items()}

    def loaded(self, name):
        """What became of one file; fails with the error that loading it ended with."""
        found = self.fresh()[name]
        if "error" in found.facts:
            raise RuntimeError(found.facts["error"])
        return found
