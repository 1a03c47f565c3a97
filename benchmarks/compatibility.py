"""What works with which KerasHub family on which backend: tries it, and writes the table.

    KERAS_BACKEND=torch python benchmarks/compatibility.py
    KERAS_BACKEND=torch python benchmarks/compatibility.py --families Llama --checks beam export

From every family in `keras_darkformer.hub.families` it makes a tiny model of
random weights, converts all layers and runs the checks below; what fails is
tried with the stock model too. Writes results/compatibility_BACKEND.json, and
docs/compatibility.md from those of all backends:

- passed;
- refused: keras_darkformer says why it can't be done;
- stock fails: the stock model can't do it either;
- failed: none of these.
"""

import argparse
import inspect
import json
import pathlib
import tempfile
import time
import traceback
import warnings

import keras
import numpy as np
from common import BENCHMARKS, RESULTS, backend, environment, write
from keras import ops

import keras_darkformer as kd
from keras_darkformer.hub.families import FAMILIES

PAGE = BENCHMARKS.parent / "docs" / "compatibility.md"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
LENGTH, VOCABULARY = 10, 64
SIZES = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_heads": 4,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 32,
    "head_dim": 8,
    "max_sequence_length": 32,
    "num_experts": 4,
    "top_k": 2,
    "moe_intermediate_dim": 16,
    "shared_expert_intermediate_dim": 16,
    "image_size": 16,
    "dropout": 0.0,
}


class Case:
    """One family, stock or dark."""

    def __init__(self, family, dark):
        self.family, self.dark = family, dark

    def stock(self, **options):
        names = inspect.signature(self.family.backbone).parameters
        sizes = {name: size for name, size in SIZES.items() if name in names}
        keras.utils.set_random_seed(1)
        backbone = self.family.backbone(**sizes | options)
        if "CausalLM" in self.family.tasks:
            return self.family.tasks["CausalLM"](backbone=backbone, preprocessor=None)
        return self.family.tasks["TextClassifier"](
            backbone=backbone, num_classes=VOCABULARY, preprocessor=None
        )

    def convert(self, model, **options):
        if not self.dark:
            return model
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Converting")
            return kd.convert_to_dark(model, **{"num_features": 16, "layers": "all"} | options)

    def model(self, dtype=None, **options):
        return self.convert(self.stock(**({} if dtype is None else {"dtype": dtype})), **options)

    def batch(self, model, lengths=(LENGTH, 4, 7)):
        mask = np.arange(LENGTH) < np.array(lengths)[:, None]
        tokens = np.random.default_rng(0).integers(1, VOCABULARY, mask.shape)
        batch = {"token_ids": tokens * mask, "padding_mask": mask}
        batch = {name: array.astype("int32") for name, array in batch.items()}
        for name in model.backbone.input:
            batch.setdefault(name, np.zeros_like(batch["token_ids"]))
        return batch

    def labels(self, batch):
        causal = "CausalLM" in self.family.tasks
        return batch["token_ids"] if causal else batch["token_ids"][:, 0]


def outputs(model, batch):
    return np.asarray(ops.convert_to_numpy(ops.cast(model(batch), "float32")))


def close(actual, expected, tolerance=1e-3):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


def generated(model, batch, sampler):
    prompt = {name: batch[name] for name in ("token_ids", "padding_mask")}
    model.compile(sampler=sampler)
    return np.asarray(model.generate(prompt, stop_token_ids=None)["token_ids"])


# === The checks: an exception is a failure ===


def exact(case):
    """Exact mode at scale 1 gives the logits of the source."""
    source = case.stock()
    batch = case.batch(source)
    expected = outputs(source, batch)
    model = case.convert(source, attention_mode="exact", geometry_scale=1.0)
    close(outputs(model, batch), expected, 1e-5)


def fit(case):
    """`fit` with padding, sample weights and gradient accumulation lowers the loss."""
    model = case.model()
    batch = case.batch(model)
    weights = batch["padding_mask"].astype("float32")
    if "CausalLM" not in case.family.tasks:
        weights = weights[:, 0]
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = keras.Model.fit(
        model, batch, case.labels(batch), sample_weight=weights, epochs=8, batch_size=3, verbose=0
    )
    losses = history.history["loss"]
    assert losses[-1] < losses[0], losses


