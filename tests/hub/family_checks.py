"""What every family is asked: the checks that the tests and the table of the page share.

A check is a function of a `Case` that raises where something is wrong. `CHECKS`
names them; `outcome` runs one and says what came of it:

- passed;
- refused: keras_darkformer says why it can't be done;
- stock fails: the stock model can't do it either;
- failed: none of these;
- "-": encoders have no use for it.
"""

import pathlib
import re
import tempfile
import traceback
import warnings

import keras
import numpy as np
from backends import BACKEND, DEFAULT_JIT, compiled, to_numpy
from keras import ops
from keras_hub.src.models.smollm3.smollm3_utils import apply_rotary_pos_emb

import keras_darkformer as kd
from keras_darkformer.hub.families import FAMILIES, TOWERS
from keras_darkformer.layers.core import exactly, observed
from keras_darkformer.ops.reference import dark_attention_reference

from .models import (
    LENGTH,
    OWN,
    VOCABULARY,
    WINDOW,
    attentions,
    body,
    convert_to_dark,
    dark,
    feature_maps,
    inputs,
    outputs,
    real,
    task_of,
    tower_inputs,
    values,
)
from .searches import greedy_search

BY_NAME = {family.name: family for family in (*FAMILIES, *TOWERS)}
EXACT = {"attention_mode": "exact", "geometry_scale": 1.0, "layers": "all"}
PROMPT = inputs(8, 2, 5)
CROSSENTROPY = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}


class Case:
    """One family, dark or, to see what it can do by itself, stock.

    Models that no check changes are made once.
    """

    def __init__(self, family, is_dark=True):
        self.family, self.is_dark = family, is_dark
        self.made = {}

    def once(self, name, make):
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @property
    def stock(self):
        return self.once("stock", lambda: task_of(self.family.name))

    @property
    def dark(self):
        return self.once("dark", self.model)

    @property
    def mixed(self):
        """One layer dark, one exact."""
        return self.once("mixed", lambda: self.model(layers=[0]))

    def model(self, dtype=None, num_layers=2, **options):
        """A new model, all of whose layers are dark."""
        stock = {} if dtype is None else {"dtype": dtype}
        stock = task_of(self.family.name, num_layers, **stock)
        return self.converted(stock, dark, **options)

    def converted(self, stock, convert=convert_to_dark, **options):
        if not self.is_dark:
            return stock
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Converting")
            return convert(stock, **{"num_features": 16, "layers": "all"} | options)

    @property
    def is_tower(self):
        """Whether it is fed otherwise than a model of texts: a tower, or a user's own model."""
        return self.family in TOWERS or self.is_own

    @property
    def is_own(self):
        return self.family in OWN.values()

    @property
    def generates(self):
        return self.family.causal and not self.is_tower

    def batch(self, *lengths):
        if self.is_tower:
            return tower_inputs(self.stock)
        return inputs(*lengths or (LENGTH, 5, 9), model=body(self.stock))

    def compile(self, model, optimizer):
        """Compiles a model with a loss; a backbone is to put out zeros."""
        loss = CROSSENTROPY
        if model is body(model):
            # Moonshine puts out a mask, too.
            loss = {"loss": keras.tree.map_structure(squares_of_floats, model.output)}
        model.compile(optimizer=optimizer, **loss, jit_compile=DEFAULT_JIT)

    def labels(self, model, batch):
        if model is body(model):
            return keras.tree.map_structure(np.zeros_like, to_numpy(model(batch)))
        if self.is_tower:
            return np.arange(3)
        return batch["token_ids"] if self.family.causal else batch["token_ids"][:, 0]

    def of_tokens(self, model, batch):
        """What comes out for every token: an encoder's head sees one only."""
        return outputs(model if self.generates else body(model), batch)


def squares_of_floats(output):
    """A loss that an output does or does not count in."""
    is_float = keras.backend.is_float_dtype(output.dtype)
    return "mse" if is_float else lambda y, found: ops.zeros_like(y, dtype="float32")


def close(actual, expected, tolerance=1e-4):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


def generated(model, sampler, prompt=PROMPT):
    prompt = {**prompt, "padding_mask": prompt["padding_mask"].astype(bool)}
    model.compile(sampler=sampler)
    return to_numpy(model.generate(prompt, stop_token_ids=None)["token_ids"])


