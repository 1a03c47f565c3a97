"""
Title: From a checkpoint to a dark model
Author: The keras_darkformer developers
Date created: 2026/11/21
Last modified: 2026/11/26
Description: Give a pretrained decoder linear attention, and see what it loses and wins back.
Accelerator: None
"""

"""
## Introduction

A pretrained decoder writes with a key/value cache that grows with every token. `linearize` gives
its layers linear attention with a state of constant size, keeps all weights, and trains the model
until it predicts text about as well as before.

Without a checkpoint, this example first trains a small Gemma on the help topics that come with
Python. `CHECKPOINT` names a model to start from instead, as KerasHub's `from_preset` takes it: a
preset's name, a folder, or a folder or handle in the layout of Hugging Face.

```bash
CHECKPOINT=hf://HuggingFaceTB/SmolLM2-135M TEXT_FILE=book.txt python checkpoint_to_dark.py
```

## Setup
"""

import io
import os
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", or "tensorflow"

import keras
import keras_hub
import sentencepiece

from keras_darkformer import approximation_report, linearize

QUICK = bool(os.environ.get("QUICK"))  # a few steps, to see that it runs
CHECKPOINT = os.environ.get("CHECKPOINT")
TEXT_FILE = os.environ.get("TEXT_FILE")
OUTPUT = os.environ.get("OUTPUT", "results/dark_preset")
PROMPT = "The value of"
LENGTH, BATCH_SIZE = 32 if QUICK else 512 if CHECKPOINT else 128, 8
EPOCHS, TOKENS = (1, 1_000) if QUICK else (6, 200_000)  # of training; to fit the dark model

"""
## The text

The text is cut into stretches. One in ten is held out to judge the models by.
"""

if TEXT_FILE:
    text = Path(TEXT_FILE).read_text(encoding="utf-8")
else:
    text = " ".join(" ".join(topics[name] for name in sorted(topics)).split())
if QUICK:
    text = text[:40_000]
stretches = [text[start : start + 600] for start in range(0, len(text), 600)]
held_out = stretches[9::10]
texts = [x for i, x in enumerate(stretches) if i % 10 != 9]

"""
## The exact model

The small Gemma has four layers and a tokenizer of its own. A text of 600 characters fills its
sequences of 128 tokens.
"""


def train_tokenizer():
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for x in texts for line in x.splitlines() if line),
        model_writer=proto, model_type="bpe", vocab_size=1024, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["\n"], pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", minloglevel=2,
    )  # fmt: skip
    return keras_hub.models.GemmaTokenizer(proto=proto.getvalue())


def train_gemma():
    tokenizer = train_tokenizer()
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=tokenizer.vocabulary_size(), num_layers=1 if QUICK else 4,
        num_query_heads=4, num_key_value_heads=2, hidden_dim=128, intermediate_dim=512, head_dim=32,
    )  # fmt: skip
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=LENGTH)
    model = keras_hub.models.GemmaCausalLM(backbone, preprocessor)
    steps = EPOCHS * -(-len(texts) // BATCH_SIZE)
    rate = keras.optimizers.schedules.CosineDecay(3e-3, steps, alpha=0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(rate, clipnorm=1.0), loss, weighted_metrics=[])
    model.fit(texts, batch_size=BATCH_SIZE, epochs=EPOCHS, verbose=2)
    return model


model = keras_hub.models.CausalLM.from_preset(CHECKPOINT) if CHECKPOINT else train_gemma()
model.compile(sampler="greedy")
before = model.generate(PROMPT, max_length=LENGTH // 2)

"""
## The dark model

`linearize` converts the model in place, fits the features to its queries and keys, trains each
layer on its own softmax, and then trains the whole model on the exact model's logits. The report
has the losses of held-out text, before and after each stage. A stage that gains nothing is undone.

The small Gemma gets 64 features. A checkpoint gets an exact memory of 256 tokens, which served
checkpoints best, and four of its layers stay exact.
"""

options = {"keep_exact": 4, "batch_size": 1} if CHECKPOINT else {"num_features": 64}
model, report = linearize(
    model,
    texts,
    **{"batch_size": BATCH_SIZE} | options,
    validation_data=held_out,
    length=LENGTH,
    tokens=TOKENS,
)
print(report)

"""
`approximation_report` says what each layer and head lost.
"""

print(approximation_report(model, held_out[:BATCH_SIZE]))

"""
## Writing, saving, loading

The same prompt is continued before and after. The dark model is saved as a preset with a model
card. In another session, `import keras_darkformer.hub` before loading it, so that KerasHub knows
its class.
"""

model.compile(sampler="greedy")
after = model.generate(PROMPT, max_length=LENGTH // 2)
print(f"exact: {before!r}\ndark:  {after!r}")

model.save_to_preset(OUTPUT)
loaded = keras_hub.models.CausalLM.from_preset(OUTPUT)
loaded.compile(sampler="greedy")
assert loaded.generate(PROMPT, max_length=LENGTH // 2) == after
print("The preset loads and writes the same.")
