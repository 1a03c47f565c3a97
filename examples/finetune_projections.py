"""
Title: Finetuning queries, keys and values
Author: The keras_darkformer developers
Date created: 2026/11/26
Last modified: 2026/11/26
Description: DARKFormer against Performer, where only the attention's projections learn.
Accelerator: None
"""

"""
## Introduction

As in the paper's study, a decoder with softmax attention is trained on one text. Then its attention
is made linear, and only its projections of queries, keys and values learn another text. They learn
it with Performer's isotropic features, with DARKFormer's learned covariance, and with a covariance
that `calibrate` has fitted first. All take the same steps at the same rates.

The decoder is a small Gemma that reads bytes. It first learns Python's help topics, then code.

## Setup
"""

import inspect
import os
from pydoc_data.topics import topics

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", or "tensorflow"

import keras
import keras_hub
import numpy as np

from keras_darkformer import calibrate, convert_to_dark

QUICK = bool(os.environ.get("QUICK"))  # a few steps, to see that it runs
TRAIN_STEPS, STEPS, LENGTH, BATCH_SIZE = (2, 2, 32, 4) if QUICK else (300, 60, 128, 8)
RATES = (1e-3,) if QUICK else (3e-3, 1e-2)
NUM_FEATURES = 16 if QUICK else 64
ARMS = {
    "exact attention": None,
    "Performer": {"train_geometry": False, "geometry_scale": 1.0},
    "DARKFormer": {"geometry_scale": 1.0},
    "DARKFormer, calibrated": {"tie_geometry": False},
}

"""
## Two texts

Windows of both texts are drawn at random. A tenth of the second text is held out to choose each
arm's learning rate, and another tenth to judge the arm.
"""


def windows(text, count, seed):
    text = np.frombuffer(text.encode(), "uint8").astype("int32")
    starts = np.random.default_rng(seed).integers(len(text) - LENGTH, size=count)
    found = text[starts[:, None] + np.arange(LENGTH + 1)]
    tokens = {"token_ids": found[:, :-1], "padding_mask": np.ones_like(found[:, :-1])}
    return tokens, found[:, 1:]


first = "\n\n".join(topics[name].strip() for name in sorted(topics))
second = "".join(inspect.getsource(module) for module in (inspect, keras.Model, keras.Layer))
tenth = len(second) // 10
train = windows(second[: 8 * tenth], STEPS * BATCH_SIZE, 1)
chosen_by = windows(second[8 * tenth : 9 * tenth], 8 * BATCH_SIZE, 2)
judged_by = windows(second[9 * tenth :], 8 * BATCH_SIZE, 3)

"""
## The exact model
"""


def compile_for_training(model, rate, steps):
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(schedule, clipnorm=1.0), loss, weighted_metrics=[])


keras.utils.set_random_seed(0)
backbone = keras_hub.models.GemmaBackbone(
    vocabulary_size=256,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=128,
    intermediate_dim=512,
    head_dim=32,
)
exact = keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)
compile_for_training(exact, 3e-3, TRAIN_STEPS)
exact.fit(*windows(first, TRAIN_STEPS * BATCH_SIZE, 0), batch_size=BATCH_SIZE, verbose=2)

"""
## The arms

Each arm starts from the exact model. Everything but the projections and feature maps is frozen.
"""

exact.save("exact_gemma.keras")
TRAINED = ("query/kernel", "key/kernel", "value/kernel")


def make_arm(options):
    model = keras.saving.load_model("exact_gemma.keras", compile=False)
    if options is not None:
        convert_to_dark(model, num_features=NUM_FEATURES, **options)
    if options and "tie_geometry" in options:
        calibrate(model, {k: x[: 2 * BATCH_SIZE] for k, x in train[0].items()}, verbose=False)
    for variable in model.trainable_variables:
        chosen = variable.path.endswith(TRAINED) or "/feature_map/" in variable.path
        variable.trainable = chosen
    return model


print(f"{'':24s}{'before':>8s}{'after':>8s}{'rate':>8s}   held-out loss")
for name, options in ARMS.items():
    tried = []
    for rate in RATES:
        model = make_arm(options)
        compile_for_training(model, rate, STEPS)
        before = model.evaluate(*judged_by, verbose=0)
        model.fit(*train, batch_size=BATCH_SIZE, shuffle=False, verbose=0)
        losses = [model.evaluate(*x, verbose=0) for x in (chosen_by, judged_by)]
        tried.append((losses[0], before, losses[1], rate))
    _, before, after, rate = min(tried)
    print(f"{name:24s}{before:8.3f}{after:8.3f}{rate:8.0e}", flush=True)