# --- What a conversion is ---


def exact(case):
    """Exact mode at scale 1 gives what the source does; another scale does not."""
    converted = case.converted(case.stock, copy=True, **EXACT)
    flatter = case.converted(case.stock, copy=True, **EXACT | {"geometry_scale": 0.5})
    for batch in (case.batch(LENGTH, LENGTH, LENGTH), case.batch()):
        expected = case.of_tokens(case.stock, batch)
        close(case.of_tokens(converted, batch), expected, tolerance=1e-5)
    difference = np.abs(case.of_tokens(flatter, batch) - expected).max()
    assert difference > 0.01 * np.abs(expected).max()


def named(layer, name):
    names = (name, f"_{name}", f"{name[0]}_proj", f"{name[0]}_dense")
    return next(getattr(layer, x) for x in names if hasattr(layer, x))


def projected(family, attention, x):
    """Query, key and value as the stock layer makes them."""
    if hasattr(attention, "_qkv_dense"):
        query, key, value = ops.split(attention._qkv_dense(x), 3, axis=-1)
    else:
        query, key, value = (named(attention, f"{y}_dense")(x) for y in ("query", "key", "value"))
    if family.norms and hasattr(attention, family.norms[0]):
        query, key = (
            getattr(attention, name)(of)
            for name, of in zip(family.norms, (query, key), strict=True)
        )
    if hasattr(attention, "q_proj"):  # of SmolLM 3
        query, key, value = (
            ops.reshape(y, (*y.shape[:2], -1, attention.head_dim)) for y in (query, key, value)
        )
        if attention.use_rope:
            cos, sin = attention.rotary_embedding(query)
            query, key = apply_rotary_pos_emb(query, key, cos, sin, expansion_axis=2)
        return query, key, value
    if hasattr(attention, "rotary_dim"):  # of GPT-NeoX
        size = attention.rotary_dim
        query, key = (
            ops.concatenate(
                [attention.rotary_embedding_layer(y[..., :size]), y[..., size:]], axis=-1
            )
            for y in (query, key)
        )
        return query, key, value
    if hasattr(attention, "q_dense"):  # of ESM
        shape = (*query.shape[:2], attention.heads, -1)
        query, key, value = (ops.reshape(y, shape) for y in (query, key, value))
        return *attention.rotary_embedding_layer(query, key), value
    if hasattr(attention, "_apply_rope"):
        return attention._apply_rope(query, 0), attention._apply_rope(key, 0), value
    if family.rotary is not None:
        query, key = map(getattr(attention, family.rotary), (query, key))
    return query, key, value


def kernel(case):
    """A converted layer is the float64 reference between its own projections, padded or not."""
    if case.is_tower:
        return kernel_of_tower(case)
    attention = attentions(case.mixed)[0]
    hidden_dim = body(case.mixed).hidden_dim
    x = np.random.default_rng(0).standard_normal((3, LENGTH, hidden_dim))
    x = ops.convert_to_tensor(x, "float32")
    feature_map, dense = attention.feature_map, named(attention, "output_dense")
    parts = to_numpy(projected(case.family, attention, x))
    for mask in (None, real(LENGTH, 9, 5)):
        expected, _ = dark_attention_reference(
            *parts,
            to_numpy(feature_map.geometry.value),
            to_numpy(feature_map.projection.value),
            causal=case.family.causal,
            key_mask=mask,
        )
        kernel = np.reshape(to_numpy(dense.kernel), (*expected.shape[2:], hidden_dim))
        expected = np.einsum("btnh,nhd->btd", expected, kernel)
        if dense.bias is not None:
            expected += to_numpy(dense.bias)
        given = None if mask is None else ops.cast(mask, "int32")
        takes_two = isinstance(attention, keras.layers.MultiHeadAttention)
        found = attention(*[x, x] if takes_two else [x], attention_mask=given)
        close(to_numpy(found[0] if isinstance(found, tuple) else found), expected)


