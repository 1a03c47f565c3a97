"""
Title: Two processes with PyTorch
Author: The keras_darkformer developers
Date created: 2026/11/22
Last modified: 2026/11/26
Description: Train one decoder in several processes with DistributedDataParallel.
Accelerator: GPU
"""

"""
## Introduction

Every process has the whole model and its part of each batch. `DistributedDataParallel` averages the
gradients, so that all processes take the same steps. `torchrun` starts this script twice:

```bash
torchrun --nproc-per-node 2 train_ddp.py
```

A notebook, or `python train_ddp.py`, uses one process and learns the same.

## Setup
"""

import os
from pydoc_data.topics import topics

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from keras_darkformer import DarkTransformerBlock

QUICK = bool(os.environ.get("QUICK"))  # a few steps, to see that it runs
WEIGHTS = os.environ.get("WEIGHTS", "ddp.weights.h5")  # where to save them
STEPS, LENGTH, BATCH_SIZE = (3, 8, 6) if QUICK else (200, 256, 8)  # a batch of all together

"""
## The processes meet

`torchrun` tells each process its rank and the number of processes. With GPUs, each process takes
one of its own, and Keras puts the model there.
"""

rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
if size > 1:
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
assert BATCH_SIZE % size == 0, "All processes get equal parts of a batch."

"""
## Data and model

The seed is the same in every process, and so are the windows of text and the initial weights.
"""

keras.utils.set_random_seed(0)
text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()
text = np.frombuffer(text, "uint8").astype("int32")
starts = np.random.default_rng(1).integers(len(text) - LENGTH, size=STEPS * BATCH_SIZE)
windows = torch.from_numpy(text[starts[:, None] + np.arange(LENGTH + 1)])

tokens = keras.Input((None,), dtype="int32")
x = keras.layers.Embedding(256, 128)(tokens)
for seed in range(2):
    x = DarkTransformerBlock(
        512, num_heads=4, num_features=64, rope_max_wavelength=10_000, activation="gelu", seed=seed
    )(x)
logits = keras.layers.Dense(256)(keras.layers.LayerNormalization()(x))
model = keras.Model(tokens, logits)

"""
## Training

This is a PyTorch training loop. Each process takes its own rows of a batch.
"""

device = model(windows[:1, :-1]).device
parallel = DistributedDataParallel(model) if size > 1 else model
weights = [weight for weight in model.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(weights, 2e-3, eps=1e-6)
for step in range(STEPS):
    rows = slice(step * BATCH_SIZE + rank, (step + 1) * BATCH_SIZE, size)
    batch = windows[rows].to(device)
    loss = torch.nn.functional.cross_entropy(
        parallel(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten().long()
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    if rank == 0 and (step % 20 == 0 or step == STEPS - 1):
        print(f"step {step}: loss {loss.item():.4f} in this process of {size}", flush=True)

"""
## Saving

One process saves for all. The barrier keeps a process from ending while another still needs it.
"""

if rank == 0:
    model.save_weights(WEIGHTS)
if size > 1:
    distributed.barrier()
    distributed.destroy_process_group()
