"""Conversions of models in random states: whole or not at all, and what was theirs stays."""

import contextlib
import dataclasses
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import on_one_backend, to_numpy, untraced
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from keras_darkformer import convert_to_dark
from keras_darkformer.hub import attention as hub_attention

from .models import LENGTH, attentions, blocks, inputs, outputs, task_of
from .test_all_or_nothing import CROSSENTROPY, Falling, Own, OwnLoss, Share, state

FAMILIES = ("GPT2", "Llama", "Gemma", "Bert")
EXACT = {"attention_mode": "exact", "geometry_scale": 1.0, "num_features": 4}
OPTIONS = {
    "exact": EXACT,
    "linear": {"num_features": 4},
    "exponential": {"num_features": 4, "feature_map": "exponential"},
    "window": {"num_features": 4, "sliding_window": 3, "num_sinks": 1},
    "none": {"feature_map": "none", "sliding_window": 3},
    "before": {"num_features": 4, "rope_geometry": "before"},
}
DTYPES = ["float32", "mixed_bfloat16"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A model, what was done to it, and how it is converted."""

    family: str
    tied: bool
    dtype: str
    frozen: str
    adapted: str
    renamed: bool
    compiled: str
    fitted: bool
    held: str  # by what else, compiled and called before
    part: str
    copy: bool
    options: str
    layers: object
    breaks: str


@st.composite
def samples(draw):
    family = draw(st.sampled_from(FAMILIES))
    return Sample(
        family=family,
        tied=family == "Llama" and draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        frozen=draw(st.sampled_from(["", "backbone", "block", "dense", "kernel"])),
        adapted=draw(st.sampled_from(["", "lora", "int8", "int8 lora"])),
        renamed=draw(st.booleans()),
        compiled=draw(st.sampled_from(["", "strings", "own", "forgetful"])),
        fitted=draw(st.booleans()),
        held=draw(st.sampled_from(["", "model", "task"])),
        part=draw(st.sampled_from(["task", "backbone"])),
        copy=draw(st.booleans()),
        options=draw(st.sampled_from(list(OPTIONS))),
        layers=draw(st.sampled_from(["all", [1], "global"])),
        breaks=draw(st.sampled_from(["", "", "error"])),
    )


def query_dense(model, index):
    attention = attentions(model)[index]
    names = ("query_dense", "_query_dense")
    return next(getattr(attention, name) for name in names if hasattr(attention, name))


def freeze(model, what):
    if what == "backbone":
        model.backbone.trainable = False
    elif what == "block":
        blocks(model)[0].trainable = False
    elif what == "dense":
        query_dense(model, 1).trainable = False
    elif what == "kernel":
        query_dense(model, 0).kernel.trainable = False


def adapt(model, how):
    if "int8" in how:
        query_dense(model, 0).quantize("int8")
    if "lora" in how:
        model.backbone.enable_lora(2)


def compile_it(model, how):
    if not how:
        return
    arguments = {
        "strings": lambda: {
            "optimizer": "adam",
            "loss": "sparse_categorical_crossentropy",
            "weighted_metrics": ["accuracy"],
        },
        "own": lambda: {
            "optimizer": keras.optimizers.SGD(Falling(0.01), momentum=0.9),
            "loss": OwnLoss(0.5),
            "weighted_metrics": [Share(3)],
        },
        "forgetful": lambda: {"optimizer": Own(0.25), "loss": CROSSENTROPY},
    }[how]()
    model.compile(**arguments, jit_compile=False)


def step(model, batch):
    """One step of training, which counts as one."""
    before = int(model.optimizer.iterations)
    targets = np.zeros(outputs(model, batch).shape[:-1], "int32")
    logs = model.train_on_batch(batch, targets, return_dict=True)
    assert np.isfinite(logs["loss"])
    assert int(model.optimizer.iterations) == before + 1


class Case:
    """A sample's model in its state, `self.model` being the part that is converted."""

    def __init__(self, sample):
        tied = {"tie_word_embeddings": True} if sample.tied else {}
        self.sample = sample
        self.task = task_of(sample.family, dtype=sample.dtype, **tied)
        adapt(self.task, sample.adapted)
        freeze(self.task, sample.frozen)
        if sample.renamed:
            self.task.name, blocks(self.task)[1].name = "mine", "last"
        self.model = self.task if sample.part == "task" else self.task.backbone
        self.batch = inputs(LENGTH, 5, model=self.task.backbone)
        # A backbone of BERT has several outputs, and what is trained needs something to train.
        if not (sample.family == "Bert" and sample.part == "backbone"):
            compile_it(self.model, sample.compiled)
        self.compiled = bool(self.model.compiled and self.model.loss)
        self.trains = self.compiled and bool(self.model.trainable_weights)
        if sample.fitted and self.trains:
            step(self.model, self.batch)
        self.holder = self.held()
        self.expected = outputs(self.model, self.batch)

    def held(self):
        """Another model that holds the backbone, and has computed with it."""
        backbone = self.task.backbone
        if self.sample.held == "task":
            holder = type(self.task)(backbone, **self.head())
        elif self.sample.held == "model":
            tensors = {name: keras.Input((None,), dtype="int32", name=name) for name in self.batch}
            found = backbone(tensors)
            found = found["sequence_output"] if isinstance(found, dict) else found
            holder = keras.Model(tensors, keras.layers.Dense(2)(found))
        else:
            return None
        holder.predict(self.batch, verbose=0)
        return holder

    def head(self):
        return {"num_classes": 3, "preprocessor": None} if self.sample.family == "Bert" else {}

    def convert(self, **options):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Converting")
            sample = self.sample
            options = OPTIONS[sample.options] | {"layers": sample.layers} | options
            return convert_to_dark(self.model, copy=sample.copy, **options)

    def refusal(self):
        """The words by which the conversion has to be refused, or `None`."""
        causal, rotary = self.sample.family != "Bert", self.sample.family in ("Llama", "Gemma")
        if self.sample.options in ("window", "none") and not causal:
            return "need causal attention"
        if self.sample.options == "before" and not rotary:
            return "needs rotary positions"
        if self.breaks():
            return "in the second layer"
        optimizer = self.model.optimizer if self.compiled else None
        if isinstance(optimizer, Own) and (optimizer.built or self.sample.copy):
            return "Own has to be made anew"
        return None

    def breaks(self):
        return self.sample.breaks and self.sample.layers != [1]


@contextlib.contextmanager
def breaking_off():
    """Has a conversion run out of memory in its second layer."""
    build, built = hub_attention.build_at, []

    def fail(*args):
        built.append(build(*args))
        if len(built) == 2:
            raise MemoryError("in the second layer")

    hub_attention.build_at = fail
    try:
        yield
    finally:
        hub_attention.build_at = build


def everything(case):
    """All that a conversion which is refused, or makes a copy, leaves as it was."""
    model = case.model
    optimizer = model.optimizer if model.compiled else None
    slots = [to_numpy(v.value).tolist() for v in optimizer.variables] if optimizer else []
    config = model._compile_config.config if model.compiled else {}
    return state(case.task), flags(case.task), id(optimizer), slots, {**config}


def flags(model):
    """Names and flags of a model's layers, names and flags of its weights, less feature maps."""
    layers = [x for x in model._flatten_layers() if "feature_map" not in str(x.path)]
    weights = [v for v in model.weights if "feature_map" not in v.path]
    return [(x.name, x.trainable) for x in layers], [(v.path, v.trainable) for v in weights]


def halves(sample):
    return sample.dtype != "float32"


def assert_near(found, expected, rounded):
    error, size = np.abs(found - expected), np.abs(expected)
    if rounded:  # a sharp choice may fall otherwise; of another model it is more than all of it
        assert error.mean() <= 0.3 * size.mean()
    else:
        assert error.max() <= 1e-3 * max(1.0, size.max())


def assert_shares_nothing(model, other):
    for kind in ("variables", "_flatten_layers"):
        ids = [
            {id(x) for x in (getattr(y, kind)() if kind[0] == "_" else getattr(y, kind))}
            for y in (model, other)
        ]
        assert not ids[0] & ids[1]


def assert_saved_whole(model, batch, sample):
    """Loaded from a file it is the same; Keras refuses to save what has no config."""
    if sample.compiled == "own":
        return
    expected = outputs(model, batch)
    # Keras merges LoRA into the kernels, and loads what stands beside few bits as float32.
    rounded = sample.adapted == "int8 lora" or bool(sample.adapted and halves(sample))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path, compile=False)
        assert type(loaded) is type(model)
        assert_near(outputs(loaded, batch), expected, rounded)
        model.save_weights(path := Path(folder, "model.weights.h5"))
        loaded.set_weights([np.zeros_like(x) for x in loaded.get_weights()])
        loaded.load_weights(path)
        assert_near(outputs(loaded, batch), expected, rounded)


