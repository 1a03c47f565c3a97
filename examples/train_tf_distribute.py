"""
Title: Two processes with TensorFlow
Author: The keras_darkformer developers
Date created: 2026/11/22
Last modified: 2026/11/26
Description: Train one decoder in several processes with MultiWorkerMirroredStrategy.
Accelerator: GPU
"""

"""
## Introduction

Every process has the whole model and its part of each batch, and the optimizer adds up the
gradients. `WORKERS` lists the addresses of all processes, and `WORKER` says which of them this one
is:

```bash
export WORKERS=localhost:2001,localhost:2002
WORKER=0 python train_tf_distribute.py &
WORKER=1 python train_tf_distribute.py
```

A notebook, or the script without `WORKERS`, uses one process and learns the same.

The loop is written out, because `model.fit` of Keras 3.15 fails under
`MultiWorkerMirroredStrategy`. It does not clip gradients, because Keras would clip those of each
process before it adds them up.

## Setup
"""

import json
import os
from pydoc_data.topics import topics

os.environ["KERAS_BACKEND"] = "tensorflow"
# On a CPU, TensorFlow 2.21 with oneDNN's kernels corrupts its heap in the first step of one start
# in seven (14 of 96; 0 of 33 without).
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import numpy as np
import tensorflow as tf

from keras_darkformer import DarkTransformerBlock

QUICK = bool(os.environ.get("QUICK"))  # a few steps, to see that it runs
WEIGHTS = os.environ.get("WEIGHTS", "tf_distribute.weights.h5")  # where to save them
STEPS, LENGTH, BATCH_SIZE = (3, 8, 6) if QUICK else (200, 256, 8)  # a batch of all together
WORKERS = os.environ.get("WORKERS")
WORKER = int(os.environ.get("WORKER", 0))

"""
## The processes meet

The strategy has to be made before anything is computed.
"""

if WORKERS:
    task = {"type": "worker", "index": WORKER}
    cluster = {"worker": WORKERS.split(",")}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
else:
    strategy = tf.distribute.get_strategy()

"""
## Data and model

The seed is the same in every process, and so are the windows of text and the initial weights. The
model and its optimizer are built in the strategy's scope, which mirrors their variables.
"""

keras.utils.set_random_seed(0)
text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()
text = np.frombuffer(text, "uint8").astype("int32")
starts = np.random.default_rng(1).integers(len(text) - LENGTH, size=STEPS * BATCH_SIZE)
windows = text[starts[:, None] + np.arange(LENGTH + 1)]
data = tf.data.Dataset.from_tensor_slices((windows[:, :-1], windows[:, 1:])).batch(BATCH_SIZE)
if WORKERS:
    data = strategy.experimental_distribute_dataset(data)  # each process gets its part

with strategy.scope():
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(256, 128)(tokens)
    for seed in range(2):
        x = DarkTransformerBlock(
            512, num_heads=4, num_features=64, rope_max_wavelength=10_000, activation="gelu",
            seed=seed,
        )(x)  # fmt: skip
    logits = keras.layers.Dense(256)(keras.layers.LayerNormalization()(x))
    model = keras.Model(tokens, logits)
    optimizer = keras.optimizers.AdamW(2e-3, epsilon=1e-6)
    optimizer.build(model.trainable_variables)

"""
## Training

The loss of each process is divided by the number of processes, because the gradients are added up.
"""


def step_of_one(inputs, targets):
    with tf.GradientTape() as tape:
        logits = model(inputs, training=True)
        losses = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
        loss = tf.reduce_mean(losses) / strategy.num_replicas_in_sync
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    optimizer.apply(gradients, model.trainable_variables)
    return loss


@tf.function
def train_step(batch):
    return strategy.reduce("SUM", strategy.run(step_of_one, args=batch), axis=None)


for step, batch in enumerate(data):
    loss = train_step(batch)
    if WORKER == 0 and (step % 20 == 0 or step == STEPS - 1):
        print(f"step {step}: loss {float(loss):.4f}", flush=True)
if WORKER == 0:
    model.save_weights(WEIGHTS)
