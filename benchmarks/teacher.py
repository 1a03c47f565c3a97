"""The small Gemma that `quality.py` converts, and the text it is trained and judged on.

Trained from nothing on a text, with segments of random tokens repeated later
in the context, so that it has something to lose: a converted model that only
sees near tokens predicts text nearly as well, and repeats nothing.
"""

import io

import keras
import models
import numpy as np
from text import load_text, split_text

VOCABULARY = 1024
LENGTH = 256
# Segments to repeat are made of these ids: fewer are learned sooner.
SEGMENT_TOKENS = np.arange(VOCABULARY - 128, VOCABULARY)


def parts_of(path):
    """A text's training, validation and test part, each a list of stretches."""
    return split_text(load_text(path), 8192)


def encoder_of(parts):
    """Function of stretches to an array of token ids; tokens are learned on the training part."""
    import sentencepiece

    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for part in parts["train"] for line in part.splitlines() if line),
        model_writer=proto,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    return lambda part: np.concatenate([np.array(tokenizer.encode(x), "int32") for x in part])


def tokens_of(path):
    """The text's parts as one array of token ids each."""
    parts = parts_of(path)
    encode = encoder_of(parts)
    return {name: encode(stretches) for name, stretches in parts.items()}


def text_windows(tokens, count, length, seed):
    """`(count, length + 1)` consecutive tokens from anywhere in the part."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(tokens) - length, size=count)
    return tokens[starts[:, None] + np.arange(length + 1)]


def repeats(windows, seed, *, longest=64):
    """The windows with a random segment written twice, and where the second can be predicted.

    Returns:
        `(windows, repeated)`: `repeated` is true, `(count, length)`, where the
        next token is one of the second segment, but for its first.
    """
    rng = np.random.default_rng(seed)
    windows = windows.copy()
    count, length = windows.shape[0], windows.shape[1] - 1
    repeated = np.zeros((count, length), bool)
    for row in range(count):
        size = int(rng.integers(16, longest + 1))
        first = int(rng.integers(0, length - 2 * size))
        second = int(rng.integers(first + size, length - size + 1))
        segment = rng.choice(SEGMENT_TOKENS, size)
        windows[row, first : first + size] = segment
        windows[row, second : second + size] = segment
        repeated[row, second : second + size - 1] = True
    return windows, repeated


def periodic(count, length, seed):
    """Windows of a segment over and over, short ones as often as long ones.

    What a model learns to repeat from: the short ones first, by their bare
    period, then all.
    """
    rng = np.random.default_rng([seed, 1])
    sizes = (2 * (length / 4) ** rng.random(count)).astype(int)
    return np.stack([np.resize(rng.choice(SEGMENT_TOKENS, size), length + 1) for size in sizes])


def training_windows(tokens, count, length, seed):
    """Text, in every fourth window with a repeated segment; every eighth is nothing but one."""
    windows = text_windows(tokens, count, length, seed)
    windows[::4] = repeats(windows[::4], seed)[0]
    windows[2::8] = periodic(len(windows[2::8]), length, seed)
    return windows


def inputs(windows):
    """What a causal LM without preprocessor takes."""
    return {"token_ids": windows[:, :-1], "padding_mask": np.ones_like(windows[:, :-1])}


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def teacher(args, shape, *, seed):
    """The preset of a trained model; trained now if it is not in `args.work` yet.

    First short windows that only repeat, then text.
    """
    preset = args.work / f"{shape}-{seed}"
    if preset.exists():
        return str(preset)
    keras.utils.set_random_seed(seed)
    model = models.gemma(vocabulary_size=VOCABULARY, **models.SHAPES[shape])
    short = LENGTH // 4
    fit(model, periodic(32 * args.repeat_steps, short, seed), 32, 1e-3, f"{preset.name}, repeating")
    windows = training_windows(args.tokens["train"], 8 * args.train_steps, LENGTH, seed)
    fit(model, windows, 8, 1.5e-3, f"{preset.name}, text")
    model.save_to_preset(str(preset))
    return str(preset)


def fit(model, windows, batch_size, rate, name):
    steps = len(windows) // batch_size
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=rate, warmup_steps=steps // 20, alpha=0.05
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.01, beta_2=0.98, clipnorm=1.0),
        loss=loss(),
        weighted_metrics=[],
    )

    def say(batch, logs):
        if batch % 100 == 0:
            print(f"{name}: step {batch} of {steps}, mean loss {logs['loss']:.3f}", flush=True)

    # KerasHub's own `fit` needs TensorFlow, or grain, for what preprocesses.
    keras.Model.fit(
        model,
        inputs(windows),
        windows[:, 1:],
        batch_size=batch_size,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=say)],
    )