def refused_as(words):
    return pytest.raises((ValueError, MemoryError), match=words)


@on_one_backend
@tried(share=0.12)
@given(samples())
def test_a_model_in_any_state_is_converted_whole_or_not_at_all(sample):
    with untraced() if sample.held == "" else contextlib.nullcontext():
        case = Case(sample)
        before = everything(case)
        with breaking_off() if case.breaks() else contextlib.nullcontext():
            if (words := case.refusal()) is not None:
                with refused_as(words):
                    case.convert()
                assert everything(case) == before
                np.testing.assert_array_equal(outputs(case.model, case.batch), case.expected)
                return
            converted = case.convert()
        check(case, converted, before)


def check(case, converted, before):
    sample, batch = case.sample, case.batch
    assert type(converted).__name__ == f"Dark{type(converted).stock_cls.__name__}"
    if sample.copy:
        assert everything(case) == before
        np.testing.assert_array_equal(outputs(case.model, batch), case.expected)
        assert_shares_nothing(converted, case.model)
    else:
        assert converted is case.model
    if sample.options == "exact":
        assert_near(outputs(converted, batch), case.expected, halves(sample))
    if sample.part == "task":
        assert flags(converted) == before[1]
    if case.holder is not None:
        found, expected = case.holder.predict(batch, verbose=0), outputs(case.holder, batch)
        assert_near(found.astype("float32"), expected, halves(sample))
    with refused_as("dark already"):
        convert_to_dark(converted)
    assert_saved_whole(converted, batch, sample)
    assert bool(converted.compiled and converted.loss) == case.compiled
    if case.trains:
        step(converted, batch)