def kernel_of_tower(case):
    """The outputs are those with the float64 reference in every layer's place.

    What it is between is what softmax is between in the source.
    """
    model, batch = case.converted(case.stock, copy=True), case.batch()
    with exactly(attentions(model)):
        close(case.of_tokens(model, batch), case.of_tokens(case.stock, batch))

    def definition(layer, heads):
        output, _ = dark_attention_reference(
            *to_numpy([heads.query, heads.key, heads.value]),
            to_numpy(layer.feature_map.geometry.value),
            to_numpy(layer.feature_map.projection.value),
            causal=case.family.causal,
        )
        return ops.convert_to_tensor(output, "float32")

    found = case.of_tokens(model, batch)
    with observed(attentions(model), definition):
        close(found, case.of_tokens(model, batch))


def paths(case):
    """Stock weights stay under their paths, and only feature maps are new; a report says so."""
    stock, mixed = case.stock, case.mixed
    if case.is_tower:  # some of whose layers and weights have names from a counter
        made = []
        for make in (lambda: task_of(case.family.name), lambda: case.model(layers=[0])):
            keras.backend.clear_session(free_memory=False)
            keras.utils.set_random_seed(0)  # biases of ViT begin near 0, at random
            made.append(make())
        stock, mixed = made
    # Some blocks of experts, too.
    before, after = (
        {re.sub(r"moe_block_\d+", "moe_block", path): value for path, value in values(x).items()}
        for x in (stock, mixed)
    )
    assert before.keys() <= after.keys()
    assert {path.rsplit("/", 2)[1] for path in after.keys() - before.keys()} == {"feature_map"}
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    report = kd.conversion_report(case.mixed)
    assert (report["converted"], report["left"]) == ([0], [1])
    kinds = {"Mistral": ["local"] * 2}
    found = [layer["kind"] for layer in report["layers"]]
    assert found == kinds.get(case.family.name, ["global"] * 2)


# --- Training ---


def fit(case):
    """`fit` with padding, weights and accumulated gradients moves all geometries, no projection."""
    model = case.model(num_layers=1)
    batch = case.batch()
    before = values(model)
    case.compile(model, keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2))
    data = {"x": batch, "y": case.labels(model, batch)}
    if model is not body(model) and not case.is_tower:
        weights = (batch["token_ids"] > 0).astype("float32")
        data["sample_weight"] = weights if case.family.causal else weights[:, 0]
    history = keras.Model.fit(model, **data, epochs=8, batch_size=3, verbose=0)
    losses, after = history.history["loss"], values(model)
    assert losses[-1] < losses[0], losses
    if case.is_dark:
        still = {path for path in after if np.array_equal(before[path], after[path])}
        assert {path for path in after if path.endswith("projection")} <= still
        assert not {path for path in after if path.endswith("geometry")} & still


