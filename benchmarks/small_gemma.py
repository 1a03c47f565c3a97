"""A small Gemma for the benchmarks: a tokenizer learned from text, and a model trained on it."""

import io

import keras
import keras_hub
import sentencepiece
from text import sample_windows

# Bounds the characters of a token, so that a window of characters fills a sequence.
CHARACTERS_PER_TOKEN = 6


def windows(stretches: list[str], count: int, sequence_length: int, seed: int) -> list[str]:
    """Pieces of text that fill `sequence_length` tokens each."""
    return sample_windows(stretches, count, CHARACTERS_PER_TOKEN * sequence_length, seed)


def train_tokenizer(stretches: list[str], vocabulary_size: int = 1024):
    """A real SentencePiece tokenizer with Gemma's special tokens."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for stretch in stretches for line in stretch.splitlines() if line),
        model_writer=proto,
        model_type="bpe",
        vocab_size=vocabulary_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
    )
    return keras_hub.models.GemmaTokenizer(proto=proto.getvalue())


def compile_for_training(model, steps: int, learning_rate: float, alpha: float = 0.0):
    """AdamW with a falling rate; `evaluate` gives the mean loss over real tokens."""
    rate = keras.optimizers.schedules.CosineDecay(learning_rate, steps, alpha=alpha)
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.01, clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
        sampler="greedy",
    )


def train_gemma(
    stretches: list[str],
    steps: int,
    batch_size: int,
    sequence_length: int,
    seed: int = 0,
    num_layers: int = 4,
):
    """A causal LM, of 0.9 million parameters in four layers, trained on these stretches of text."""
    tokenizer = train_tokenizer(stretches)
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=num_layers,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=128,
        intermediate_dim=768,
        head_dim=32,
    )
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(
        tokenizer, sequence_length=sequence_length
    )
    model = keras_hub.models.GemmaCausalLM(backbone, preprocessor)
    compile_for_training(model, steps, 3e-3, alpha=0.1)
    data = windows(stretches, steps * batch_size, sequence_length, seed + 1)
    model.fit(data, batch_size=batch_size, shuffle=False)  # drawn at random already
    return model