def lora(case):
    """LoRA trains, and its files load into another model."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.lora.h5"
        models = [case.model(), case.model()]
        for model in models:
            model.backbone.enable_lora(2)
        batch = case.batch(models[0])
        models[0].compile(
            optimizer=keras.optimizers.Adam(1e-2),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        keras.Model.fit(models[0], batch, case.labels(batch), batch_size=3, verbose=0)
        models[0].backbone.save_lora_weights(path)
        models[1].backbone.load_lora_weights(path)


def quantized(mode):
    def check(case):
        """Quantized, it computes, and is the same after saving and loading."""
        model = case.model()
        model.quantize(mode)
        batch = case.batch(model)
        expected = outputs(model, batch)
        assert np.isfinite(expected).all()
        with tempfile.TemporaryDirectory() as folder:
            model.save_to_preset(folder)
            loaded = type(model).from_preset(folder, preprocessor=None)
            close(outputs(loaded, batch), expected)

    return check


def half(policy):
    def check(case):
        """Near float32, and finite."""
        model = case.model(dtype=policy)
        batch = case.batch(model)
        full = case.model()
        full.set_weights(model.get_weights())
        difference = np.abs(outputs(model, batch) - outputs(full, batch))
        assert difference.max() < 0.1 * np.abs(outputs(full, batch)).max(), difference.max()

    return check


def greedy(case):
    """A ragged batch, equal to an argmax loop over the whole forward pass."""
    model = case.model()
    batch = case.batch(model, (6, 3, 5))
    tokens, given = batch["token_ids"].copy(), batch["padding_mask"].astype(bool)
    for index in range(3, LENGTH):
        seen = np.broadcast_to(np.arange(LENGTH) < index, tokens.shape).astype("int32")
        chosen = outputs(model, {"token_ids": tokens, "padding_mask": seen})[:, index - 1].argmax(
            -1
        )
        tokens[:, index] = np.where(given[:, index], tokens[:, index], chosen)
    np.testing.assert_array_equal(generated(model, batch, "greedy"), tokens)


def sampled(name):
    def check(case):
        """The prompt stays, and what follows are tokens."""
        model = case.model()
        batch = case.batch(model, (4, 4, 4))
        tokens = generated(model, batch, name)
        np.testing.assert_array_equal(tokens[:, :4], batch["token_ids"][:, :4])
        assert ((tokens >= 0) & (tokens < VOCABULARY)).all()

    return check


def mixed(case):
    """One layer dark, one exact, generating together."""
    model = case.model(layers=[0]) if case.dark else case.model()
    batch = case.batch(model, (4, 4, 4))
    recurrent = generated(model, batch, "greedy")
    assert recurrent.shape == batch["token_ids"].shape


def keras_file(case):
    """The same outputs and class from a .keras file."""
    model = case.model()
    batch = case.batch(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        loaded = keras.saving.load_model(f"{folder}/model.keras")
    assert type(loaded) is type(model)
    close(outputs(loaded, batch), outputs(model, batch), 1e-5)


def preset(case):
    """The same outputs and class from a preset, through the stock class."""
    model = case.model()
    batch = case.batch(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_to_preset(folder)
        task = type(case.stock())
        loaded = task.from_preset(folder, preprocessor=None)
    assert type(loaded) is type(model)
    close(outputs(loaded, batch), outputs(model, batch), 1e-5)


def calibrated(**options):
    def check(case):
        """Calibrates, transfers and reports."""
        model = case.model(tie_geometry=False, **options)
        batch = case.batch(model)
        kd.calibrate(model, batch, refine=False, verbose=False)
        kd.transfer_attention(model, batch, steps=2, verbose=0)
        report = kd.approximation_report(model, batch).summary()
        assert np.isfinite(report["relative_error"]["dark"])

    return check


def stream(case):
    """Reading in pieces gives the logits of the whole text."""
    model = case.model()
    batch = case.batch(model, (LENGTH,) * 3)
    running = kd.hub.Stream(model, 3)
    for start in range(0, LENGTH, 4):
        logits = running.read(batch["token_ids"][:, start : start + 4])
    close(np.asarray(ops.convert_to_numpy(logits)), outputs(model, batch)[:, -1])


def export(case):
    """The backend's own format gives the same outputs: SavedModel, or `torch.export`."""
    model = case.model()
    batch = case.batch(model)
    expected = outputs(model, batch)
    if backend() == "torch":
        import torch

        tensors = {name: torch.as_tensor(array) for name, array in batch.items()}
        program = torch.export.export(model, (tensors,), strict=False)
        close(program.module()(tensors).detach().numpy(), expected)
        return
    import tensorflow as tf

    # Of one length: on JAX Keras' exporter takes no other, of stock models neither.
    signature = [{name: keras.InputSpec("int32", (None, LENGTH), name=name) for name in batch}]
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, verbose=False, input_signature=signature)
        loaded = tf.saved_model.load(folder)  # which holds the variables
        served = loaded.serve({name: tf.constant(array) for name, array in batch.items()})
    close(np.asarray(served), expected)