def lora(case):
    """LoRA leaves geometries trainable, trains, and its files load into another model."""
    trained, other = case.model(num_layers=1), case.model(num_layers=1)
    for model in (trained, other):
        body(model).enable_lora(2)
    if case.is_dark:
        stock = task_of(case.family.name, num_layers=1)
        body(stock).enable_lora(2)
        names, of_stock = (
            {weight.path.rsplit("/", 1)[1] for weight in body(model).trainable_weights}
            for model in (trained, stock)
        )
        assert names == of_stock | {"geometry"}
    batch = case.batch()
    case.compile(trained, keras.optimizers.Adam(1e-2))
    keras.Model.fit(trained, batch, case.labels(trained, batch), batch_size=3, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.lora.h5"
        body(trained).save_lora_weights(path)
        body(other).load_lora_weights(path)


def calibrated(**options):
    def check(case):
        model = case.converted(
            case.stock, copy=True, geometry_scale=0.5, tie_geometry=False, **options
        )
        batch = case.batch()
        kd.calibrate(model, batch, refine=False, verbose=False)
        shifts = [to_numpy(feature_map.query_shift.value) for feature_map in feature_maps(model)]
        assert all(np.abs(shift).max() > 0 for shift in shifts)  # centred
        history = kd.transfer_attention(
            model, batch, steps=6, validate_every=1, learning_rate=3e-2, verbose=0
        )
        losses = history.history["loss"]
        # Nothing is to be learned where the memory holds all that the stock layer's window shows.
        assert losses[-1] < 0.9 * losses[0] or max(losses) < 1e-6, losses
        report = kd.approximation_report(model, batch).summary()
        assert np.isfinite(list(report["relative_error"].values())).all()
        # Summed over the layers, and from before the last step.
        kl = len(shifts) * report["kl"]["dark"]
        np.testing.assert_allclose(kl, losses[-1], rtol=0.5, atol=1e-6)

    check.__doc__ = "Calibrates; transfer lowers the loss; the report agrees with it."
    return check


# --- Number formats ---


def quantized(mode):
    def check(case):
        """Quantized, it computes, and is the same after saving and loading."""
        model = case.model()
        model.quantize(mode)
        batch = case.batch()
        expected = outputs(model, batch)
        assert np.isfinite(expected).all()
        with tempfile.TemporaryDirectory() as folder:
            model.save_to_preset(folder)
            loaded = type(model).from_preset(folder, **without_preprocessor(model))
            close(outputs(loaded, batch), expected, tolerance=1e-3)

    return check


def half(policy):
    def check(case):
        """Near float32, and finite."""
        model, full = case.model(dtype=policy), case.model()
        full.set_weights(model.get_weights())
        batch = case.batch()
        found, expected = outputs(model, batch), outputs(full, batch)
        assert np.isfinite(found).all()
        difference = np.abs(found - expected)
        assert difference.mean() < 0.02 * np.abs(expected).max(), difference.mean()

    return check


# --- Generation ---


def recurrent(case):
    """Logits token by token, with a state and a cache, are those of the full forward pass."""
    # Layers of GPT-NeoX that are left exact cache as KerasHub's do, which is wrong.
    model = case.dark if case.family.name == "GPTNeoX" else case.mixed
    batch = case.batch(LENGTH, LENGTH, LENGTH)
    step = compiled(model.call_with_cache) if DEFAULT_JIT else model.call_with_cache
    cache, logits = model.get_initial_cache(3, LENGTH), []
    for start in range(LENGTH):
        token_ids = ops.convert_to_tensor(batch["token_ids"][:, start : start + 1])
        part, _, cache = step(token_ids, cache, start)
        logits.append(to_numpy(part))
    close(np.concatenate(logits, axis=1), outputs(model, batch), tolerance=1e-3)


def greedy_by(model):
    expected = greedy_search(model, PROMPT)
    assert len(set(expected[PROMPT["padding_mask"] == 0])) > 3  # not one token over and over
    np.testing.assert_array_equal(generated(model, "greedy"), expected)


def greedy(case):
    """A ragged batch, equal to an argmax loop over the whole forward pass."""
    greedy_by(case.dark)


def mixed(case):
    """As greedy, with one layer dark and one exact."""
    greedy_by(case.mixed)


def sampled(name):
    def check(case):
        """The prompt stays, and what follows are tokens."""
        tokens = generated(case.dark, name)
        given = PROMPT["padding_mask"].astype(bool)
        np.testing.assert_array_equal(tokens[given], PROMPT["token_ids"][given])
        assert ((tokens >= 0) & (tokens < VOCABULARY)).all()

    return check


def stream(case):
    """Reading in pieces gives the logits of the whole text."""
    batch = case.batch(LENGTH, LENGTH, LENGTH)
    running = kd.hub.Stream(case.dark, 3)
    for start in range(0, LENGTH, 4):
        logits = running.read(batch["token_ids"][:, start : start + 4])
    close(to_numpy(logits), outputs(case.dark, batch)[:, -1], tolerance=1e-3)


# --- Saving ---


def keras_file(case):
    """The same outputs and class from a .keras file."""
    batch = case.batch()
    with tempfile.TemporaryDirectory() as folder:
        case.mixed.save(f"{folder}/model.keras")
        loaded = keras.saving.load_model(f"{folder}/model.keras")
    assert type(loaded) is type(case.mixed)
    close(outputs(loaded, batch), outputs(case.mixed, batch), tolerance=1e-5)


def without_preprocessor(model):
    return {} if model is body(model) else {"preprocessor": None}


def preset(case):
    """The same outputs and class from a preset, through the stock classes."""
    with tempfile.TemporaryDirectory() as folder:
        case.mixed.save_to_preset(folder)
        model = type(case.stock).from_preset(folder, **without_preprocessor(case.stock))
        backbone = case.family.backbone.from_preset(folder)
    batch = case.batch()
    assert (type(model), type(backbone)) == (type(case.mixed), type(body(case.mixed)))
    np.testing.assert_array_equal(outputs(model, batch), outputs(case.mixed, batch))
    np.testing.assert_array_equal(outputs(backbone, batch), outputs(body(case.mixed), batch))


def stock_preset(case):
    """A stock preset loads as a dark model, through the dark class."""
    dark_class = getattr(kd.hub, f"Dark{case.family.backbone.__name__}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Converting")
        body(case.stock).save_to_preset(folder)
        loaded = dark_class.from_preset(folder, num_features=12)
    assert type(loaded) is dark_class
    assert kd.conversion_report(loaded)["num_features"] == 12


def export(case):
    """The backend's own format gives the same outputs: SavedModel, or `torch.export`."""
    model, batch = case.model(), case.batch()
    expected = outputs(model, batch)
    if BACKEND == "torch":
        import torch

        tensors = {name: torch.as_tensor(array) for name, array in batch.items()}
        program = torch.export.export(model, (tensors,), strict=False)
        close(program.module()(tensors).detach().numpy(), expected, tolerance=1e-3)
        return
    import tensorflow as tf

    # Of one length: on JAX Keras' exporter takes no other, of stock models neither.
    signature = [{name: keras.InputSpec("int32", (None, LENGTH), name=name) for name in batch}]
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False, input_signature=signature)
        loaded = tf.saved_model.load(folder)  # which holds the variables
        served = loaded.serve({name: tf.constant(array) for name, array in batch.items()})
    close(np.asarray(served), expected, tolerance=1e-3)