CHECKS = {
    "exact mode = source": exact,
    "fit": fit,
    "LoRA": lora,
    "int8": quantized("int8"),
    "int4": quantized("int4"),
    "float8": quantized("float8"),
    "mixed bfloat16": half("mixed_bfloat16"),
    "mixed float16": half("mixed_float16"),
    "bfloat16": half("bfloat16"),
    "greedy": greedy,
    "top-k": sampled("top_k"),
    "top-p": sampled("top_p"),
    "random": sampled("random"),
    "beam": sampled("beam"),
    "contrastive": sampled("contrastive"),
    "mixed layers": mixed,
    ".keras": keras_file,
    "preset": preset,
    "calibrate, transfer, report": calibrated(),
    "window": calibrated(sliding_window=3),
    "stream": stream,
    "export": export,
}
# What encoders have no use for.
GENERATES = ("greedy", "top-k", "top-p", "random", "beam", "contrastive", "mixed layers", "stream")
# What the stock model does not have; a failure there is ours.
OURS = ("exact mode = source", "calibrate, transfer, report", "window", "stream")


def outcome(family, name):
    """`(status, reason)`."""
    if not family.causal and name in GENERATES:
        return "-", "an encoder"
    try:
        CHECKS[name](Case(family, dark=True))
        return "passed", ""
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        raised_by_us = "keras_darkformer" in pathlib.Path(frames[-1].filename).parts
        reason = _in_short(error)
        if isinstance(error, ValueError) and raised_by_us:
            return "refused", reason
    if name not in OURS:
        try:
            CHECKS[name](Case(family, dark=False))
        except Exception as error:
            return "stock fails", _in_short(error)
    return "failed", reason


def _in_short(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def page():
    """docs/compatibility.md from the results of all backends."""
    found = {}
    for name in BACKENDS:
        path = RESULTS / f"compatibility_{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())
    lines = [
        "# What works with which family",
        "",
        "Written by `benchmarks/compatibility.py`: tiny models of random weights, all layers",
        "converted, each check run on each backend. ✓: passed on all three. Otherwise what",
        "happened, by backend (TF, JAX, PT); `stock fails`: KerasHub's own model can't do it",
        "either; `refused`: an error says why. The reasons are in",
        "`benchmarks/results/compatibility_*.json`. Encoders do not generate, and their attention",
        "goes in both directions, which a window can't.",
        "",
    ]
    names = [family.name for family in FAMILIES]
    lines.append("| | " + " | ".join(names) + " |")
    lines.append("| --- |" + " --- |" * len(names))
    for check in CHECKS:
        cells = []
        for name in names:
            by = {b: r["outcomes"][name][check][0] for b, r in found.items()}
            by = {b: "✓" if status == "passed" else status for b, status in by.items()}
            short = {"tensorflow": "TF", "jax": "JAX", "torch": "PT"}
            same = len(set(by.values())) == 1
            cells.append(
                next(iter(by.values()))
                if same
                else ", ".join(f"{short[b]} {status}" for b, status in by.items())
            )
        lines.append(f"| {check} | " + " | ".join(cells) + " |")
    lines += ["", "What the rows check:", ""]
    lines += [f"- {name}: {check.__doc__}" for name, check in CHECKS.items()]
    versions = {b: r["environment"]["versions"] for b, r in found.items()}
    used = [f"{BACKENDS[b]} {of[b]} with Keras {of['keras']}" for b, of in versions.items()]
    lines += ["", f"{', '.join(used)}."]
    PAGE.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", default=[family.name for family in FAMILIES])
    parser.add_argument("--checks", nargs="*", default=list(CHECKS))
    args = parser.parse_args()
    path = RESULTS / f"compatibility_{backend()}.json"
    outcomes = json.loads(path.read_text())["outcomes"] if path.exists() else {}
    if backend() == "jax":  # compiling takes longer than running models this small
        import jax

        jax.config.update("jax_disable_most_optimizations", True)
    for family in FAMILIES:
        if family.name not in args.families:
            continue
        started = time.perf_counter()
        of_family = outcomes.setdefault(family.name, {})
        for name in args.checks:
            status, reason = of_family[name] = outcome(family, name)
            if status not in ("passed", "-"):
                print(f"{family.name}, {name}: {status}. {reason}", flush=True)
            keras.backend.clear_session(free_memory=False)
        print(f"{family.name}: {time.perf_counter() - started:.0f} s", flush=True)
        write(
            "compatibility",
            {"environment": environment("keras-hub", "tensorflow"), "outcomes": outcomes},
        )
    page()


if __name__ == "__main__":
    main()