CHECKS = {
    "exact mode = source": exact,
    "kernel = reference": kernel,
    "paths and report": paths,
    "fit": fit,
    "LoRA": lora,
    "int8": quantized("int8"),
    "int4": quantized("int4"),
    "float8": quantized("float8"),
    "mixed bfloat16": half("mixed_bfloat16"),
    "mixed float16": half("mixed_float16"),
    "bfloat16": half("bfloat16"),
    "recurrent = parallel": recurrent,
    "greedy": greedy,
    "top-k": sampled("top_k"),
    "top-p": sampled("top_p"),
    "random": sampled("random"),
    "beam": sampled("beam"),
    "contrastive": sampled("contrastive"),
    "mixed layers": mixed,
    ".keras": keras_file,
    "preset": preset,
    "stock preset": stock_preset,
    "calibrate, transfer, report": calibrated(),
    "memory": calibrated(sliding_window=WINDOW, num_sinks=2, cache_size=3),
    "stream": stream,
    "export": export,
}
GENERATES = {"recurrent = parallel", "greedy", "top-k", "top-p", "random", "beam", "contrastive"}
GENERATES |= {"mixed layers", "stream"}
# What only models of KerasHub are asked; the kernel of others is in tests/anymodel.
OF_KERAS_HUB = {"kernel = reference", "paths and report", "LoRA", "preset", "stock preset"}
OF_KERAS_HUB |= {"int8", "int4", "float8", "memory"}
# What the stock model does not have; a failure there is ours.
OURS = {"exact mode = source", "kernel = reference", "paths and report", "recurrent = parallel"}
OURS |= {"calibrate, transfer, report", "memory", "stream", "stock preset"}


def outcome(case, name):
    """`(status, reason)` of a check; see the module."""
    if not case.generates and name in GENERATES:
        return "-", "an encoder"
    if case.is_tower and name == "export":
        return "-", "not asked"
    if case.is_own and name in OF_KERAS_HUB:
        return "-", "not a KerasHub model"
    try:
        CHECKS[name](case)
        return "passed", ""
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        raised_by_us = "keras_darkformer" in pathlib.Path(frames[-1].filename).parts
        reason = _in_short(error)
        if isinstance(error, ValueError) and raised_by_us:
            return "refused", reason
    if name not in OURS:
        try:
            CHECKS[name](Case(case.family, is_dark=False))
        except Exception as error:
            return "stock fails", _in_short(error)
    return "failed", reason


def _in_short(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
